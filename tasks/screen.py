"""The picture of a run while it runs: stages, sparklines, the last sample, what it waits for.

Made of a `RunRecord` alone, so that `rlhf run`, which writes it, and `rlhf watch`, which reads it,
show the same. It fits 80 columns and 24 lines, and says more where there is more room.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from rich.console import Group, RenderableType
from rich.table import Table

from rlhf.plain_text import one_line
from rlhf.report.model import OUTCOMES, STATES
from rlhf.report.text import minutes
from tasks.console import styled
from tasks.run_record import (
    INTERRUPTED,
    KILLED,
    RUNNING,
    WAITING,
    RunRecord,
    StageProgressRecord,
)

if TYPE_CHECKING:
    from rich.text import Text

#: Metrics with a sparkline, in this order, and their labels.
SPARKS = {
    "reward": "reward", "kl": "KL", "entropy": "entropy", "tokens": "length", "loss": "loss",
    "accuracy": "accuracy",
}  # fmt: skip
_BLOCKS = "▁▂▃▄▅▆▇█"
_MARKS = {
    "Completed": "✓", "Cached": "✓", RUNNING: "▶", WAITING: "·", "NotRun": "·", "Retried": "↻",
    "AwaitingApproval": "…", "NotBetter": "✓",
}  # fmt: skip
_STYLES = {RUNNING: "bold blue", WAITING: "dim", KILLED: "bold red", INTERRUPTED: "yellow"}


def picture(record: RunRecord, width: int = 80, height: int = 24) -> RenderableType:
    """Return a run's state as it is now, in at most `height` - 1 lines."""
    now = time.time()
    parts: list[RenderableType] = [_head(record, now, width), _stages(record, now, width)]
    rest = height - 2 - len(record.stages) - bool(record.waits or record.reason)
    sparks = [
        (label, record.series[name])
        for name, label in SPARKS.items()
        if len(record.series.get(name, ())) > 1
    ]
    for label, values in sparks[: max(min(4, rest), 0)]:
        parts.append(_spark_line(label, values, width))
        rest -= 1
    if record.sample and rest >= 2:
        lines = 1 if rest < 6 else 2
        for label, text in zip(("prompt", "reply"), record.sample, strict=False):
            parts.append(_folded(label, text, width, lines))
    if record.waits or record.reason:
        word = "waits: " if record.waits else ""
        parts.append(_cut(f"{word}{record.waits or record.reason}", width, "yellow"))
    return Group(*parts)


def sparkline(values: list[float], width: int) -> str:
    """Return the last `width` values as blocks between their lowest and highest."""
    shown = values[-width:]
    finite = [v for v in shown if abs(v) < float("inf")]
    low, high = min(finite, default=0.0), max(finite, default=0.0)
    span = high - low
    last = len(_BLOCKS) - 1
    return "".join(
        _BLOCKS[round((v - low) / span * last) if span else 0] if abs(v) < float("inf") else " "
        for v in shown
    )


def style_of(state: str) -> str:
    """Return the colour of a run's or a stage's state."""
    looks = {word.value: look.style for word, look in (*OUTCOMES.items(), *STATES.items())}
    return _STYLES.get(state) or looks.get(state, "")


def length(seconds: float | None) -> str:
    """Format seconds: `3 s`, `3 min 05 s`, `2 h 14 min`; empty for None."""
    if seconds is None:
        return ""
    return f"{seconds:.0f} s" if seconds < 60 else minutes(int(seconds))


def progress_text(stage: StageProgressRecord, now: float, updated: float) -> str:
    """Return a running stage's steps and what is left of it."""
    if not stage.total:
        return ""
    text = f"{stage.step}/{stage.total}"
    if stage.left is None:
        return f"{text} ETA –"
    return f"{text} ETA {length(max(stage.left - (now - updated), 0.0))}"


def _head(record: RunRecord, now: float, width: int) -> RenderableType:
    spent = (record.updated if record.is_over else now) - record.started
    done = sum(1 for stage in record.stages if stage.state in ("Completed", "Cached"))
    about = f"  {length(max(spent, 0.0))}  {done}/{len(record.stages)} stages"
    head = styled(
        (one_line(record.name), "bold"), "  ", (record.state, style_of(record.state)), about
    )
    head.truncate(width, overflow="ellipsis")
    return head


def _stages(record: RunRecord, now: float, width: int) -> Table:
    # By hand, not by rich's ratios: columns must not jump while numbers change.
    names = max((len(stage.name) for stage in record.stages), default=0)
    table = Table.grid(padding=(0, 1))
    for size in (1, names, 12, 11, max(width - names - 28, 10)):
        table.add_column(width=size, no_wrap=True, overflow="ellipsis")
    for stage in record.stages:
        style = style_of(stage.state)
        running = stage.state == RUNNING
        spent = now - stage.began if running and stage.began and not record.is_over else None
        text = one_line(stage.text)
        if running:
            text = "  ".join(filter(None, (progress_text(stage, now, record.updated), text)))
        table.add_row(
            styled((_MARKS.get(stage.state, "✗"), style)), one_line(stage.name),
            styled((one_line(stage.state), style)),
            length(stage.seconds if stage.seconds is not None else spent), text,
        )  # fmt: skip
    return table


def _spark_line(label: str, values: list[float], width: int) -> Text:
    line = sparkline(values, min(width - 24, 60))
    return styled((f"  {label:<9}", "dim"), (line, "cyan"), f" {values[-1]:.3g}")


def _folded(label: str, text: str, width: int, lines: int) -> Text:
    """Return one or two lines of a text, without its ends of lines."""
    shown = one_line(text)
    room = (width - 11) * lines
    if len(shown) > room:
        shown = f"{shown[: room - 1]}…"
    first, second = shown[: width - 11], shown[width - 11 :]
    rest = f"\n{'':<11}{second}" if second else ""
    folded = styled((f"  {label:<9}", "dim"), first, rest)
    folded.no_wrap, folded.overflow = True, "ellipsis"
    return folded


def _cut(text: str, width: int, style: str) -> Text:
    line = styled((one_line(text), style))
    line.truncate(width, overflow="ellipsis")
    return line
