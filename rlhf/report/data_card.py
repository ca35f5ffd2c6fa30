"""The data card's figures as lists and charts for the report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf.report.charts import (
    BOTTOM,
    HEIGHT,
    LEFT,
    RIGHT,
    TOP,
    WIDTH,
    IntervalChart,
    Tick,
    interval_chart,
    nice_ticks,
)
from rlhf.report.text import number, number_of, percent

#: Most bars, slices of a column, and columns of slices.
MAX_BARS = 12
MAX_SLICES = 15
MAX_COLUMNS = 3
TEXTS = ("prompt", "chosen", "rejected")
SIDES = ("before", "after")
_EDGES = {str(2**power) for power in range(64)}
QUANTILES = (("p5", "5 %"), ("median", "median"), ("p95", "95 %"), ("longest", "longest"))


class Bar(NamedTuple):
    """One bar; `width` is a percentage of the longest one's."""

    label: str
    value: str
    width: float
    note: str = ""


@dataclass(frozen=True)
class Histogram:
    """Distributions of lengths as lines over powers of two, and their quantiles."""

    lines: tuple[tuple[str, str], ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]
    heads: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Any, ...]], ...]


@dataclass(frozen=True)
class DriftChart:
    """Lengths of one kind of text in two datasets, as lines over classes a factor √2 apart."""

    title: str
    lines: tuple[tuple[str, str], ...]
    """Pairs of `before` or `after`, and the points."""
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class CardView:
    """Parts of a data card that were measured; without a card all are empty."""

    findings: tuple[tuple[str, str], ...] = ()
    """Pairs of level and sentence."""
    left_out: tuple[Bar, ...] = ()
    shortcuts: IntervalChart | None = None
    agreement: IntervalChart | None = None
    slices: tuple[tuple[str, IntervalChart | None], ...] = ()
    lengths: Histogram | None = None
    languages: tuple[Bar, ...] = ()


def data_card(card: Mapping[str, Any] | None) -> CardView:
    """Lay out a data card (`card.json`); parts that are missing or of a wrong type are empty."""
    if not card:
        return CardView()
    reasons = [
        (str(r.get("reason")), _number(r.get("rows")), "" if r.get("is_choice") else "a fault")
        for r in map(_mapping, _list(card.get("left_out")))
    ]
    languages = [
        (str(code), _number(_mapping(rate).get("share")), "")
        for code, rate in _mapping(card.get("languages")).items()
    ]
    findings = map(_mapping, _list(card.get("findings")))
    slices = [*_mapping(card.get("slices")).items()][:MAX_COLUMNS]
    return CardView(
        findings=tuple((str(f.get("level")), str(f.get("text"))) for f in findings),
        left_out=_bars(reasons, lambda rows: number(int(rows))),
        shortcuts=_shortcuts(card),
        agreement=_agreement(card),
        slices=tuple((str(column), _slices(_mapping(values))) for column, values in slices),
        lengths=_histogram(_mapping(card.get("lengths"))),
        languages=_bars(languages, percent),
    )


