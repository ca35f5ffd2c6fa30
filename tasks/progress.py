"""Progress of stages and transfers in terminal, Prefect's UI, log and trackers.

Prefect is imported inside functions only, so that a command can set its environment variables
first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Self

from tasks.board import board
from tasks.eta import Eta

if TYPE_CHECKING:
    from tasks.trackers import StageMetrics

log = logging.getLogger("rlhf.tasks")
#: Metrics in a line of progress, in this order.
SHOWN = ("loss", "accuracy", "reward", "kl", "entropy", "tokens", "pairs")
#: Seconds between two lines of a log, and between two updates of Prefect's UI.
LINE_EVERY, UI_EVERY = 5.0, 3.0


class StageProgress:
    """Progress of one task run: terminal, Prefect artifact, run log, trackers."""

    def __init__(self, stage: str, metrics: StageMetrics | None = None) -> None:
        self.stage = stage
        self._metrics = metrics
        self._shown: dict[str, float] = {}
        self._artifact: Any = None
        self._ui_time = self._log_time = 0.0
        self._eta = Eta(time.monotonic())

    def __enter__(self) -> Self:
        board.start_stage(self.stage)
        return self

    def __call__(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show `step` of `total` everywhere, each display at its own rate."""
        if self._metrics:
            self._metrics.log(step, metrics)
        # Trainers log metrics every few steps; in between the last ones are shown.
        self._shown |= metrics
        text = "  ".join(f"{k} {self._shown[k]:.3g}" for k in SHOWN if k in self._shown)
        board.tell(self.stage, step, total, metrics, text)
        now = time.monotonic()
        self._eta.tell(step, total, now)
        if now - self._ui_time >= UI_EVERY or step == total:
            self._ui_time = now
            with harmless("progress"):
                left = self._eta.left(now)
                eta = "" if left is None else f", {left:.0f} s left"
                about = f"{self.stage} {step}/{total}{eta}{'  ' if text else ''}{text}"
                self._show_in_ui(100.0 * step / max(total, 1), about)
        if now - self._log_time >= LINE_EVERY:
            from prefect.logging import get_run_logger

            self._log_time = now
            get_run_logger().info("%s %d/%d %s", self.stage, step, total, text)

    def _show_in_ui(self, percent: float, about: str) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._artifact is None:
            self._artifact = create_progress_artifact(
                progress=percent, key=f"{self.stage}-progress", description=about
            )
        else:
            update_progress_artifact(
                artifact_id=self._artifact, progress=percent, description=about
            )

    def __exit__(self, *_: object) -> None:
        if self._metrics:
            self._metrics.close()


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


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Log errors in the block as warnings: a failed display must not fail a stage."""
    try:
        yield
    except Exception as error:
        from prefect.logging import get_run_logger

        get_run_logger().warning("could not show %s in Prefect: %s", what, error)


def minutes(seconds: float) -> str:
    """Format a duration as `m:ss`."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
