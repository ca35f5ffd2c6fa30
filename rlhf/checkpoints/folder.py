"""A run's folder of checkpoints: atomic save, verified load, retention.

A checkpoint holds all that a resumed run needs to equal an uninterrupted one. Its folder gets its
final name only when complete. Damage after that is detected on loading, which then falls back to
the previous one.
"""

from __future__ import annotations

import hashlib
import logging
import re
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any, TypeVar

import torch
from filelock import FileLock, Timeout
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from rlhf.config.section import Section
from rlhf.config.training import UNFINGERPRINTED_FIELDS
from rlhf.errors import CheckpointError, ConfigError, TrainingError
from rlhf.files import folder_sha256, fsync, read_json
from rlhf.modeling.weights import shards_of
from rlhf.ranks import BUCKET, Ranks, is_first_of_other_node, is_on_one_node

T = TypeVar("T")

#: Checkpoints to retain.
KEEP = 2
STATE = "state.json"

#: Seconds to wait for another process's lock: one that was just killed may still be ending.
LOCK_TIMEOUT = 2.0

log = logging.getLogger(__name__)


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


def identity_of(
    config: Section, folders: Mapping[str, Path], known: Mapping[str, str],
    exclude: Sequence[str] = (), **values: str,
) -> dict[str, str]:  # fmt: skip
    """Identity of a run for its checkpoints: digests of inputs and configuration, and values.

    Args:
        config: Hyper-parameters.
        folders: The inputs, by the names that errors give them.
        known: Digests of inputs; those of the others are computed from the folders.
        exclude: Fields of the section that are in the digests of inputs.
        values: What else decides the result, such as the seed.
    """
    # Excluded: checkpoint intervals and the number of processes do not change the result.
    settings = config.model_dump_json(
        exclude={"checkpoint_every", *UNFINGERPRINTED_FIELDS, *exclude}
    )
    digests = {name: known.get(name) or folder_sha256(path) for name, path in folders.items()}
    return {**digests, "config": hashlib.sha256(settings.encode()).hexdigest(), **values}


def write_checkpoint(folder: Path, update: int, write: Callable[[Path], None]) -> Path:
    """Write a checkpoint under `folder` atomically and delete all but the newest two.

    Args:
        folder: The run's folder.
        update: Updates of the weights that are done.
        write: Writes the files into the folder that it is given.

    Raises:
        CheckpointError: It can't be written, as on a full disk; earlier checkpoints are intact.
    """
    final = folder / f"update-{update:06d}"
    try:
        partial = _new_partial(folder, final)
        write(partial)
        _commit(partial, final)
        existing = checkpoints_in(folder)
        newest = existing.index(final)  # later ones are damaged: loading fell back past them
        for other in existing[: max(0, newest + 1 - KEEP)] + existing[newest + 1 :]:
            _delete(other)
    except (OSError, SafetensorError) as error:
        existing = [path.name for path in checkpoints_in(folder)]
        raise CheckpointError(
            f"checkpoint {final}: can't be written ({error}); "
            f"{existing[-1] + ' is whole' if existing else 'there is no earlier one'}; "
            "mend that, then run the same again to go on"
        ) from error
    return final


def newest_checkpoint(folder: Path, read: Callable[[Path], T]) -> tuple[Path, T] | None:
    """Return the newest intact checkpoint under `folder`, and what `read` made of it.

    A damaged checkpoint is logged as a warning and skipped: the result of the run is the same, some
    updates are repeated.

    Args:
        folder: The run's folder.
        read: Reads and checks a checkpoint; any error but a ConfigError means damage.

    Raises:
        ConfigError: The checkpoint is another run's.
        TrainingError: All checkpoints are damaged.
    """
    existing = checkpoints_in(folder)
    for checkpoint in reversed(existing):
        try:
            return checkpoint, read(checkpoint)
        except (OSError, SafetensorError, ValueError, KeyError, TypeError, AttributeError) as error:
            if isinstance(error, ConfigError):
                raise
            log.warning(
                "checkpoint %s is damaged (%s); taking the one before it", checkpoint, error
            )
    if existing:
        raise TrainingError(
            f"checkpoint {existing[-1]}: damaged, like all others there; delete {folder} to start "
            "afresh"
        )
    return None


