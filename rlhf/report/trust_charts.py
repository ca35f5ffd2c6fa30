"""Geometry of the pictures on trust: reliability, margins, the frontier of checkpoints."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, NamedTuple

from rlhf.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Tick, nice_ticks, tick_label
from rlhf.report.text import number, number_of, percent, percent_range

#: Width of a digit of a bin's size.
DIGIT = 6.5
#: Height of a reliability diagram, and of the strip below its axis with each bin's size.
TALL, STRIP = 300, 44
#: Numbers from this size on are not drawn.
LARGEST = 1e15
#: Scores of a checkpoint, and the panels' headings.
SERIES = (
    ("proxy", "Reward model", "what PPO maximises"),
    ("judge", "Judge", "what PPO never sees"),
    ("gold", "Gold", "the true score"),
)


class ReliabilityBin(NamedTuple):
    """A point with its interval, and the bar of its size below the axis."""

    x: float
    y: float
    top: float | None
    bottom: float | None
    left: float
    width: float
    bar: float
    """Height of the bar of its size."""
    size: str
    label: str


@dataclass(frozen=True)
class Reliability:
    """Share that is right over the predicted probability, by bin."""

    bins: tuple[ReliabilityBin, ...]
    line: str
    diagonal: str
    base: float
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    rows: tuple[tuple[str, ...], ...]
    """Predicted, right, interval and n of each bin, as text."""


class MarginBar(NamedTuple):
    """One class of margins: pairs ranked right, and above them those ranked wrong."""

    left: float
    width: float
    right_top: float
    right_height: float
    wrong_top: float
    wrong_height: float
    label: str


@dataclass(frozen=True)
class Margins:
    """Histogram of the differences in score between the preferred reply and the other."""

    unit: str
    bars: tuple[MarginBar, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    zero: float | None


class FrontierPoint(NamedTuple):
    """A checkpoint's place; `chosen` is the one that goes on, `stopped` where PPO was stopped."""

    x: float
    y: float
    top: float | None
    bottom: float | None
    role: str
    label: str