def drift_charts(drift: Mapping[str, Any] | None) -> tuple[DriftChart, ...]:
    """Lay out the lengths of each kind of text before and after; what is no shares is left out."""
    charts = []
    for kind, sides in _mapping((drift or {}).get("lengths")).items():
        shares = {
            side: {k: share for k, x in enumerate(_list(values)) if (share := _number(x)) > 0}
            for side, values in _mapping(sides).items()
            if side in SIDES
        }
        if set(shares) != set(SIDES) or not all(shares.values()):
            continue
        low = min(min(bins) for bins in shares.values())
        high = max(low + 1, *(max(bins) for bins in shares.values()))
        step = -(-(high - low) // 6)
        # A class is named by its middle.
        labels = {k: number(round(2 ** (k / 2) - 1)) for k in range(low, high + 1, step)}
        ordered = {side: shares[side] for side in SIDES}
        charts.append(DriftChart(str(kind), *_lines(ordered, low, high, labels)))
    return tuple(charts)


def _shortcuts(card: Mapping[str, Any]) -> IntervalChart | None:
    estimates = [
        ("The longer reply", "main", _mapping(card.get("longer")), "share"),
        ("The reply in the first column", "main", _mapping(card.get("position")), "share"),
    ]
    for name, bias in _mapping(card.get("formats")).items():
        wins, alone = (_mapping(_mapping(bias).get(k)) for k in ("wins", "wins_not_longer"))
        estimates.append((f"The reply with {name}", "main", wins, "share"))
        estimates.append((f"– where it is not the longer one ({name})", "baseline", alone, "share"))
    return interval_chart(estimates, [("coin", "coin", 0.5)])


def _agreement(card: Mapping[str, Any]) -> IntervalChart | None:
    people = _mapping(card.get("annotators"))
    repeats = _mapping(_mapping(card.get("repeats")).get("pairwise"))
    estimates = [
        ("Two votes for one pair", "main", repeats, "share"),
        ("Two annotators", "main", _mapping(people.get("agreement")), "share"),
    ]
    for row in map(_mapping, _list(people.get("rows"))[:MAX_SLICES]):
        agreement = _mapping(row.get("agreement"))
        estimates.append((f"{row.get('name')} with the others", "baseline", agreement, "share"))
    return interval_chart(estimates, [("coin", "coin", 0.5)])


def _slices(values: Mapping[str, Any]) -> IntervalChart | None:
    shown = [*values.items()][:MAX_SLICES]
    estimates = [(str(name), "main", _mapping(rate), "share") for name, rate in shown]
    return interval_chart(estimates, [("coin", "coin", 0.5)])


def _bars(rows: Sequence[tuple[str, float, str]], form: Any) -> tuple[Bar, ...]:
    longest = max((value for _, value, _ in rows), default=0.0) or 1.0
    bars = [Bar(label, form(x), round(100 * x / longest, 1), note) for label, x, note in rows]
    more = len(bars) - MAX_BARS
    rest = (Bar(f"{more} more", form(sum(x for _, x, _ in rows[MAX_BARS:])), 0.0),)
    return (*bars[:MAX_BARS], *(rest if more > 0 else ()))


def _histogram(lengths: Mapping[str, Any]) -> Histogram | None:
    shares: dict[str, dict[int, float]] = {}
    for name in TEXTS:
        counts = _mapping(_mapping(lengths.get(name)).get("histogram"))
        # JSON has no integers as keys. 256 stands for 128 to 255.
        edges = {int(key): n for key, n in counts.items() if key in _EDGES}
        bins = {edge.bit_length() - 1: _number(n) for edge, n in edges.items()}
        if total := sum(bins.values()):
            shares[name] = {k: n / total for k, n in bins.items()}
    if not shares:
        return None
    low = min(min(bins) for bins in shares.values())
    high = max(low + 1, *(max(bins) for bins in shares.values()))
    step = -(-(high - low) // 6)
    labels = {k: f"<{number(2**k)}" for k in range(low, high + 1, step)}
    lines, x_ticks, y_ticks = _lines(shares, low, high, labels)
    rows = [(name, _mapping(_mapping(lengths[name]).get("quantiles"))) for name in shares]
    return Histogram(
        lines=lines,
        x_ticks=x_ticks,
        y_ticks=y_ticks,
        heads=tuple(head for _, head in QUANTILES),
        rows=tuple((name, tuple(q.get(key) for key, _ in QUANTILES)) for name, q in rows),
    )


def _lines(
    shares: Mapping[str, Mapping[int, float]], low: int, high: int, labels: Mapping[int, str]
) -> tuple[tuple[tuple[str, str], ...], tuple[Tick, ...], tuple[Tick, ...]]:
    """Lay out distributions over classes; return the lines by name, and the ticks of both axes."""
    marks = nice_ticks(0, max(max(bins.values()) for bins in shares.values()), 4)

    def x(place: float) -> float:
        return round(LEFT + (place - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def y(share: float) -> float:
        return round(HEIGHT - BOTTOM - share / marks[-1] * (HEIGHT - TOP - BOTTOM), 1)

    lines = tuple(
        (name, " ".join(f"{x(k):g},{y(bins.get(k, 0)):g}" for k in range(low, high + 1)))
        for name, bins in shares.items()
    )
    x_ticks = tuple(Tick(x(place), label) for place, label in labels.items())
    return lines, x_ticks, tuple(Tick(y(mark), f"{100 * mark:g} %") for mark in marks)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, list | tuple) else ()


def _number(value: Any) -> float:
    return number_of(value) or 0.0
