"""PPO checkpoints: everything a resumed run needs to equal an uninterrupted one.

Randomness is no part of it: every draw is seeded by (seed, update), so the update counter is the
whole state of the generators, the prompt cursor and the learning-rate schedule. A checkpoint is a
folder that appears under its final name only when complete.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from rlhf.errors import ConfigError
from rlhf.stage import read_json, write_json

KEEP = 2


@dataclass
class TrainState:
    """What changes while training, beside the weights."""

    update: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    environment: dict[str, Any] = field(default_factory=dict)


def trainable(model: nn.Module) -> dict[str, Tensor]:
    """The parameters that training changes; with adapters, the adapters only."""
    return {n: p.detach() for n, p in model.named_parameters() if p.requires_grad}


def save_checkpoint(
    folder: Path,
    state: TrainState,
    models: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, str],
) -> Path:
    """Write a checkpoint under `folder` and drop all but the newest two."""
    final = folder / f"update-{state.update:06d}"
    partial = folder / f".partial-{final.name}"
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    for name, model in models.items():
        weights = {k: v.cpu().contiguous() for k, v in trainable(model).items()}
        save_file(weights, partial / f"{name}.safetensors")
    save_file(_flatten(optimizer), partial / "optimizer.safetensors")
    write_json(
        partial / "state.json",
        {
            "update": state.update,
            "curve": state.curve,
            "environment": state.environment,
            "identity": dict(identity),
        },
    )
    for path in partial.iterdir():
        _sync(path)
    shutil.rmtree(final, ignore_errors=True)
    partial.replace(final)
    _sync(folder)
    for old in sorted(folder.glob("update-*"))[:-KEEP]:
        shutil.rmtree(old)
    return final


def load_checkpoint(
    folder: Path,
    models: Mapping[str, nn.Module],
    optimizer: torch.optim.Optimizer,
    identity: Mapping[str, str],
) -> TrainState:
    """Load the newest checkpoint under `folder` into the models; a fresh state if there is none.

    Raises:
        ConfigError: The checkpoint belongs to another base, reward model, data or configuration.
    """
    found = sorted(folder.glob("update-*"))
    if not found:
        return TrainState()
    newest = found[-1]
    saved = read_json(newest / "state.json")
    for name in sorted({*identity, *saved["identity"]}):
        if identity.get(name) != saved["identity"].get(name):
            raise ConfigError(
                f"checkpoint {newest}: its {name} is {saved['identity'].get(name)}, this run's is "
                f"{identity.get(name)}; delete the folder to start afresh"
            )
    with torch.no_grad():
        for name, model in models.items():
            weights = load_file(newest / f"{name}.safetensors")
            for key, parameter in trainable(model).items():
                parameter.copy_(weights[key])
    _unflatten(optimizer, load_file(newest / "optimizer.safetensors"))
    return TrainState(saved["update"], saved["curve"], saved.get("environment", {}))


def _flatten(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{key}": torch.as_tensor(value).cpu().contiguous()
        for index, entries in state.items()
        for key, value in entries.items()
    }


def _unflatten(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