@dataclass(frozen=True)
class FrontierPanel:
    """One score of the checkpoints over the square root of their KL."""

    title: str
    unit: str
    role: str
    line: str
    points: tuple[FrontierPoint, ...]
    chosen: float | None
    """Where on the horizontal axis the chosen checkpoint is."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


def reliability_of(bins: Any) -> Reliability | None:
    """Lay out a reliability diagram; bins without a finite confidence and accuracy are left out."""
    known = [
        row for row in _rows(bins) if _is_share(row, "confidence") and _is_share(row, "accuracy")
    ]
    if not known:
        return None
    xs = [
        number_of(row[k]) or 0.0
        for row in known
        for k in ("confidence", "low")
        if _is_share(row, k)
    ]
    ys = [
        number_of(row[k]) or 0.0
        for row in known
        for k in ("accuracy", "accuracy_low")
        if _is_share(row, k)
    ]
    left = 0.5 if min(xs) >= 0.5 else 0.0
    y_marks = nice_ticks(min(*ys, left), 1.0, 5)
    base = TALL - BOTTOM - STRIP
    across, up = _scale(left, 1.0, LEFT, WIDTH - RIGHT), _scale(y_marks[0], 1.0, base, TOP)
    largest = max(_value(row, "n") or 0.0 for row in known) or 1.0
    laid = [_reliability_bin(row, across, up, largest) for row in known]
    return Reliability(
        bins=tuple(laid),
        line=" ".join(f"{b.x:g},{b.y:g}" for b in sorted(laid, key=lambda b: b.x)),
        diagonal=f"M{across(left)} {up(left)}L{across(1)} {up(1)}",
        base=base,
        x_ticks=tuple(Tick(across(m), percent_mark(m)) for m in nice_ticks(left, 1.0, 5)),
        y_ticks=tuple(Tick(up(m), percent_mark(m)) for m in y_marks),
        rows=tuple(
            (percent(row["confidence"]), percent(row["accuracy"]),
             percent_range(row.get("accuracy_low"), row.get("accuracy_high")), _count(row.get("n")))
            for row in known
        ),
    )  # fmt: skip


def _reliability_bin(
    row: Mapping[str, Any], across: Any, up: Any, largest: float
) -> ReliabilityBin:
    x = number_of(row["confidence"]) or 0.0
    low, high, below, above = (
        number_of(row[key]) if _is_share(row, key) else None
        for key in ("low", "high", "accuracy_low", "accuracy_high")
    )
    n = _value(row, "n")
    size = _short_count(n)
    start, end = across(x if low is None else low), across(x if high is None else high)
    spread = percent_range(below, above)
    return ReliabilityBin(
        x=across(x),
        y=up(number_of(row["accuracy"])),
        top=None if above is None else up(above),
        bottom=None if below is None else up(below),
        left=round(start + 1, 1),
        width=round(max(end - start - 2, 1.0), 1),
        bar=round((STRIP - 18) * max(n or 0.0, 0.0) / largest, 1),
        # Else it would run into its neighbour's; the table has all of them.
        size=size if end - start >= DIGIT * len(size) else "",
        label=f"predicted {percent(x)}, right {percent(row['accuracy'])}"
        + (f" ({spread})" if spread else "")
        + f", n = {_count(n)}",
    )


def margins_of(margins: Any) -> Margins | None:
    """Lay out the histogram of margins; edges that don't fit the counts give none."""
    given = margins if isinstance(margins, Mapping) else {}
    edges, right, wrong = (_list(given.get(name)) for name in ("edges", "right", "wrong"))
    ends = [x for x in map(number_of, edges) if x is not None and abs(x) < LARGEST]
    counts = [
        [min(max(number_of(n) or 0.0, 0.0), LARGEST) for n in side] for side in (right, wrong)
    ]
    if len(ends) != len(edges) or len(ends) < 2 or sorted(set(ends)) != ends:
        return None
    if any(len(side) != len(ends) - 1 for side in counts) or not any(map(any, counts)):
        return None
    highest = max(a + b for a, b in zip(*counts, strict=True))
    y_marks = nice_ticks(0, highest, 4, whole=True)
    across = _scale(ends[0], ends[-1], LEFT, WIDTH - RIGHT)
    up = _scale(0, y_marks[-1], HEIGHT - BOTTOM, TOP)
    bars = []
    for (low, high), good, bad in zip(pairwise(ends), *counts, strict=True):
        left, middle, top = across(low), up(good), up(good + bad)
        bars.append(
            MarginBar(
                round(left + 0.5, 1), round(max(across(high) - left - 1, 0.5), 1),
                middle, round(up(0) - middle, 1), top, round(middle - top, 1),
                f"{tick_label(low)} to {tick_label(high)}: "
                f"{_count(good)} right, {_count(bad)} wrong",
            )
        )  # fmt: skip
    inside = [m for m in nice_ticks(ends[0], ends[-1], 5) if ends[0] <= m <= ends[-1]]
    signed = "score of the preferred reply less that of the other"
    return Margins(
        unit=signed if ends[0] < 0 else "difference of the two replies' scores, without its sign",
        bars=tuple(bars),
        x_ticks=tuple(Tick(across(m), tick_label(m)) for m in inside),
        y_ticks=tuple(Tick(up(m), number(int(m))) for m in y_marks),
        zero=across(0) if ends[0] < 0 < ends[-1] else None,
    )


def frontier_of(watchdog: Any) -> tuple[FrontierPanel, ...]:
    """Lay out each score of the checkpoints over √KL; scores that none has are left out.

    Each score has an axis of its own, since two reward models' scores have no common unit. The
    square root follows Gao, Schulman and Hilton 2022, whose curves of gold are functions of √KL.
    """
    given = watchdog if isinstance(watchdog, Mapping) else {}
    rows = [(x, row) for row in _rows(given.get("frontier")) if (x := root_kl(row)) is not None]
    if not rows:
        return ()
    marks = nice_ticks(0.0, max(x for x, _ in rows) or 1.0, 5)
    stopped = given.get("stopped")
    ends = {
        "chosen": number_of(given.get("chosen")),
        "stopped": number_of(stopped.get("update")) if isinstance(stopped, Mapping) else None,
    }
    panels = (_panel(rows, name, title, unit, marks, ends) for name, title, unit in SERIES)
    return tuple(panel for panel in panels if panel is not None)


