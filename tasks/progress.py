"""Shows a stage's progress: in the terminal, in Prefect's UI, and in the run's log."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, Protocol, Self

from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.logging import get_run_logger
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

if TYPE_CHECKING:
    from tasks.metrics import StageMetrics

#: Metrics worth a place in one line, in this order.
SHOWN = ("loss", "accuracy", "reward", "kl", "entropy", "tokens", "pairs")
LINE_EVERY = 5.0
UI_EVERY = 3.0


class Display(Protocol):
    """Where the terminal's progress goes."""

    def update(self, stage: str, step: int, total: int, text: str) -> None:
        """Show that `stage` has done `step` of `total`."""

    def close(self) -> None:
        """The stage has ended."""


class BarDisplay:
    """A live bar with an ETA, for a terminal."""

    def __init__(self, console: Console) -> None:
        self._progress = Progress(
            TextColumn("{task.description:<22}"), BarColumn(24),
            TextColumn("{task.completed:>5.0f}/{task.total:<5.0f} ETA"), TimeRemainingColumn(),
            TextColumn("{task.fields[text]}"), console=console, transient=True,
        )  # fmt: skip
        self._task: TaskID | None = None

    def update(self, stage: str, step: int, total: int, text: str) -> None:
        """Move the bar."""
        if self._task is None:
            self._task = self._progress.add_task(stage, completed=step, total=total, text=text)
            self._progress.start()
        self._progress.update(self._task, completed=step, total=total, text=text)

    def close(self) -> None:
        """Take the bar away."""
        if self._task is not None:
            self._progress.remove_task(self._task)
            self._progress.stop()
            self._task = None


class LineDisplay:
    """A line every few seconds, for logs and pipes."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._started = self._printed = 0.0
        self._first = 0

    def update(self, stage: str, step: int, total: int, text: str) -> None:
        """Print a line if the last is old enough."""
        now = time.monotonic()
        if not self._first:
            self._started, self._first = now, step
        elif now - self._printed < LINE_EVERY and step < total:
            return
        self._printed = now
        # The first step says nothing of the speed: it is where the clock starts.
        left = (now - self._started) / max(step - self._first, 1) * (total - step)
        eta = f"{int(left // 60)}:{int(left % 60):02d}" if step > self._first else "-:--"
        self._console.print(f"{stage:<22} {step:>5}/{total:<5} ETA {eta}  {text}", highlight=False)

    def close(self) -> None:
        """Start the clock anew for the next stage."""
        self._started = self._printed = 0.0
        self._first = 0


_display: Display | None = None


def show_on(console: Console | None) -> None:
    """Show progress on this console from now on; None shows none (a worker has nobody to look)."""
    global _display  # noqa: PLW0603  (one process has one terminal)
    if console is None:
        _display = None
    else:
        _display = BarDisplay(console) if console.is_terminal else LineDisplay(console)


@contextmanager
def harmless(what: str) -> Iterator[None]:
    """Let nothing that only *shows* work stop the work: an API that is away for a moment, say."""
    try:
        yield
    except Exception as error:
        get_run_logger().warning("could not show %s in Prefect: %s", what, error)


class StageProgress:
    """Progress of one task run: terminal, Prefect progress artifact, run log, trackers."""

    def __init__(self, stage: str, metrics: StageMetrics | None = None) -> None:
        self.stage = stage
        self._metrics = metrics
        self._shown: dict[str, float] = {}
        self._artifact: Any = None
        self._ui_time = self._log_time = 0.0

    def __enter__(self) -> Self:
        return self

    def __call__(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Show `step` of `total` wherever somebody may look."""
        if self._metrics:
            self._metrics.log(step, metrics)
        # Trainers tell their metrics every few steps; those of the last time stay in sight.
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
            self._log_time = now
            get_run_logger().info("%s %d/%d %s", self.stage, step, total, text)

    def _show_in_ui(self, percent: float) -> None:
        if self._artifact is None:
            self._artifact = create_progress_artifact(
                progress=percent, key=f"{self.stage}-progress", description=self.stage
            )
        else:
            update_progress_artifact(artifact_id=self._artifact, progress=percent)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if _display:
            _display.close()
        if self._metrics:
            self._metrics.close()
