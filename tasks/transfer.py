"""Says how far a transfer of files is, if it takes so long that somebody may wonder."""

from __future__ import annotations

import logging
import time

LINE_EVERY = 5.0
log = logging.getLogger("rlhf.tasks")


class Transfer:
    """A line every few seconds, with the time that is left."""

    def __init__(self, what: str) -> None:
        self._what = what
        self._started = self._told = time.monotonic()

    def __call__(self, done: int, total: int) -> None:
        """Tell that `done` of `total` bytes have been moved."""
        now = time.monotonic()
        if now - self._told < LINE_EVERY or not done:
            return
        self._told = now
        left = (now - self._started) * (total - done) / done
        log.info(
            "%s, %.0f of %.0f MB, ETA %d:%02d",
            self._what, done / 1e6, total / 1e6, left // 60, left % 60,
        )  # fmt: skip