def frontier_rows(watchdog: Any) -> tuple[tuple[str, ...], ...]:
    """Return update, KL and every score of each checkpoint as text; the chosen one is marked."""
    given = watchdog if isinstance(watchdog, Mapping) else {}
    chosen = number_of(given.get("chosen"))
    rows = []
    for row in _rows(given.get("frontier")):
        update = number_of(row.get("update"))
        mark = " · chosen" if update is not None and update == chosen else ""
        cells = (number(row.get(name)) for name in ("kl", *(name for name, _, _ in SERIES)))
        rows.append((_count(update) + mark, *cells))
    return tuple(rows)


def root_kl(row: Mapping[str, Any]) -> float | None:
    """Return the square root of a checkpoint's KL; an estimate below zero counts as zero."""
    kl = _value(row, "kl")
    return None if kl is None else math.sqrt(max(kl, 0.0))


def _panel(
    rows: Sequence[tuple[float, Mapping[str, Any]]], name: str, title: str, unit: str,
    x_marks: Sequence[float], ends: Mapping[str, float | None],
) -> FrontierPanel | None:  # fmt: skip
    known = [(x, y, row) for x, row in rows if (y := _value(row, name)) is not None]
    if not known:
        return None
    values = [v for _, _, row in known for v in _finite(row, name, f"{name}_low", f"{name}_high")]
    y_marks = nice_ticks(min(values), max(values), 4)
    across = _scale(x_marks[0], x_marks[-1], LEFT, WIDTH - RIGHT)
    up = _scale(y_marks[0], y_marks[-1], HEIGHT - BOTTOM, TOP)
    points, chosen = [], None
    for x, y, row in known:
        update = number_of(row.get("update"))
        role = next((r for r, end in ends.items() if end is not None and end == update), "")
        chosen = across(x) if role == "chosen" else chosen
        low, high = _value(row, f"{name}_low"), _value(row, f"{name}_high")
        points.append(
            FrontierPoint(
                across(x), up(y), None if high is None else up(high),
                None if low is None else up(low), role,
                f"update {number(None if update is None else int(update))}: {number(y)} at "
                f"{number(row.get('kl'))} nats",
            )
        )  # fmt: skip
    return FrontierPanel(
        title=title, unit=unit, role=name,
        line=" ".join(f"{p.x:g},{p.y:g}" for p in points),
        points=tuple(points), chosen=chosen,
        x_ticks=tuple(Tick(across(m), tick_label(m)) for m in x_marks),
        y_ticks=tuple(Tick(up(m), tick_label(m)) for m in y_marks),
    )  # fmt: skip


def percent_mark(share: float) -> str:
    """Return a share as an axis' label."""
    return f"{100 * share:.3g} %".replace("-", "−")


def _scale(low: float, high: float, start: float, end: float) -> Any:
    """Return the function that maps [low, high] to a picture's coordinates."""
    span = (high - low) or 1.0
    return lambda value: round(start + (value - low) / span * (end - start), 1)


def _finite(row: Mapping[str, Any], *names: str) -> list[float]:
    return [x for x in (_value(row, name) for name in names) if x is not None]


def _value(row: Mapping[str, Any], name: str) -> float | None:
    """Return a number that can be drawn: finite, and not so large that differences overflow."""
    x = number_of(row.get(name))
    return x if x is not None and abs(x) < LARGEST else None


def _is_share(row: Mapping[str, Any], name: str) -> bool:
    x = number_of(row.get(name))
    return x is not None and 0 <= x <= 1


def _rows(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in _list(value) if isinstance(row, Mapping)]


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _count(n: Any) -> str:
    x = number_of(n)
    return number(None if x is None else int(x))


def _short_count(n: float | None) -> str:
    """Return a count in at most four characters, to fit below a bin."""
    if n is None:
        return ""
    for size, unit in ((1e6, "M"), (1e4, "k")):
        if n >= size:
            return f"{n / (1e6 if unit == 'M' else 1e3):.0f}{unit}"
    return f"{n:.0f}"
