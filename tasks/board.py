"""State of the run that this process makes, and its display: live, or a line per event.

A process makes one run at a time. Flows, tasks and the library's progress tell the board; it keeps
the run's record for `rlhf watch` and shows it. Workers have no display: there all calls do nothing.
"""

from __future__ import annotations

import json
import logging
import math
import threading
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from rich.live import Live

from rlhf import signals
from rlhf.config.pipeline import StoreConfig
from rlhf.errors import BAD_INPUT, explain, is_bad_input
from rlhf.plain_text import one_line, printable
from rlhf.report.model import RunOutcome
from tasks.console import PlainConsole, say
from tasks.eta import Eta
from tasks.run_record import (
    INTERRUPTED,
    RUNNING,
    Awaiting,
    RunRecord,
    new_record,
    remove_old,
    write_record,
)
from tasks.screen import SPARKS, length, picture

#: Seconds between two lines of progress, two writes of the record, and signs of life in a log.
LINE_EVERY, WRITE_EVERY, ALIVE_EVERY = 30.0, 2.0, 60.0
#: Values that sparklines are drawn from.
POINTS = 120
#: Logger of PPO's samples, and the longest text of one that is kept.
SAMPLES, LONGEST_SAMPLE = "rlhf.samples", 1000


class Board:
    """The run of this process: its record, the estimates of its stages, its display."""

    def __init__(self) -> None:
        self.record: RunRecord | None = None
        self._console: PlainConsole | None = None
        self._is_live = False
        self._live: Live | None = None
        self._folder: Path | None = None
        self._etas: dict[str, Eta] = {}
        self._lock = threading.RLock()
        self._stop = threading.Event()
        self._ticker: threading.Thread | None = None
        self._written = self._spoken = 0.0
        self._line_at: dict[str, tuple[float, float]] = {}

    def show_on(self, console: PlainConsole | None, *, plain: bool = False) -> None:
        """Set the console of this process's runs; None, as in a worker, shows nothing.

        Args:
            console: Where to show them.
            plain: Print lines even on a terminal.
        """
        self._console = console
        self._is_live = console is not None and console.is_terminal and not plain

    @contextmanager
    def running(
        self, name: str, stages: list[str], work_dir: Path, store: str = "",
        options: StoreConfig | None = None,
    ) -> Iterator[None]:  # fmt: skip
        """Show a run while the block runs; an error that leaves the block ends it as failed."""
        self._begin(new_record(name, stages, store, options), work_dir)
        try:
            yield
        except BaseException as error:
            is_signal = isinstance(error, KeyboardInterrupt)
            code = BAD_INPUT if is_bad_input(error) else None
            self.end(INTERRUPTED if is_signal else RunOutcome.FAILED.value, explain(error), code)
            raise
        self.end(RunOutcome.FAILED.value)

    def _begin(self, record: RunRecord, work_dir: Path) -> None:
        if self._console is None:
            return
        self._close()
        self.record = record
        self._folder = work_dir / "runs"
        self._etas, self._line_at = {}, {}
        with suppress(OSError):
            remove_old(self._folder)
        self._write(now=True)
        self._stop = threading.Event()
        self._spoken = time.monotonic()
        if self._is_live:
            self._live = Live(
                get_renderable=self._picture, console=self._console, auto_refresh=False,
                transient=True, redirect_stdout=False, redirect_stderr=False,
                vertical_overflow="crop",
            )  # fmt: skip
            self._live.start(refresh=True)
            signals.notify = self._from_signal
        self._listen(True)
        self._ticker = threading.Thread(target=self._tick, args=(self._stop,), daemon=True)
        self._ticker.start()

    def start_stage(self, name: str) -> None:
        """Note that a try of a stage begins."""
        with self._changing(name) as stage:
            if stage is None or self.record is None:
                return
            stage.state, stage.began, stage.seconds = RUNNING, time.time(), None
            stage.step = stage.total = 0
            stage.left, stage.text = None, ""
            self.record.waits, self.record.series = "", {}
            self._etas[name] = Eta(time.monotonic())
            self._line_at.pop(name, None)

    def tell(
        self, name: str, step: int, total: int, metrics: Mapping[str, float], text: str
    ) -> None:
        """Note a stage's step; the values of `metrics` go to the sparklines."""
        now = time.monotonic()
        with self._changing(name) as stage:
            if stage is None or self.record is None or name not in self._etas:
                return
            self._etas[name].tell(step, total, now)
            stage.step, stage.total, stage.text = step, total, text
            stage.left = self._etas[name].left(now)
            for key in SPARKS:
                if key in metrics and math.isfinite(metrics[key]):
                    values = self.record.series.setdefault(key, [])
                    values.append(float(metrics[key]))
                    del values[:-POINTS]
            self._progress_line(name, step, total, text, now)

    def end_stage(self, name: str, state: str, seconds: float | None, text: str) -> None:
        """Note a stage's end, which is a line in a log."""
        with self._changing(name) as stage:
            if stage is None:
                return
            stage.state, stage.seconds, stage.text, stage.left = state, seconds, text, None
            took = f" in {length(seconds)}" if seconds and seconds >= 0.5 else ""
            self._line(f"{name}: {state}{took}{'  ' if text else ''}{text}")

    def wait(self, what: str) -> None:
        """Note what the run waits for; empty when it goes on."""
        if self.record is None or self.record.waits == what:
            return
        self.record.waits = one_line(what)
        if what:
            self._line(f"waits: {self.record.waits}")
        self._write(now=True)

    @contextmanager
    def waiting(self, what: str) -> Iterator[None]:
        """Note that the run waits for something while the block runs."""
        self.wait(what)
        try:
            yield
        finally:
            self.wait("")

    def note_report(self, page: Path) -> None:
        """Note where the run's report is, for `rlhf show`."""
        if self.record is not None:
            self.record.report = printable(page)
            self._write(now=True)

    def end(
        self, state: str, reason: str = "", code: int | None = None,
        awaiting: Awaiting | None = None,
    ) -> None:  # fmt: skip
        """End the run: take the display down, and write how it ended and what it waits for."""
        if self.record is not None:
            self.record.awaiting = awaiting
            self.record.state, self.record.reason, self.record.waits = state, one_line(reason), ""
            self.record.code = code
            self._write(now=True)
        self._close()
        self.record = None

    def end_by_signal(self, state: str, code: int) -> None:
        """Write how the run ended, from a signal handler: takes no lock, prints nothing."""
        self._stop.set()
        if self.record is not None:
            self.record.state, self.record.code, self.record.waits = state, code, ""
            self.record.reason = "the same command goes on from what is done"
            for stage in self.record.stages:
                stage.state = state if stage.state == RUNNING else stage.state
            with suppress(OSError):
                if self._folder:
                    write_record(self.record, self._folder)

    def show(self, line: str, style: str = "") -> bool:
        """Print a line above the live display; False if there is none."""
        if self._live is None or self._console is None:
            return False
        say(line, style, on=self._console)
        return True

    @property
    def is_live(self) -> bool:
        """Whether a live display is on the terminal."""
        return self._live is not None

    @contextmanager
    def _changing(self, name: str) -> Iterator[Any]:
        """Give a stage of the record to change; None if it is not in one."""
        stages = self.record.stages if self.record else []
        with self._lock:
            yield next((stage for stage in stages if stage.name == name), None)
        self._write()

    def _write(self, *, now: bool = False) -> None:
        moment = time.monotonic()
        if self.record is None or self._folder is None:
            return
        if not now and moment - self._written < WRITE_EVERY:
            return
        self._written = moment
        # A full disk is told by what needs it; a path may hold bytes that JSON can't.
        with self._lock, suppress(OSError, ValueError):
            self.record.updated = time.time()
            for stage in self.record.stages:  # what is left is that of this moment, too
                if stage.left is not None and stage.name in self._etas:
                    stage.left = self._etas[stage.name].left(moment)
            write_record(self.record, self._folder)

    def _progress_line(self, name: str, step: int, total: int, text: str, now: float) -> None:
        """Print a line of progress at the first step, then every 30 s or 10 %, and at the end."""
        share = step / max(total, 1)
        at, before = self._line_at.get(name, (-math.inf, -1.0))
        due = now - at >= LINE_EVERY or share - before >= 0.1
        if self._is_live or before >= share or not (due or step >= total):
            return
        self._line_at[name] = now, share
        left = self._etas[name].left(now)
        eta = "" if step >= total else f"  ETA {length(left) or '–'}"
        self._line(f"{name}: {step}/{total}{eta}{'  ' if text else ''}{text}")

    def _line(self, text: str) -> None:
        if not self._is_live and self._console is not None:
            self._spoken = time.monotonic()
            say(text, on=self._console)

    def _tick(self, stop: threading.Event) -> None:
        """Redraw the display once a second, or give a sign of life in a log once a minute."""
        while not stop.wait(1.0):
            if self._live is not None:
                self._live.refresh()
            elif time.monotonic() - self._spoken >= ALIVE_EVERY:
                self._sign_of_life()
            if time.monotonic() - self._written >= 5 * WRITE_EVERY:
                self._write()

    def _sign_of_life(self) -> None:
        record = self.record
        stage = next((s for s in record.stages if s.state == RUNNING), None) if record else None
        if record and record.waits:
            self._line(f"still waits: {record.waits}")
        elif stage is not None and stage.began is not None:
            done = f", {stage.step}/{stage.total}" if stage.total else ""
            self._line(f"{stage.name}: at work for {length(time.time() - stage.began)}{done}")

    def _picture(self) -> Any:
        assert self.record is not None
        assert self._console is not None
        size = self._console.size
        with self._lock:
            if not self._stop.is_set():
                return picture(self.record, size.width, size.height)
        return ""

    def _from_signal(self, line: str) -> None:
        # The ticker draws it: a handler must take none of the display's locks.
        if self.record is not None:
            self.record.waits = line

    def _close(self) -> None:
        self._stop.set()
        if self._ticker is not None:
            self._ticker.join(5.0)
            self._ticker = None
        if self._live is not None:
            self._live.stop()
            self._live = None
        signals.notify = signals.to_stderr
        self._listen(False)

    def _listen(self, on: bool) -> None:
        """Start or stop to take PPO's samples, which come as records of a logger."""
        logger = logging.getLogger(SAMPLES)
        logger.handlers = [_SampleHandler()] if on else []
        logger.propagate = not on
        logger.setLevel(logging.DEBUG if on else logging.NOTSET)


class NoticeHandler(logging.StreamHandler[Any]):
    """Prints log records of the library: above a live display, else on standard error."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a record."""
        if not board.show(self.format(record)):
            super().emit(record)


def notice_handler() -> NoticeHandler:
    """Return a handler that prints log records in one line; warnings are called so."""
    handler = NoticeHandler()
    handler.setFormatter(logging.Formatter("%(prefix)s%(shown)s"))
    handler.addFilter(_add_text)
    return handler


def _add_text(record: logging.LogRecord) -> bool:
    """Set the fields `prefix` (`warning: `, or empty) and `shown` (the message) of a log record."""
    record.__dict__["shown"] = one_line(record.getMessage())
    record.__dict__["prefix"] = "warning: " if record.levelno >= logging.WARNING else ""
    return True


class _SampleHandler(logging.Handler):
    """Gives the board the last sample of PPO."""

    def emit(self, record: logging.LogRecord) -> None:
        with suppress(ValueError, TypeError):
            texts = [str(text) for text in json.loads(record.getMessage())]
            if board.record is not None:
                board.record.sample = [text[:LONGEST_SAMPLE] for text in texts[:2]]


#: Of this process.
board = Board()
