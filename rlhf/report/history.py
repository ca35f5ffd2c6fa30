"""History of a model line: its retrainings, promotions and rollbacks, and the page that shows them.

Plain data without a store: `tasks/history.py` reads it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import datetime
from typing import Any, NamedTuple

from rlhf.report.charts import BOTTOM, HEIGHT, LEFT, RIGHT, TOP, WIDTH, Tick, nice_ticks, tick_label
from rlhf.report.model import OUTCOMES, Look, RunOutcome
from rlhf.report.render import environment
from rlhf.report.symptoms import value_of
from rlhf.report.text import (
    MISSING,
    duration,
    interval,
    moment,
    number,
    percent,
    percent_range,
    short,
)

#: Outcomes of entries that no run has made.
BY_HAND, ROLLED_BACK = "PromotedByHand", "RolledBack"
_LOOKS: Mapping[str, Look] = {
    **{str(outcome): look for outcome, look in OUTCOMES.items()},
    BY_HAND: Look("promoted", "Promoted by a person", "green"),
    ROLLED_BACK: Look("rejected", "Rolled back to this one", "yellow"),
}
_UNKNOWN = Look("notrun", "Unknown", "dim")
#: Outcomes after which the policy was the champion.
_CHAMPIONS = (RunOutcome.PROMOTED, BY_HAND, ROLLED_BACK)

#: Metrics of an entry: name, heading, unit, values that an axis has to cover, whether it is a
#: share.
METRICS: tuple[tuple[str, str, str, tuple[float, ...], bool], ...] = (
    ("judge_win_rate", "Wins by the judge", "share of replies better than SFT's", (0.5,), True),
    ("win_rate", "Wins by the reward model", "share of replies better than SFT's", (0.5,), True),
    ("gold_win_rate", "Wins by gold", "share of replies better than SFT's", (0.5,), True),
    ("champion_win_rate", "Wins over the champion", "of its time", (0.5,), True),
    ("reward_gain", "Gain in reward", "over SFT; each by its own reward model", (0.0,), False),
    ("kl", "KL", "nats per reply, from the SFT policy", (0.0,), False),
    ("eos_rate", "Finished replies", "share that ends by EOS", (1.0,), True),
    ("tokens", "Reply length", "tokens", (0.0,), False),
    ("accuracy", "Accuracy of the reward model", "on held-out pairs", (0.5,), True),
    ("pairs", "Pairs", "to train on", (0.0,), False),
)


@dataclass(frozen=True)
class Entry:
    """A retraining that was decided upon, or a promotion or rollback by a person."""

    line: str
    when: str
    """Time of the promotion, or else of the run's start, in ISO 8601."""
    outcome: str
    policy: str | None = None
    run: str = ""
    reason: str = ""
    by: str = ""
    seconds: float | None = None
    """Time of its stages, each in the run that did its work; None if not known."""
    metrics: Mapping[str, float] = field(default_factory=dict[str, float])
    """By the names of `METRICS`, with `_low` and `_high`; also `reward`, `reward_before`, `n`."""
    data: str | None = None
    """Digest of the dataset."""
    source: str = ""
    findings: tuple[str, ...] = ()
    """Findings of the data card."""
    drift: tuple[str, ...] = ()
    """Warnings of drift against the data of the champion of that time."""
    changes: tuple[str, ...] = ()
    """What differs in the data from those of the entry before."""
    report: str | None = None
    """Digest of the run's report."""
    is_champion: bool = False
    """Whether the policy is the champion now, by this entry."""

    @property
    def look(self) -> Look:
        """Icon, label and colour of the outcome."""
        return _LOOKS.get(self.outcome, _UNKNOWN)

    @property
    def was_champion(self) -> bool:
        """Whether the policy was the champion from then on."""
        return self.outcome in _CHAMPIONS

    @property
    def wins(self) -> tuple[str, str]:
        """Scorer of the wins over SFT (`judge`, `reward` or empty), and its metric."""
        for scorer, name in (("judge", "judge_win_rate"), ("reward", "win_rate")):
            if name in self.metrics:
                return scorer, name
        return "", ""

    def as_json(self) -> dict[str, Any]:
        """Return it for programs."""
        return {**asdict(self), "metrics": dict(self.metrics)}


