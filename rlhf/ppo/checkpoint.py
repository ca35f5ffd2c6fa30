"""PPO checkpoints: everything a resumed run needs to equal an uninterrupted one.

Generators are no part of it: every draw is seeded by (seed, update), so the update counter is
their whole state, and that of the prompt cursor and of the learning-rate schedule. A checkpoint is
a folder that appears under its final name only when complete, and it is whole as long as it has it.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from rlhf.errors import ConfigError
from rlhf.ppo.models import Models
from rlhf.stage import read_json, write_json

KEEP = 2
STATE = "state.json"


@dataclass
class TrainState:
    """What changes while training, beside weights and optimisers."""

    update: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)


def save_checkpoint(
    folder: Path, state: TrainState, models: Models, identity: Mapping[str, str]
) -> Path:
    """Write a checkpoint under `folder` and drop all but the newest two."""
    final = folder / f"update-{state.update:06d}"
    partial = folder / f".partial-{final.name}"
    _clear(folder)
    partial.mkdir(parents=True)
    for name, parameters in models.parameters.items():
        weights = {k: p.detach().cpu().contiguous() for k, p in parameters.items()}
        save_file(weights, partial / f"{name}.safetensors")
    for name, optimizer in models.optimizers.items():
        save_file(_flatten(optimizer), partial / f"optimizer-{name}.safetensors")
    write_json(partial / STATE, {**asdict(state), "identity": dict(identity)})
    for path in partial.iterdir():
        _sync(path)
    _discard(final)
    partial.replace(final)
    _sync(folder)
    for old in sorted(folder.glob("update-*"))[:-KEEP]:
        _discard(old)
    return final


def load_checkpoint(folder: Path, models: Models, identity: Mapping[str, str]) -> TrainState:
    """Load the newest checkpoint under `folder` into the models; a fresh state if there is none.

    Raises:
        ConfigError: The checkpoint belongs to another base, tokenizer, reward model, data, seed or
            configuration.
    """
    found = sorted(folder.glob("update-*"))
    if not found:
        return TrainState()
    newest = found[-1]
    saved = read_json(newest / STATE)
    theirs = saved.pop("identity")
    for name in sorted({*identity, *theirs}):
        if identity.get(name) != theirs.get(name):
            raise ConfigError(
                f"checkpoint {newest}: its {name} is {theirs.get(name)}, this run's is "
                f"{identity.get(name)}; delete the folder to start afresh"
            )
    with torch.no_grad():
        for name, parameters in models.parameters.items():
            weights = load_file(newest / f"{name}.safetensors")
            for key, parameter in parameters.items():
                parameter.copy_(weights[key])
    for name, optimizer in models.optimizers.items():
        _unflatten(optimizer, load_file(newest / f"optimizer-{name}.safetensors"))
    return TrainState(**saved)


def _discard(checkpoint: Path) -> None:
    """Delete a checkpoint; from the first moment on, none of it is taken for one."""
    if checkpoint.exists():
        gone = checkpoint.with_name(f".partial-{checkpoint.name}-old")
        checkpoint.replace(gone)
        shutil.rmtree(gone)


def _clear(folder: Path) -> None:
    for left_behind in folder.glob(".partial-*"):
        shutil.rmtree(left_behind)


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
