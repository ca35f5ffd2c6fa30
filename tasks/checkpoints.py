"""The checkpoint store of a PPO run, from which another machine resumes it."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

from rlhf.errors import StoreError
from rlhf.files import at_home
from rlhf.ppo.stored import CheckpointPlace, keep_best
from rlhf.store import Store
from tasks.stage import StageRun

log = logging.getLogger("rlhf.tasks")


def checkpoint_store_of(run: StageRun) -> CheckpointPlace | None:
    """Return the store for a run's checkpoints; None if it uploads none."""
    config = run.config
    if not config.runtime.upload_checkpoints:
        return None
    return CheckpointPlace(
        uri=config.store, options=config.store_options, name=_store_name(run.checkpoints),
        work_dir=str(at_home(config.runtime.work_dir)),
        cache_bytes=int(config.runtime.cache_gb * 1e9), producer=run.producer,
    )  # fmt: skip


def discard_checkpoints(store: Store, checkpoints: Path) -> None:
    """Remove the checkpoints of a completed stage, if it had any.

    Of those in the store the best one stays until garbage is collected.
    """
    if not checkpoints.exists():
        return
    stored = store.below(_store_name(checkpoints))
    try:
        keep_best(stored)
    except StoreError as error:
        log.warning("the checkpoints in %s are no longer needed, but stay (%s)", stored.uri, error)
    shutil.rmtree(checkpoints, ignore_errors=True)


def _store_name(checkpoints: Path) -> str:
    """Return the name within the pipeline's store, from that of the local folder."""
    return f"checkpoints/{checkpoints.name}"
