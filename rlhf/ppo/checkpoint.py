"""PPO checkpoints on the local disk: atomic save, load, and retention.

A checkpoint holds all that a resumed run needs to equal an uninterrupted one. Random generators are
not part of it: every draw is seeded by (seed, update), so the update counter is the state of
generators, prompt order and learning-rate schedule. A checkpoint's folder gets its final name only
when complete. Damage after that is detected on loading, which then falls back to the previous one.
"""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rlhf.errors import CheckpointError, ConfigError, TrainingError
from rlhf.files import fsync, read_json, write_json
from rlhf.modeling.weights import save_tensors, shards_of
from rlhf.ppo.frontier import Frontier
from rlhf.ppo.models import Models

#: Checkpoints to retain.
KEEP = 2
STATE = "state.json"
#: Name of the files with the frontier's retained weights.
RETAINED = "retained"

#: Seconds to wait for another process's lock: one that was just killed may still be ending.
LOCK_TIMEOUT = 2.0

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """Training state beside weights and optimizers."""

    update: int = 0
    curve: list[dict[str, float]] = field(default_factory=list)
    samples: list[dict[str, Any]] = field(default_factory=list)
    trainer: dict[str, Any] = field(default_factory=dict)
    frontier: Frontier = field(default_factory=Frontier)
    """Looks of the watchdog; none without one."""
    retained: dict[str, Tensor] = field(default_factory=dict)
    """The frontier's retained weights of the policy; in the leading process only."""

    def values(self) -> dict[str, Any]:
        """Return all but the weights, as JSON values."""
        values = {name: value for name, value in vars(self).items() if name != RETAINED}
        return {**values, "frontier": self.frontier.state_dict()}


@contextmanager
def exclusive(folder: Path) -> Iterator[None]:
    """Lock a folder of checkpoints against other processes; released on exit or death.

    Raises:
        ConfigError: Another process trains with it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=LOCK_TIMEOUT)
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
    """Write a checkpoint under `folder` atomically and delete all but the newest two.

    Raises:
        CheckpointError: It can't be written, as on a full disk; earlier checkpoints are intact.
    """
    final = folder / f"update-{state.update:06d}"
    try:
        _write(folder, final, state, models, identity)
    except (OSError, SafetensorError) as error:
        existing = [path.name for path in checkpoints_in(folder)]
        raise CheckpointError(
            f"checkpoint {final}: can't be written ({error}); "
            f"{existing[-1] + ' is whole' if existing else 'there is no earlier one'}; "
            "mend that, then run the same again to go on"
        ) from error
    return final


def load_checkpoint(folder: Path, models: Models, identity: Mapping[str, str]) -> TrainState:
    """Load the newest intact checkpoint under `folder`; return a fresh state if none.

    A damaged checkpoint is logged as a warning and skipped: the result of the run is the same, some
    updates are repeated.

    Raises:
        ConfigError: The checkpoint belongs to another base, tokenizer, reward model, data, seed or
            configuration.
        TrainingError: All checkpoints are damaged.
    """
    existing = checkpoints_in(folder)
    for checkpoint in reversed(existing):
        try:
            saved = _read_state(checkpoint)
            _check_identity(checkpoint, saved.pop("identity"), identity)
            frontier = Frontier.of(saved.pop("frontier"))
            state = TrainState(**saved, frontier=frontier)
            _check_files(checkpoint, models, state)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            log.warning(
                "checkpoint %s is damaged (%s); taking the one before it", checkpoint, error
            )
            continue
        _load_tensors(checkpoint, models)
        if state.frontier.looks and models.ranks.is_leader:
            for path in shards_of(checkpoint, RETAINED):
                state.retained |= load_file(path)
        return state
    if existing:
        raise TrainingError(
            f"checkpoint {existing[-1]}: damaged, like all others there; delete {folder} to start "
            "afresh"
        )
    return TrainState()


def import_checkpoint(folder: Path, source: Path, update: int) -> Path:
    """Copy a checkpoint from elsewhere into `folder` atomically.

    Raises:
        CheckpointError: It can't be written, as on a full disk.
    """
    final = folder / f"update-{update:06d}"
    try:
        partial = _new_partial(folder, final)
        for path in source.iterdir():
            shutil.copyfile(path, partial / path.name)
        _commit(partial, final)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {final}: can't be copied from the store ({error}); mend that, then run "
            "the same again"
        ) from error
    return final


def checkpoints_in(folder: Path) -> list[Path]:
    """List a folder's checkpoints, oldest first; other files are ignored."""
    matches = (re.fullmatch(r"update-(\d{6,})", path.name) for path in folder.glob("update-*"))
    return [folder / match[0] for match in sorted(filter(None, matches), key=lambda m: int(m[1]))]


