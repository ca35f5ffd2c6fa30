"""Baselines by the length and format of replies, and accuracy without their help."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from rlhf.data.rows import Pair
from rlhf.evaluation.common import points
from rlhf.inference import share_of, stratified_share

#: Marks of Markdown, as the style control of Chatbot Arena counts them (Li et al. 2024), and code.
_MARKS = re.compile(
    r"""
    ^[ ]{0,8}(?:[-*+•]|\d{1,3}[.)])[ \t]+(?=\S)    # item of a list
    | ^[ ]{0,3}\#{1,6}[ \t]+\S                 # heading
    | \*\*[^*\n]+\*\* | __[^_\n]+__            # bold
    | ^[ ]{0,3}```                             # line of a code fence
    | (?<!`)`[^`\n]+`(?!`)                     # code within a line
    """,
    re.MULTILINE | re.VERBOSE,
)


def format_marks(text: str) -> int:
    """Count list items, headings, bold parts, lines of code fences and code within lines."""
    return sum(1 for _ in _MARKS.finditer(text))


def style(
    pairs: Sequence[Pair], correct: Sequence[float], prompts: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Measure what choosing by length or format gives, and accuracy where length is no help.

    `length_controlled_accuracy` is the accuracy with pairs weighted so that the chosen reply is as
    often the longer one as the shorter one: with w the share of pairs of equal length it is
    w · accuracy(equal) + (1 − w) · (accuracy(chosen longer) + accuracy(chosen shorter))/2. Choosing
    the longer reply has exactly 0.5 by it, whatever the pairs are. It is balanced accuracy
    (Brodersen et al. 2010) with the longer reply as the class. Nothing is fitted: a regression on
    the difference of lengths, as in Dubois et al. 2024, would extrapolate where one side is rare.

    Args:
        pairs: Held-out pairs; lengths are in characters.
        correct: Whether the model is right, 0.5 for a tie.
        prompts: Prompt of each pair.

    Returns:
        `baseline_longer` and `baseline_format` with intervals, `prefers_longer` (the share of pairs
        of unequal length in which the model prefers the longer one) and
        `length_controlled_accuracy`; and why one can't be computed.
    """
    differences = [len(pair.chosen) - len(pair.rejected) for pair in pairs]
    marks = [format_marks(pair.chosen) - format_marks(pair.rejected) for pair in pairs]
    metrics: dict[str, Any] = {
        **share_of([points(d) for d in differences], prompts).metrics("baseline_longer"),
        **share_of([points(d) for d in marks], prompts).metrics("baseline_format"),
    }
    unequal = [i for i, d in enumerate(differences) if d]
    sides = ["longer" if d > 0 else "shorter" if d < 0 else "equal" for d in differences]
    notes: list[str] = []
    if unequal:
        prefers = [correct[i] if differences[i] > 0 else 1 - correct[i] for i in unequal]
        own = [prompts[i] for i in unequal]
        metrics |= share_of(prefers, own).metrics("prefers_longer")
    if len({*sides} - {"equal"}) != 1:
        half = len(unequal) / len(pairs) / 2
        weights = {"equal": 1 - 2 * half, "longer": half, "shorter": half}
        controlled = stratified_share(correct, prompts, sides, weights)
        metrics |= controlled.metrics("length_controlled_accuracy")
    else:
        missing = "shorter" if "longer" in sides else "longer"
        notes.append(
            f"length_controlled_accuracy: in no pair the chosen reply is the {missing} one"
        )
    return metrics, notes
