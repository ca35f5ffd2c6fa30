"""Background upload of checkpoints to the store, and restoring from it."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rlhf.checkpoints.folder import checkpoints_in, import_checkpoint
from rlhf.checkpoints.store import CheckpointStore
from rlhf.errors import CheckpointError, Interrupted

#: Prefix of the folders of snapshots, beside the checkpoints.
SNAPSHOT = ".upload-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Snapshot:
    """A checkpoint's files, set aside for the upload."""

    folder: Path
    update: int
    score: float | None


class CheckpointUploads:
    """Uploads checkpoints in a background thread: one in flight, one queued.

    The thread runs inside the `with` block. On exit the upload in flight completes, so that nothing
    appears in the store afterwards. The queued one is sent only after `Interrupted`, when another
    machine may resume the run.
    """

    def __init__(self, stored: CheckpointStore) -> None:
        self._stored = stored
        self._changed = threading.Condition()
        self._queued: _Snapshot | None = None
        self._ended = False
        self._error: Exception | None = None
        # A daemon, so that a second Ctrl-C ends the process without waiting for the upload.
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)

    def restore(self, checkpoints: Path) -> None:
        """Copy the store's newest checkpoint into a folder, if it is newer than its own.

        Raises:
            StoreError: The store does not answer.
            CheckpointError: The copy can't be written.
        """
        for leftover in checkpoints.glob(f"{SNAPSHOT}*"):  # of a killed process
            shutil.rmtree(leftover)
        local = checkpoints_in(checkpoints)
        newest = int(local[-1].name.removeprefix("update-")) if local else 0
        newer = self._stored.newest_after(newest)
        if newer is None:
            return
        update, fetched = newer
        import_checkpoint(checkpoints, fetched, update)
        shutil.rmtree(fetched, ignore_errors=True)  # in the cache, where it is not needed again
        log.info("checkpoint of update %d comes from %s", update, self._stored.uri)

    def __enter__(self) -> CheckpointUploads:
        self._thread.start()
        return self

    def __exit__(
        self, error_type: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        with self._changed:
            self._ended = True
            if not isinstance(error, Interrupted):
                self._discard_queued()
            self._changed.notify_all()
        self._thread.join()
        self._discard_queued()  # left after an error in the thread
        if self._error and self._error is not error:
            log.warning("the last checkpoint is not in %s (%s)", self._stored.uri, self._error)

    @property
    def failed(self) -> bool:
        """True if an upload failed; the next `submit` raises its error."""
        return self._error is not None

    def submit(self, checkpoint: Path, update: int, score: float | None) -> None:
        """Queue a checkpoint for upload; blocks while the queue is full.

        Its files may be deleted afterwards.

        Raises:
            StoreError: An earlier upload failed; nothing more is uploaded. Other errors of the
                thread are raised unchanged.
            CheckpointError: The snapshot can't be written, as on a full disk.
        """
        started = time.monotonic()
        with self._changed:
            full = self._queued is not None
            self._changed.wait_for(lambda: self._error or self._queued is None)
            if self._error:
                raise self._error
        if full:
            seconds = time.monotonic() - started
            log.info("waited %.1f s for the upload of earlier checkpoints", seconds)
        # Made only now, so that at most two snapshots exist. The queue is still empty: one thread
        # submits.
        snapshot = _Snapshot(_link_or_copy(checkpoint), update, score)
        with self._changed:
            self._queued = snapshot
            self._changed.notify_all()

    def _work(self) -> None:
        """Upload queued checkpoints until the block ends or an upload fails."""
        while snapshot := self._next():
            try:
                self._stored.save(snapshot.folder, snapshot.update, snapshot.score)
            except Exception as error:
                with self._changed:
                    self._error = error
                    self._discard_queued()
                    self._changed.notify_all()
                return
            finally:
                shutil.rmtree(snapshot.folder, ignore_errors=True)

    def _next(self) -> _Snapshot | None:
        """Wait for the next checkpoint; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self._queued or self._ended)
            snapshot, self._queued = self._queued, None
            self._changed.notify_all()
            return snapshot

    def _discard_queued(self) -> None:
        if self._queued:
            shutil.rmtree(self._queued.folder, ignore_errors=True)
            self._queued = None


def _link_or_copy(checkpoint: Path) -> Path:
    """Set a checkpoint's files aside, by hard links or, without support, by copies."""
    folder = checkpoint.with_name(SNAPSHOT + checkpoint.name)
    try:
        folder.mkdir()
        for path in checkpoint.iterdir():
            try:
                os.link(path, folder / path.name)
            except OSError:
                shutil.copyfile(path, folder / path.name)
    except OSError as error:
        shutil.rmtree(folder, ignore_errors=True)
        raise CheckpointError(
            f"checkpoint {checkpoint}: is whole, but can't be set aside for its upload ({error}); "
            "mend that, then run the same again to go on"
        ) from error
    return folder
