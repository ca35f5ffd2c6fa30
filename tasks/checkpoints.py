"""A run's PPO checkpoints in the store, from which it goes on on another machine."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.errors import StoreError
from rlhf.files import at_home
from rlhf.ppo.stored import CheckpointPlace, StoredCheckpoints, keep_best
from rlhf.store import Store

if TYPE_CHECKING:
    from rlhf.ppo.upload import CheckpointUploads
    from tasks.stages import StageRun

log = logging.getLogger("rlhf.tasks")


def uploads_of(run: StageRun) -> CheckpointUploads | None:
    """Uploads to a store of this run's own, if the configuration wants them."""
    from rlhf.ppo.upload import CheckpointUploads

    if not run.config.runtime.upload_checkpoints:
        return None
    stored = StoredCheckpoints(_store_of(run.store, run.checkpoints), run.producer)
    return CheckpointUploads(stored)


def place_of(run: StageRun) -> CheckpointPlace | None:
    """The same store, as another process is told of it."""
    config = run.config
    if not config.runtime.upload_checkpoints:
        return None
    return CheckpointPlace(
        uri=config.store, options=config.store_options, name=_name(run.checkpoints),
        work_dir=str(at_home(config.runtime.work_dir)),
        cache_bytes=int(config.runtime.cache_gb * 1e9), producer=run.producer,
    )  # fmt: skip


def discard_checkpoints(store: Store, checkpoints: Path) -> None:
    """Remove the checkpoints of a stage that is done, if it had any: all here, and in the store
    all but the best, which stays until garbage is collected."""
    if not checkpoints.exists():
        return
    stored = _store_of(store, checkpoints)
    try:
        keep_best(stored)
    except StoreError as error:
        log.warning("the checkpoints in %s are no longer needed, but stay (%s)", stored.uri, error)
    shutil.rmtree(checkpoints, ignore_errors=True)


def _store_of(store: Store, checkpoints: Path) -> Store:
    """Below the pipeline's store, under the name of the local folder: stage and fingerprint."""
    return store.below(_name(checkpoints))


def _name(checkpoints: Path) -> str:
    return f"checkpoints/{checkpoints.name}"
