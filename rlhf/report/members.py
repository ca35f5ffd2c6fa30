"""The members of a reward model: accuracy by their disagreement, and where it is largest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from rlhf.report.charts import IntervalChart, interval_chart
from rlhf.report.reward_model import Figure, signed
from rlhf.report.text import number, number_of, percent, percent_range, text_of

MAX_PARTS, MAX_EXAMPLES = 8, 8
_RANKED: Mapping[Any, str] = {1: "right", 0.5: "as equal", 0: "wrong"}


class Disputed(NamedTuple):
    """One held-out pair on which the members disagree."""

    disagreement: str
    margin: str
    ranked: str
    """`right`, `wrong` or `as equal`."""
    parts: tuple[tuple[str, str], ...]
    """Pairs of heading and text."""


@dataclass(frozen=True)
class MembersView:
    """Parts of the members' evaluation that were measured."""

    chart: IntervalChart | None = None
    css: str = "notrun"
    headline: str = ""
    """Whether disagreement tells errors."""
    evidence: str = ""
    figures: tuple[Figure, ...] = ()
    disputed: tuple[Disputed, ...] = ()


def members_view(model: Mapping[str, Any] | None) -> MembersView | None:
    """Lay out the part on members of a reward model's evaluation; None without members."""
    found = (model or {}).get("members")
    if not isinstance(found, Mapping):
        return None
    parts = _rows(found.get("by_disagreement"))[:MAX_PARTS]
    css, headline, evidence = _reading(parts)
    lines = [("coin", "coin", 0.5), ("overall", "ceiling", (model or {}).get("accuracy"))]
    return MembersView(
        chart=interval_chart([_estimate(part) for part in parts], lines, groups=""),
        css=css,
        headline=headline,
        evidence=evidence,
        figures=_figures(found),
        disputed=tuple(_disputed(row) for row in _rows(found.get("examples"))[:MAX_EXAMPLES]),
    )


def _estimate(part: Mapping[str, Any]) -> tuple[str, str, Mapping[str, Any], str]:
    label = f"Disagreement {number(part.get('low'))}–{number(part.get('high'))}"
    return label, "group", part, "accuracy"


def _reading(parts: Sequence[Mapping[str, Any]]) -> tuple[str, str, str]:
    """Return whether pairs with much disagreement are wrong more often, beyond their intervals."""
    if len(parts) < 2:
        return "notrun", "Too few pairs to tell whether disagreement foretells errors.", ""
    least, most = parts[0], parts[-1]
    shown = [
        f"{percent(part.get('accuracy'))} "
        f"({percent_range(part.get('accuracy_low'), part.get('accuracy_high')) or 'no interval'})"
        for part in (least, most)
    ]
    evidence = (
        f"Right where the members agree best: {shown[0]}; where they agree least: {shown[1]}."
    )
    if _is_below(most, least):
        return "passed", "Disagreement foretells errors.", evidence
    if _is_below(least, most):
        return "missed", "Disagreement is larger where it is right.", evidence
    return "notrun", "Disagreement does not clearly foretell errors.", evidence


def _is_below(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    high, low = number_of(one.get("accuracy_high")), number_of(other.get("accuracy_low"))
    return high is not None and low is not None and high < low


def _figures(found: Mapping[str, Any]) -> tuple[Figure, ...]:
    each = found.get("accuracies")
    known = [x for v in each if (x := number_of(v)) is not None] if isinstance(each, list) else []
    heads = number_of(found.get("heads"))
    spread = percent_range(found.get("accuracy_low"), found.get("accuracy_high"))
    figures = [
        Figure("Members", number(None if heads is None else int(heads)), "heads on one base"),
        Figure("Accuracy of their mean", percent(found.get("accuracy")), spread),
        Figure("Accuracy of each", percent_range(min(known), max(known)) if known else number(None),
               "lowest to highest"),
        Figure("Mean disagreement", number(found.get("disagreement_mean")),
               "on a pair, in deviations of the scores"),
    ]  # fmt: skip
    return tuple(figure for figure in figures if figure.value != number(None))


def _disputed(row: Mapping[str, Any]) -> Disputed:
    names = ("Prompt", "prompt"), ("Preferred", "chosen"), ("Other", "rejected")
    return Disputed(
        disagreement=number(row.get("disagreement")),
        margin=signed(row.get("margin")),
        ranked=_RANKED.get(number_of(row.get("right")), "–"),
        parts=tuple((head, text_of(row[key])) for head, key in names if row.get(key) is not None),
    )


def _rows(value: Any) -> list[Mapping[str, Any]]:
    return [row for row in value if isinstance(row, Mapping)] if isinstance(value, list) else []
