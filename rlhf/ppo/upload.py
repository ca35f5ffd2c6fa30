"""PPO checkpoints go to the store in the background, while training goes on."""

from __future__ import annotations

import logging
import os
import shutil
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from rlhf.errors import CheckpointError, Interrupted
from rlhf.ppo.checkpoint import checkpoints_in, take_over
from rlhf.ppo.stored import StoredCheckpoints

SNAPSHOT = ".upload-"

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class _Snapshot:
    folder: Path
    update: int
    score: float | None


class CheckpointUploads:
    """One checkpoint is sent, and one waits for it; who brings a third waits too.

    A `with` block has the thread. At its end, the checkpoint that is being sent is waited for, so
    that nothing appears in the store afterwards. The one that waits is sent only if the block ends
    with `Interrupted`: the run is to go on, and perhaps elsewhere.
    """

    def __init__(self, stored: StoredCheckpoints) -> None:
        self._stored = stored
        self._changed = threading.Condition()
        self._waiting: _Snapshot | None = None
        self._ended = False
        self._error: Exception | None = None
        # A daemon: who presses Ctrl-C a second time does not wait.
        self._thread = threading.Thread(target=self._work, name="checkpoints", daemon=True)

    def restore(self, checkpoints: Path) -> None:
        """If the store has a newer checkpoint than this folder, copy it there.

        Raises:
            StoreError: The store does not answer.
            CheckpointError: The copy can't be written.
        """
        for left_behind in checkpoints.glob(f"{SNAPSHOT}*"):  # by a process that was killed
            shutil.rmtree(left_behind)
        local = checkpoints_in(checkpoints)
        newest = int(local[-1].name.removeprefix("update-")) if local else 0
        found = self._stored.newest_after(newest)
        if found is None:
            return
        update, fetched = found
        take_over(checkpoints, fetched, update)
        shutil.rmtree(fetched, ignore_errors=True)  # of the cache: nobody will ask for it again
        log.info("checkpoint of update %d comes from %s", update, self._stored.uri)

    def __enter__(self) -> CheckpointUploads:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:  # fmt: skip
        with self._changed:
            self._ended = True
            if not isinstance(error, Interrupted):
                self._forget_waiting()
            self._changed.notify_all()
        self._thread.join()
        self._forget_waiting()  # after an error there may be one
        if self._error and self._error is not error:
            log.warning("the last checkpoint is not in %s (%s)", self._stored.uri, self._error)

    @property
    def failed(self) -> bool:
        """Whether an upload failed; the next `submit` says how."""
        return self._error is not None

    def submit(self, checkpoint: Path, update: int, score: float | None) -> None:
        """Queue a checkpoint, which may be deleted or moved afterwards.

        Raises:
            StoreError: An earlier upload failed; nothing more is uploaded. Other errors of the
                thread are raised too, as they are.
            CheckpointError: It can't be set aside, as on a full disk.
        """
        started = time.monotonic()
        with self._changed:
            full = self._waiting is not None
            self._changed.wait_for(lambda: self._error or self._waiting is None)
            if self._error:
                raise self._error
        if full:
            seconds = time.monotonic() - started
            log.info("waited %.1f s for the upload of earlier checkpoints", seconds)
        # Nobody else submits, so the place is still free; taken earlier there would be three.
        snapshot = _Snapshot(_set_aside(checkpoint), update, score)
        with self._changed:
            self._waiting = snapshot
            self._changed.notify_all()

    def _work(self) -> None:
        while snapshot := self._next():
            try:
                self._stored.save(snapshot.folder, snapshot.update, snapshot.score)
            except Exception as error:
                with self._changed:
                    self._error = error
                    self._forget_waiting()
                    self._changed.notify_all()
                return
            finally:
                shutil.rmtree(snapshot.folder, ignore_errors=True)

    def _next(self) -> _Snapshot | None:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._ended)
            snapshot, self._waiting = self._waiting, None
            self._changed.notify_all()
            return snapshot

    def _forget_waiting(self) -> None:
        if self._waiting:
            shutil.rmtree(self._waiting.folder, ignore_errors=True)
            self._waiting = None


def _set_aside(checkpoint: Path) -> Path:
    """Hard links, which outlive the checkpoint's own files; copies where there are none."""
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