def newest_of_leader(
    folder: Path, read: Callable[[Path], T], ranks: Ranks
) -> tuple[Path, T] | None:
    """Return the newest intact checkpoint, which is the leader's on every machine.

    Other machines get a copy of it in their folder: they share no disk, and what is in theirs may
    be of an earlier try.

    Args:
        folder: The run's folder.
        read: Reads and checks a checkpoint, see `newest_checkpoint`.
        ranks: All processes of the training; all call this.

    Raises:
        ConfigError: The checkpoint is another run's.
        CheckpointError: A copy can't be written.
        TrainingError: All checkpoints are damaged, or a copy is not what was sent.
    """
    if is_on_one_node():
        ranks.barrier()  # the leader may be restoring
        return newest_checkpoint(folder, read)
    found = newest_checkpoint(folder, read) if ranks.is_leader else None
    name = ranks.from_leader(found[0].name if found else None)
    if name is None:
        return None
    _copy_to_nodes(folder / name, ranks)
    return found or (folder / name, read(folder / name))


def read_state(checkpoint: Path, identity: Mapping[str, str]) -> dict[str, Any]:
    """Return a checkpoint's `state.json` without the identity, which must be this run's.

    Raises:
        ConfigError: The checkpoint belongs to another base, tokenizer, reward model, data, seed or
            configuration.
        ValueError: It is that of another update.
    """
    saved = read_json(checkpoint / STATE)
    if f"update-{saved['update']:06d}" != checkpoint.name:
        raise ValueError(f"{STATE} is of update {saved['update']}")
    _check_identity(checkpoint, saved.pop("identity"), identity)
    return saved


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


def check_shapes(checkpoint: Path, name: str, tensors: Mapping[str, Tensor]) -> None:
    """Check that a checkpoint's file holds tensors of these names and shapes.

    Raises:
        ValueError: It holds others, or is damaged.
    """
    if saved_shapes(checkpoint, name) != {key: list(t.shape) for key, t in tensors.items()}:
        raise ValueError(f"{name}.safetensors holds other tensors than the model")


def saved_shapes(checkpoint: Path, name: str) -> dict[str, list[int]]:
    """Return names and shapes of a file's tensors, without loading them.

    Raises:
        ValueError: The file is damaged.
    """
    shapes: dict[str, list[int]] = {}
    for path in shards_of(checkpoint, name):
        try:
            with safe_open(path, "pt") as file:  # checks the file's length against the header
                shapes |= {k: file.get_slice(k).get_shape() for k in file.keys()}  # noqa: SIM118
        except SafetensorError as error:
            raise ValueError(f"{path.name}: {error}") from error
    return shapes


def load_tensors(checkpoint: Path, name: str) -> Iterator[tuple[str, Tensor]]:
    """Yield the tensors of a checkpoint's file, a shard at a time."""
    for path in shards_of(checkpoint, name):
        yield from load_file(path).items()


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """Return an optimizer's state as tensors, by the number of the weight and the entry."""
    state = optimizer.state_dict()["state"]
    return {
        f"{index}/{key}": torch.as_tensor(value)
        for index, entries in state.items()
        for key, value in entries.items()
    }


def load_optimizer(optimizer: torch.optim.Optimizer, tensors: Iterator[tuple[str, Tensor]]) -> None:
    """Restore the state that `optimizer_tensors` returned."""
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors:
        index, entry = key.split("/", 1)
        state.setdefault(int(index), {})[entry] = value
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _copy_to_nodes(checkpoint: Path, ranks: Ranks) -> None:
    """Write the leader's checkpoint into the same folder of every other machine."""
    paths = sorted(checkpoint.iterdir()) if ranks.is_leader else []
    sizes = ranks.from_leader({path.name: path.stat().st_size for path in paths})
    writes, digest = is_first_of_other_node(), hashlib.sha256()
    try:
        partial = _new_partial(checkpoint.parent, checkpoint) if writes else checkpoint
        for name, size in sizes.items():
            source = (checkpoint / name).open("rb") if ranks.is_leader else nullcontext()
            target = (partial / name).open("wb") if writes else nullcontext()
            with source as reading, target as writing:
                for start in range(0, size, BUCKET):
                    count = min(BUCKET, size - start)
                    part = ranks.bytes_from_leader(reading.read(count) if reading else b"", count)
                    digest.update(part)
                    if writing:
                        writing.write(part)
        if writes:
            _commit(partial, checkpoint)
    except OSError as error:
        raise CheckpointError(
            f"checkpoint {checkpoint}: can't be copied from the first machine ({error}); mend "
            "that, then run the same again"
        ) from error
    ranks.check_equal(f"the copy of {checkpoint.name}", digest.hexdigest())


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


def _check_identity(checkpoint: Path, saved: Mapping[str, str], run: Mapping[str, str]) -> None:
    """Raise ConfigError if a checkpoint's identity differs from this run's."""
    for name in sorted({*run, *saved}):
        if run.get(name) != saved.get(name):
            raise ConfigError(
                f"checkpoint {checkpoint}: its {name} is {saved.get(name)}, this run's is "
                f"{run.get(name)}; delete the folder to start afresh"
            )
