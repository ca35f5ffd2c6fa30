"""Geometry of the charts: coordinates that the templates draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from rlhf.report.text import number, number_of, percent, percent_range

WIDTH, HEIGHT = 340, 176
LEFT, RIGHT, TOP, BOTTOM = 44, 10, 10, 24
MAX_POINTS, MAX_TIPS = 400, 120
#: Roles of estimates on other observations than the `n` of their metrics.
UNSIZED = ("baseline", "part")

#: Key of the curve, heading, unit, and the values that its axis has to cover.
PANELS: tuple[tuple[str, str, str, tuple[float, ...]], ...] = (
    ("reward", "Reward", "mean score, less what missing ends cost", ()),
    ("kl", "KL", "nats per reply, from the SFT policy", (0.0,)),
    ("entropy", "Entropy", "nats per token", ()),
    ("tokens", "Reply length", "tokens", ()),
    ("value_loss", "Value loss", "critic's squared error", (0.0,)),
    ("eos_rate", "Finished replies", "share that ends by EOS", (0.8, 1.0)),
)


@dataclass(frozen=True)
class Tick:
    """A labelled position on an axis."""

    at: float
    label: str


@dataclass(frozen=True)
class Curve:
    """A line chart of one metric, in the coordinates of its picture."""

    title: str
    unit: str
    first: str
    last: str
    lines: tuple[str, ...]
    tips: tuple[tuple[float, float, str], ...]
    end: tuple[float, float]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Interval:
    """One estimate with its confidence interval, as percentages of the track's width."""

    label: str
    role: str
    note: str
    value: str
    spread: str
    at: float
    start: float | None
    end: float | None


@dataclass(frozen=True)
class Reference:
    """A vertical line to compare estimates with."""

    at: float
    label: str
    role: str
    align: str


@dataclass(frozen=True)
class IntervalChart:
    """Estimates on one common scale."""

    rows: tuple[Interval, ...]
    references: tuple[Reference, ...]
    ticks: tuple[Tick, ...]
    groups: str = "By group"
    """Heading of the rows of groups."""


