"""A run's PPO checkpoints in the store, from which it goes on on another machine."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.config import PipelineConfig
from rlhf.errors import StoreError
from rlhf.paths import at_home
from rlhf.ppo.stored import StoredCheckpoints, wipe
from rlhf.store import Store, open_store

if TYPE_CHECKING:
    from rlhf.ppo.upload import CheckpointUploads
    from tasks.stages import StageRun

log = logging.getLogger("rlhf.tasks")


def uploads_of(run: StageRun) -> CheckpointUploads | None:
    """Uploads to a store of this run's own, if the configuration wants them."""
    from rlhf.ppo.upload import CheckpointUploads

    if not run.config.runtime.upload_checkpoints:
        return None
    store = _store_of(run.config, run.store, run.checkpoints)
    return CheckpointUploads(StoredCheckpoints(store, run.producer))


def discard_checkpoints(config: PipelineConfig, store: Store, checkpoints: Path) -> None:
    """Remove the checkpoints of a stage that is done, if it had any, here and in the store."""
    if not checkpoints.exists():
        return
    stored = _store_of(config, store, checkpoints)
    try:
        wipe(stored)
    except StoreError as error:
        log.warning("the checkpoints in %s are no longer needed, but stay (%s)", stored.uri, error)
    shutil.rmtree(checkpoints, ignore_errors=True)


def _store_of(config: PipelineConfig, store: Store, checkpoints: Path) -> Store:
    """Below the pipeline's store, under the name of the local folder: stage and fingerprint."""
    return open_store(
        f"{store.uri}/checkpoints/{checkpoints.name}",
        options=config.store_options,
        cache_dir=at_home(config.runtime.work_dir),
    )