def _write(
    folder: Path, final: Path, state: TrainState, models: Models, identity: Mapping[str, str]
) -> None:
    partial = _new_partial(folder, final)
    for name, parameters in models.parameters.items():
        save_tensors(parameters, partial, name)
    for name, optimizer in models.optimizers.items():
        save_tensors(_flat_state(optimizer), partial, f"optimizer-{name}")
    if state.retained:
        save_tensors(state.retained, partial, RETAINED)
    write_json(partial / STATE, {**state.values(), "identity": dict(identity)})
    _commit(partial, final)
    existing = checkpoints_in(folder)
    newest = existing.index(final)  # later ones are damaged: loading fell back past them
    for other in existing[: max(0, newest + 1 - KEEP)] + existing[newest + 1 :]:
        _delete(other)


def _flat_state(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{key}": torch.as_tensor(value)
        for index, entries in state.items()
        for key, value in entries.items()
    }


def _new_partial(folder: Path, final: Path) -> Path:
    """Make a checkpoint's temporary folder and delete those of killed processes."""
    for leftover in folder.glob(".partial-*"):
        shutil.rmtree(leftover)
    partial = folder / f".partial-{final.name}"
    partial.mkdir(parents=True)
    return partial


def _commit(partial: Path, final: Path) -> None:
    """Rename a complete checkpoint to its final name.

    Files and folder are synced before: after a power cut no empty file has a final name.
    """
    for path in partial.iterdir():
        fsync(path)
    fsync(partial)
    _delete(final)  # exists only if it is damaged
    partial.replace(final)
    fsync(final.parent)


def _delete(checkpoint: Path) -> None:
    """Delete a checkpoint, which first loses its name so that no part of it is loaded."""
    if checkpoint.exists():
        renamed = checkpoint.with_name(f".partial-{checkpoint.name}-old")
        checkpoint.replace(renamed)
        shutil.rmtree(renamed)


def _read_state(checkpoint: Path) -> dict[str, Any]:
    saved = read_json(checkpoint / STATE)
    if f"update-{saved['update']:06d}" != checkpoint.name:
        raise ValueError(f"{STATE} is of update {saved['update']}")
    return saved


def _check_identity(checkpoint: Path, saved: Mapping[str, str], run: Mapping[str, str]) -> None:
    """Raise ConfigError if a checkpoint's identity differs from this run's."""
    for name in sorted({*run, *saved}):
        if run.get(name) != saved.get(name):
            raise ConfigError(
                f"checkpoint {checkpoint}: its {name} is {saved.get(name)}, this run's is "
                f"{run.get(name)}; delete the folder to start afresh"
            )


def _check_files(checkpoint: Path, models: Models, state: TrainState) -> None:
    """Check names, shapes and file lengths, before any tensor is loaded."""
    wanted = dict(models.parameters)
    if state.frontier.looks:
        wanted[RETAINED] = models.parameters["policy"]
    for name, parameters in wanted.items():
        shapes = _saved_shapes(checkpoint, name)
        if shapes != {key: list(p.shape) for key, p in parameters.items()}:
            raise ValueError(f"{name}.safetensors holds other tensors than the model")
    for name in models.optimizers:
        _saved_shapes(checkpoint, f"optimizer-{name}")


def _saved_shapes(checkpoint: Path, name: str) -> dict[str, list[int]]:
    shapes: dict[str, list[int]] = {}
    for path in shards_of(checkpoint, name):
        try:
            with safe_open(path, "pt") as file:  # checks the file's length against the header
                shapes |= {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path.name}: {error}") from error
    return shapes


def _load_tensors(checkpoint: Path, models: Models) -> None:
    with torch.no_grad():
        for name, parameters in models.parameters.items():
            for path in shards_of(checkpoint, name):
                for key, weights in load_file(path).items():
                    parameters[key].copy_(weights)
    for name, optimizer in models.optimizers.items():
        state: dict[int, dict[str, Any]] = {}
        for path in shards_of(checkpoint, f"optimizer-{name}"):
            for key, value in load_file(path).items():
                index, entry = key.split("/", 1)
                state.setdefault(int(index), {})[entry] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