def curves_of(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Lay out the panels that have at least one finite value."""
    panels = (_curve(rows, *panel) for panel in PANELS)
    return [panel for panel in panels if panel is not None]


def interval_chart(
    estimates: Sequence[tuple[str, str, Mapping[str, Any], str]],
    references: Sequence[tuple[str, str, Any]],
    groups: str = "By group",
) -> IntervalChart | None:
    """Lay out estimates with their intervals beside reference lines.

    Estimates are (label, role, metrics, key): `key` names the estimate in the metrics, and its
    interval is `key_low` to `key_high`. References are (label, role, value). `groups` is the
    heading of the rows whose role is `group`.
    """
    known = [e for e in estimates if number_of(e[2].get(e[3])) is not None]
    lines = [(label, role, x) for label, role, v in references if (x := number_of(v)) is not None]
    if not known:
        return None
    ends = [x for _, _, metrics, key in known for x in _numbers(metrics, key)]
    ends += [x for _, _, x in lines]
    low = max(0.0, math.floor(min(ends) * 20 - 0.2) / 20)
    high = min(1.0, math.ceil(max(ends) * 20 + 0.2) / 20)

    def position(x: float) -> float:
        return round(100 * min(max((x - low) / ((high - low) or 1.0), 0.0), 1.0), 2)

    rows = []
    for label, role, metrics, key in known:
        a, b = number_of(metrics.get(f"{key}_low")), number_of(metrics.get(f"{key}_high"))
        count = number_of(metrics.get("n"))
        rows.append(
            Interval(
                label=label,
                role=role,
                note="" if count is None or role in UNSIZED else f"n = {number(int(count))}",
                value=percent(metrics.get(key)),
                spread=percent_range(a, b),
                at=position(number_of(metrics.get(key)) or 0.0),
                start=None if a is None or b is None else position(a),
                end=None if a is None or b is None else position(b),
            )
        )
    return IntervalChart(
        rows=tuple(rows),
        references=tuple(
            Reference(position(x), label and f"{label} {percent(x)}", role, _align(position(x)))
            for label, role, x in lines
        ),
        ticks=tuple(
            Tick(position(m), f"{100 * m:g} %")
            for m in nice_ticks(low, high, 5)
            if low - 1e-9 <= m <= high + 1e-9
        ),
        groups=groups,
    )


def nice_ticks(low: float, high: float, count: int, whole: bool = False) -> list[float]:
    """Return round numbers that cover [low, high] in about `count` steps."""
    span = high - low
    # Differences below the precision of floats have no ticks between them.
    if span <= max(1e-12 * max(abs(low), abs(high)), 1e-200):
        span = max(abs(high), 1.0) * 0.1
    raw = span / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next((m * power for m in (1, 2, 2.5, 5, 10) if m * power >= raw * 0.999), 10 * power)
    if whole:
        step = max(1.0, float(round(step)))
    start, stop = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(k * step, 12) for k in range(start, max(stop, start + 1) + 1)]


def _curve(
    rows: Sequence[Mapping[str, Any]], key: str, title: str, unit: str, cover: tuple[float, ...]
) -> Curve | None:
    updates = [number_of(row.get("update", i + 1)) or float(i) for i, row in enumerate(rows)]
    series = [(x, number_of(row.get(key))) for x, row in zip(updates, rows, strict=True)]
    finite = [(x, y) for x, y in series if y is not None]
    if not finite:
        return None
    ys = [y for _, y in finite]
    y_marks = nice_ticks(min(*ys, *cover, ys[0]), max(*ys, *cover, ys[0]), 4)
    x_low, x_high = updates[0], max(updates[-1], updates[0] + 1)

    def position(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / (x_high - x_low)
        up = (y - y_marks[0]) / (y_marks[-1] - y_marks[0])
        return (
            round(LEFT + across * (WIDTH - LEFT - RIGHT), 1),
            round(HEIGHT - BOTTOM - up * (HEIGHT - TOP - BOTTOM), 1),
        )

    x_marks = [m for m in nice_ticks(x_low, x_high, 5, whole=True) if x_low <= m <= x_high]
    tips = [(*position(x, y), f"update {x:g}: {number(y)}") for x, y in finite]
    return Curve(
        title=title,
        unit=unit,
        first=number(ys[0]),
        last=number(ys[-1]),
        lines=tuple(
            " ".join(f"{a:g},{b:g}" for a, b in (position(x, y) for x, y in run))
            for run in _runs(_thinned(series))
        ),
        tips=tuple(tips) if len(tips) <= MAX_TIPS else (),
        end=position(*finite[-1]),
        x_ticks=tuple(Tick(position(m, 0)[0], f"{m:g}") for m in x_marks),
        y_ticks=tuple(Tick(position(0, m)[1], tick_label(m)) for m in y_marks),
    )


def _thinned(series: list[tuple[float, float | None]]) -> list[tuple[float, float | None]]:
    """Thin a curve to the extremes of every bucket, which keeps spikes."""
    if len(series) <= MAX_POINTS:
        return series
    size = math.ceil(len(series) / (MAX_POINTS // 2))
    thinned: list[tuple[float, float | None]] = []
    for start in range(0, len(series), size):
        bucket = series[start : start + size]
        finite = [point for point in bucket if point[1] is not None]
        if not finite:
            thinned.append(bucket[0])
            continue
        ends = {min(finite, key=lambda p: p[1] or 0.0), max(finite, key=lambda p: p[1] or 0.0)}
        thinned.extend(sorted(ends))
    return thinned


def _runs(series: list[tuple[float, float | None]]) -> list[list[tuple[float, float]]]:
    """Split a curve at missing values, which are drawn as gaps."""
    runs: list[list[tuple[float, float]]] = [[]]
    for x, y in series:
        if y is None:
            runs.append([])
        else:
            runs[-1].append((x, y))
    return [run for run in runs if run]


def tick_label(mark: float) -> str:
    """Return a tick's label, exact enough to differ from its neighbour's."""
    return (f"{mark:.0e}" if 0 < abs(mark) < 1e-3 else f"{mark:g}").replace("-", "−")


def _numbers(metrics: Mapping[str, Any], key: str) -> list[float]:
    values = (number_of(metrics.get(name)) for name in (key, f"{key}_low", f"{key}_high"))
    return [value for value in values if value is not None]


def _align(at: float) -> str:
    """Return a label's alignment, which keeps it inside of the track near an end."""
    return "start" if at < 20 else "end" if at > 80 else "middle"
