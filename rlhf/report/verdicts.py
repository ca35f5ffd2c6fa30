"""The gates' verdicts as tables: rules in words, and the comparison with the champion."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

from rlhf.gates import NOT_JUDGED, NOT_MEASURED, Check, Verdict
from rlhf.report.metric_words import metric_name
from rlhf.report.text import exact, interval, number, number_of, short
from rlhf.report.trust import look

#: Numbers of a bound in words.
_NUMBER = re.compile(r"-?\d+(?:\.\d+)?")


class CheckRow(NamedTuple):
    """One rule with what was measured."""

    rule: str
    metric: str
    measured: str
    spread: str
    n: str
    bound: str
    css: str
    result: str
    note: str


class CheckGroup(NamedTuple):
    """Rules of one kind, with their heading; the gate's own have none."""

    heading: str
    rows: tuple[CheckRow, ...]


class VerdictView(NamedTuple):
    """A gate's decision."""

    gate: str
    css: str
    label: str
    groups: tuple[CheckGroup, ...]


def verdict_views(verdicts: Sequence[Verdict]) -> tuple[VerdictView, ...]:
    """Lay out the verdicts, each with its own rules before those on the champion."""
    return tuple(_view(verdict) for verdict in verdicts)


def _view(verdict: Verdict) -> VerdictView:
    rules, champion = (
        tuple(_row(c) for c in verdict.checks if c.kind == kind) for kind in ("rule", "champion")
    )
    against = f"Against the champion {short(verdict.champion)}"
    if text := look(verdict):
        against += f", {text}"
    groups = (CheckGroup("", rules), CheckGroup(against, champion))
    css, label = ("passed", "Approved") if verdict.approved else ("rejected", "Rejected")
    if not verdict.approved and verdict.keeps_champion:
        css, label = "kept", "Not better than the champion"
    return VerdictView(verdict.gate, css, label, tuple(g for g in groups if g.rows))


def _row(check: Check) -> CheckRow:
    limits = [float(found) for found in _NUMBER.findall(check.bound)]

    def form(value: Any) -> str:
        return _rounded(value, limits)

    css, result = ("passed", "met") if check.passed else ("missed", "not met")
    if check.passed and number_of(check.value) is None:
        css, result = "notrun", "not measured"
    if check.note.startswith(NOT_JUDGED):
        css, result = "notrun", NOT_JUDGED
    n = number_of(check.n)
    return CheckRow(
        rule=metric_name(check.metric),
        metric=check.metric,
        measured=form(check.value),
        spread=interval(check.low, check.high, form),
        n="" if n is None else number(int(n)),
        bound=check.bound,
        css=css,
        result=result,
        # The result says it already.
        note=check.note.removeprefix(NOT_MEASURED).removeprefix(NOT_JUDGED).removeprefix(": "),
    )


def _rounded(value: Any, limits: Sequence[float]) -> str:
    """Format a value with few places, but in full where rounding might hide a failure."""
    x = number_of(value)
    if x is None or abs(x) >= 1000 or any(abs(x - at) < 0.002 * max(at, 1) for at in limits):
        return exact(value)
    return (f"{x:.3f}" if abs(x) < 1 else f"{x:.4g}").replace("-", "−")