def with_changes(entries: Sequence[Entry]) -> list[Entry]:
    """Return entries of a line, the oldest first, with what each changed in the data."""
    found: list[Entry] = []
    before: Entry | None = None
    for entry in entries:
        if entry.data is None:
            found.append(entry)
            continue
        changes = tuple(_data_changes(before, entry)) if before else ()
        found.append(replace(entry, changes=changes))
        before = entry
    return found


def render_history(entries: Sequence[Entry], store: str) -> str:
    """Render the history of one or several lines as HTML with all of its text escaped.

    Args:
        entries: Of all lines, the oldest first.
        store: The store's address.
    """
    lines = [*dict.fromkeys(entry.line for entry in entries)]
    views = [_line_view(name, [e for e in entries if e.line == name]) for name in lines]
    sections = [(view.id, view.name, True) for view in views]
    return (
        environment()
        .get_template("history.html")
        .render(lines=views, sections=sections, store=store, count=len(entries))
    )


class Point(NamedTuple):
    """A measured value of an entry, in the coordinates of its picture."""

    x: float
    y: float
    low: float | None
    high: float | None
    tip: str
    was_champion: bool


@dataclass(frozen=True)
class Panel:
    """A chart of one metric over time."""

    title: str
    unit: str
    first: str
    last: str
    line: str
    """The champions' values, as the points of a polyline."""
    points: tuple[Point, ...]
    x_ticks: tuple[Tick, ...]
    y_ticks: tuple[Tick, ...]


@dataclass(frozen=True)
class Row:
    """An entry as text."""

    entry: Entry
    look: Look
    when: str
    figures: tuple[tuple[str, str], ...]
    notes: tuple[str, ...]


@dataclass(frozen=True)
class LineView:
    """A model line on the page."""

    id: str
    name: str
    champion: Row | None
    panels: tuple[Panel, ...]
    rows: tuple[Row, ...]
    """The newest first."""


def figures_of(entry: Entry) -> Iterator[tuple[str, str]]:
    """Yield heading and text of an entry's main figures, those that were measured."""
    metrics = entry.metrics
    scorer, name = entry.wins
    if scorer:
        by = "judge" if scorer == "judge" else "reward model"
        yield f"Wins by the {by}", _with_range(metrics, name, percent, percent_range)
    if "champion_win_rate" in metrics:
        shown = _with_range(metrics, "champion_win_rate", percent, percent_range)
        yield "Wins over the champion", shown
    if "reward" in metrics:
        before = metrics.get("reward_before")
        was = "" if before is None else f" (SFT {number(before)})"
        yield "Reward", f"{number(metrics['reward'])}{was}"
    if "kl" in metrics:
        yield "KL", number(metrics["kl"])
    if "eos_rate" in metrics:
        yield "EOS", percent(metrics["eos_rate"])
    if (pairs := value_of(metrics.get("pairs"))) is not None:
        yield "Pairs", number(int(pairs))
    if entry.seconds is not None:
        yield "Time", duration(entry.seconds)


def _with_range(metrics: Mapping[str, float], name: str, form: Any, ends: Any) -> str:
    spread = ends(metrics.get(f"{name}_low"), metrics.get(f"{name}_high"))
    return f"{form(metrics[name])}{f' ({spread})' if spread else ''}"


def _line_view(name: str, entries: Sequence[Entry]) -> LineView:
    rows = [_row(entry) for entry in entries]
    champion = next((row for row in reversed(rows) if row.entry.is_champion), None)
    panels = [_panel(entries, *each) for each in METRICS]
    return LineView(
        id="line-" + (re.sub(r"[^\w.-]+", "-", name) or "-"), name=name, champion=champion,
        panels=tuple(panel for panel in panels if panel is not None), rows=tuple(reversed(rows)),
    )  # fmt: skip


