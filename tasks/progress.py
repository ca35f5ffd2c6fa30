"""Progress of stages and transfers in terminal, Prefect's UI, log and trackers.

Prefect is imported inside functions only, so that a command can set its environment variables
first.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Protocol, Self

from rich.progress import BarColumn, Progress, TaskID, TimeRemainingColumn

from tasks.console import PlainConsole, text_column

if TYPE_CHECKING:
    from tasks.trackers import StageMetrics

log = logging.getLogger("rlhf.tasks")
#: Metrics in a line of progress, in this order.
SHOWN = ("loss", "accuracy", "reward", "kl", "entropy", "tokens", "pairs")
#: Seconds between two lines, and between two updates of Prefect's UI.
LINE_EVERY, UI_EVERY = 5.0, 3.0
_display: Display | None = None


class StageProgress:
    """Progress of one task run: terminal, Prefect artifact, run log, trackers."""

    def __init__(self, stage: str, metrics: StageMetrics | None = None) -> None:
        self.stage = stage
        self._metrics = metrics
        self._shown: dict[str, float] = {}
        self._artifact: Any = None
        self._ui_time = self._log_time = 0.0

    def __enter__(self) -> Self:
        return self

    def __call__(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show `step` of `total` everywhere, each display at its own rate."""
        if self._metrics:
            self._metrics.log(step, metrics)
        # Trainers log metrics every few steps; in between the last ones are shown.
        self._shown |= metrics
        text = "  ".join(f"{k} {self._shown[k]:.3g}" for k in SHOWN if k in self._shown)
        if _display:
            _display.update(self.stage, step, total, text)
        now = time.monotonic()
        if now - self._ui_time >= UI_EVERY or step == total:
            self._ui_time = now
            with harmless("progress"):
                self._show_in_ui(100.0 * step / max(total, 1))
        if now - self._log_time >= LINE_EVERY:
            from prefect.logging import get_run_logger

            self._log_time = now
            get_run_logger().info("%s %d/%d %s", self.stage, step, total, text)

    def _show_in_ui(self, percent: float) -> None:
        from prefect.artifacts import create_progress_artifact, update_progress_artifact

        if self._artifact is None:
            self._artifact = create_progress_artifact(
                progress=percent, key=f"{self.stage}-progress", description=self.stage
            )
        else:
            update_progress_artifact(artifact_id=self._artifact, progress=percent)

    def __exit__(self, *_: object) -> None:
        if _display:
            _display.close()
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


def show_on(console: PlainConsole | None) -> None:
    """Set the console of this process's progress; None, as in a worker, shows none."""
    global _display  # noqa: PLW0603  (one process has one terminal)
    if console is None:
        _display = None
    else:
        _display = BarDisplay(console) if console.is_terminal else LineDisplay(console)


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Log errors in the block as warnings: a failed display must not fail a stage."""
    try:
        yield
    except Exception as error:
        from prefect.logging import get_run_logger

        get_run_logger().warning("could not show %s in Prefect: %s", what, error)


class Display(Protocol):
    """Progress in a terminal."""

    def update(self, stage: str, step: int, total: int, text: str) -> None:
        """Show that `stage` has done `step` of `total`."""

    def close(self) -> None:
        """End the display of a stage."""


class BarDisplay:
    """A live bar with an ETA, for an interactive terminal."""

    def __init__(self, console: PlainConsole) -> None:
        self._progress = Progress(
            text_column("{task.description:<22}"), BarColumn(24),
            text_column("{task.completed:>5.0f}/{task.total:<5.0f} ETA"), TimeRemainingColumn(),
            text_column("{task.fields[text]}"), console=console, transient=True,
        )  # fmt: skip
        self._task: TaskID | None = None

    def update(self, stage: str, step: int, total: int, text: str) -> None:
        """Move the bar."""
        if self._task is None:
            self._task = self._progress.add_task(stage, completed=step, total=total, text=text)
            self._progress.start()
        self._progress.update(self._task, completed=step, total=total, text=text)

    def close(self) -> None:
        """Remove the bar."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.stop()
            self._task = None


class LineDisplay:
    """A line with an ETA every few seconds, for logs and pipes."""

    def __init__(self, console: PlainConsole) -> None:
        self._console = console
        self._started = self._printed = 0.0
        self._first = 0

    def update(self, stage: str, step: int, total: int, text: str) -> None:
        """Print a line if one is due."""
        now = time.monotonic()
        if not self._first:
            self._started, self._first = now, step
        elif now - self._printed < LINE_EVERY and step < total:
            return
        self._printed = now
        # The clock starts at the first step, which may resume earlier work.
        left = (now - self._started) / max(step - self._first, 1) * (total - step)
        eta = minutes(left) if step > self._first else "-:--"
        self._console.print(f"{stage:<22} {step:>5}/{total:<5} ETA {eta}  {text}")

    def close(self) -> None:
        """Restart the clock for the next stage."""
        self._started = self._printed = 0.0
        self._first = 0


def minutes(seconds: float) -> str:
    """Format a duration as `m:ss`."""
    return f"{int(seconds // 60)}:{int(seconds % 60):02d}"
