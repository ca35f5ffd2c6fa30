"""PPO checkpoints: everything a resumed run needs to equal an uninterrupted one.

Generators are no part of it: every draw is seeded by (seed, update), so the update counter is
their whole state, and that of the prompt cursor and of the learning-rate schedule. A checkpoint is
a folder that appears under its final name only when complete, and it is whole as long as it has it.
What happens to it later, on the disk, is found when it is read: then the one before it is taken.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rlhf.errors import CheckpointError, ConfigError, TrainingError
from rlhf.files import fsync, read_json, write_json
from rlhf.modeling.shards import save_tensors, shards_of
from rlhf.ppo.models import Models

KEEP = 2
STATE = "state.json"
#: Seconds to wait for another process; one that was killed a moment ago may still be ending.
PATIENCE = 2.0

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """What changes while training, beside weights and optimisers."""

    update: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)


@contextmanager
def sole_user(folder: Path) -> Iterator[None]:
    """Keep other processes off this folder of checkpoints, until done or dead.

    Raises:
        ConfigError: Another process trains with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=PATIENCE)
    except Timeout:
        raise ConfigError(
            f"checkpoints {folder}: another process trains with this folder; wait for it, or give "
            "this run another folder"
        ) from None
    try:
        yield
    finally:
        lock.release()


def save_checkpoint(
    folder: Path, state: TrainState, models: Models, identity: Mapping[str, str]
) -> Path:
    """Write a checkpoint under `folder` and drop all but the newest two.

    Raises:
        CheckpointError: It can't be written, as on a full disk; the earlier ones are whole.
    """
    final = folder / f"update-{state.update:06d}"
    try:
        _write(folder, final, state, models, identity)
    except (OSError, SafetensorError) as error:
        kept = [path.name for path in checkpoints_in(folder)]
        raise CheckpointError(
            f"checkpoint {final}: can't be written ({error}); "
            f"{kept[-1] + ' is whole' if kept else 'there is no earlier one'}; "
            "mend that, then run the same again to go on"
        ) from error
    return final


def _write(
    folder: Path, final: Path, state: TrainState, models: Models, identity: Mapping[str, str]
) -> None:
    partial = folder / f".partial-{final.name}"
    _clear(folder)
    partial.mkdir(parents=True)
    for name, parameters in models.parameters.items():
        save_tensors(parameters, partial, name)
    for name, optimizer in models.optimizers.items():
        save_tensors(_flatten(optimizer), partial, f"optimizer-{name}")
    write_json(partial / STATE, {**asdict(state), "identity": dict(identity)})
    _finish(partial, final)
    found = checkpoints_in(folder)
    newest = found.index(final)  # what has a later number was found damaged
    for other in found[: max(0, newest + 1 - KEEP)] + found[newest + 1 :]:
        _discard(other)


def _finish(partial: Path, final: Path) -> None:
    """Give a written checkpoint its name.

    Everything is on the disk before the name is: a power cut leaves no empty files behind it.
    """
    for path in partial.iterdir():
        fsync(path)
    fsync(partial)
    _discard(final)  # one that was found damaged
    partial.replace(final)
    fsync(final.parent)


def take_over(folder: Path, source: Path, update: int) -> Path:
    """Put a copy of a checkpoint from elsewhere among those of `folder`, whole or not at all.

    Raises:
        CheckpointError: It can't be written, as on a full disk.
    """
    final = folder / f"update-{update:06d}"
    partial = folder / f".partial-{final.name}"
    try:
        _clear(folder)
        partial.mkdir(parents=True)
        for path in source.iterdir():
            shutil.copyfile(path, partial / path.name)
        _finish(partial, final)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {final}: can't be copied from the store ({error}); mend that, then run "
            "the same again"
        ) from error
    return final


def checkpoints_in(folder: Path) -> list[Path]:
    """The folder's checkpoints, the oldest first; other files that may lie there are none."""
    found = (re.fullmatch(r"update-(\d{6,})", path.name) for path in folder.glob("update-*"))
    return [folder / match[0] for match in sorted(filter(None, found), key=lambda m: int(m[1]))]


def load_checkpoint(folder: Path, models: Models, identity: Mapping[str, str]) -> TrainState:
    """Load the newest whole checkpoint under `folder`; a fresh state if there are none at all.

    A damaged one is logged as a warning, and the one before it taken: the result is the same, some
    updates are only done again.

    Raises:
        ConfigError: The checkpoint belongs to another base, tokenizer, reward model, data, seed or
            configuration.
        TrainingError: There are checkpoints, but none is whole.
    """
    found = checkpoints_in(folder)
    for checkpoint in reversed(found):
        try:
            saved = _read(checkpoint)
            _refuse_others(checkpoint, saved.pop("identity"), identity)
            state = TrainState(**saved)
            _check_files(checkpoint, models)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            log.warning(
                "checkpoint %s is damaged (%s); taking the one before it", checkpoint, error
            )
            continue
        _load(checkpoint, models)
        return state
    if found:
        raise TrainingError(
            f"checkpoint {found[-1]}: damaged, like all others there; delete {folder} to start "
            "afresh"
        )
    return TrainState()


def _read(checkpoint: Path) -> dict[str, Any]:
    saved = read_json(checkpoint / STATE)
    if f"update-{saved['update']:06d}" != checkpoint.name:
        raise ValueError(f"{STATE} is of update {saved['update']}")
    return saved


def _refuse_others(checkpoint: Path, theirs: Mapping[str, str], ours: Mapping[str, str]) -> None:
    for name in sorted({*ours, *theirs}):
        if ours.get(name) != theirs.get(name):
            raise ConfigError(
                f"checkpoint {checkpoint}: its {name} is {theirs.get(name)}, this run's is "
                f"{ours.get(name)}; delete the folder to start afresh"
            )


def _check_files(checkpoint: Path, models: Models) -> None:
    """Look at names, shapes and lengths, before anything of it is loaded."""
    for name, parameters in models.parameters.items():
        shapes = _shapes(checkpoint, name)
        if shapes != {key: list(p.shape) for key, p in parameters.items()}:
            raise ValueError(f"{name}.safetensors holds other tensors than the model")
    for name in models.optimizers:
        _shapes(checkpoint, f"optimizer-{name}")


def _shapes(checkpoint: Path, name: str) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path in shards_of(checkpoint, name):
        try:
            with safe_open(path, "pt") as file:  # compares the header with the file's length
                shapes |= {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path.name}: {error}") from error
    return shapes


def _load(checkpoint: Path, models: Models) -> None:
    with torch.no_grad():
        for name, parameters in models.parameters.items():
            for path in shards_of(checkpoint, name):
                for key, weights in load_file(path).items():
                    parameters[key].copy_(weights)
    for name, optimizer in models.optimizers.items():
        paths = shards_of(checkpoint, f"optimizer-{name}")
        _unflatten(optimizer, {k: t for path in paths for k, t in load_file(path).items()})


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
        f"{index}/{key}": torch.as_tensor(value)
        for index, entries in state.items()
        for key, value in entries.items()
    }


def _unflatten(optimizer: torch.optim.Optimizer, tensors: Mapping[str, Tensor]) -> None:
    state: dict[int, dict[str, Any]] = {}
    for name, value in tensors.items():
        index, key = name.split("/", 1)
        state.setdefault(int(index), {})[key] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