def _row(entry: Entry) -> Row:
    notes = [*entry.changes, *(f"drift: {line}" for line in entry.drift)]
    return Row(
        entry=entry, look=entry.look, when=moment(entry.when), figures=tuple(figures_of(entry)),
        notes=tuple(notes),
    )  # fmt: skip


def _panel(
    entries: Sequence[Entry], key: str, title: str, unit: str, cover: tuple[float, ...],
    is_share: bool,
) -> Panel | None:  # fmt: skip
    """Lay out one metric over time; None with fewer than two values."""
    known = [
        (at, value, entry)
        for entry in entries
        if (value := value_of(entry.metrics.get(key))) is not None
        and (at := _seconds(entry.when)) is not None
    ]
    if len(known) < 2:
        return None
    ends = [
        x
        for _, value, entry in known
        for x in (value, *(value_of(entry.metrics.get(f"{key}_{end}")) for end in ("low", "high")))
        if x is not None
    ]
    marks = nice_ticks(min(*ends, *cover), max(*ends, *cover), 4)
    first, last = min(at for at, _, _ in known), max(at for at, _, _ in known)
    form = percent if is_share else number

    def across(at: float) -> float:
        share = (at - first) / ((last - first) or 1.0)
        return round(LEFT + 6 + share * (WIDTH - LEFT - RIGHT - 12), 1)

    def up(value: float) -> float:
        share = (value - marks[0]) / ((marks[-1] - marks[0]) or 1.0)
        return round(HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM), 1)

    points = []
    for at, value, entry in known:
        low, high = (value_of(entry.metrics.get(f"{key}_{end}")) for end in ("low", "high"))
        spread = interval(low, high, form)
        tip = f"{entry.when[:10]} {short(entry.policy)} {entry.look.label}: {form(value)}"
        points.append(
            Point(
                across(at), up(value), None if low is None else up(low),
                None if high is None else up(high), f"{tip}{f' ({spread})' if spread else ''}",
                entry.was_champion,
            )
        )  # fmt: skip
    labels = [tick_label(100 * mark) + " %" if is_share else tick_label(mark) for mark in marks]
    return Panel(
        title=title, unit=unit, first=form(known[0][1]), last=form(known[-1][1]),
        line=" ".join(f"{p.x:g},{p.y:g}" for p in points if p.was_champion),
        points=tuple(points), x_ticks=_dates(first, last, across),
        y_ticks=tuple(
            Tick(up(mark), label) for mark, label in zip(marks, labels, strict=True)
        ),
    )  # fmt: skip


def _dates(first: float, last: float, across: Any) -> tuple[Tick, ...]:
    """Return the first and the last day, and one between them if there is room."""
    span = last - first
    share = (0.0, 0.5, 1.0) if span >= 2 * 86400 else (0.0, 1.0) if span >= 86400 else (0.0,)
    ticks = []
    for part in share:
        day = datetime.fromtimestamp(first + part * span).astimezone()
        ticks.append(Tick(across(first + part * span), f"{day.day} {day:%b}"))
    return tuple(ticks)


def _seconds(when: str) -> float | None:
    try:
        return datetime.fromisoformat(when).timestamp()
    except (ValueError, OverflowError, OSError):
        return None


def _data_changes(before: Entry, entry: Entry) -> Iterator[str]:
    """Yield what of the data differs from those of the entry before, a sentence each."""
    if before.data == entry.data:
        yield "the same data"
        return
    if before.source != entry.source:
        yield f"source {before.source or MISSING} → {entry.source or MISSING}"
    was, now = (value_of(each.metrics.get("pairs")) for each in (before, entry))
    if was is not None and now is not None:
        gain = f"{int(now - was):+,}" if now != was else "as many"
        yield f"pairs {int(was):,} → {int(now):,} ({gain})"
    old, new = ({_without_figures(f): f for f in each.findings} for each in (before, entry))
    yield from (f"new: {new[key]}" for key in new if key not in old)
    yield from (f"gone: {old[key]}" for key in old if key not in new)


def _without_figures(finding: str) -> str:
    """Return a finding without its numbers, which differ from week to week."""
    return re.sub(r"\d[\d,.\u2009]*", "#", finding)
