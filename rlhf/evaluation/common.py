"""Parts that the evaluations share: file names, judges, points of a comparison, groups of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

EVALUATION = "evaluation.json"
SAMPLES = "samples.json"

#: Scores a reply to a prompt.
GoldScore = Callable[[Any, str], float]


def points(difference: float) -> float:
    """Return 1 for a win, 0.5 for a tie and 0 for a loss."""
    return ((difference > 0) - (difference < 0)) / 2 + 0.5


def groups_of(names: Sequence[str | None]) -> dict[str, list[int]]:
    """Return the rows of each group; a row without a name is in none."""
    groups: dict[str, list[int]] = {}
    for i, name in enumerate(names):
        if name is not None:
            groups.setdefault(name, []).append(i)
    return groups
