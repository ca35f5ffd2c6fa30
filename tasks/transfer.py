"""Log lines of a transfer of files that takes long."""

from __future__ import annotations

import logging
import time

from tasks.progress import LINE_EVERY, minutes

log = logging.getLogger("rlhf.tasks")


class Transfer:
    """Logs progress and ETA of a transfer every `LINE_EVERY` seconds."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = self._logged = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Log that `done` of `total` bytes have been moved, if a line is due."""
        now = time.monotonic()
        if now - self._logged < LINE_EVERY or not done:
            return
        self._logged = now
        left = (now - self._started) * (total - done) / done
        log.info("%s, %.0f of %.0f MB, ETA %s", self._what, done / 1e6, total / 1e6, minutes(left))
