"""Scores and thumbs of replies: read from cells, and which end of a scale is best."""

from __future__ import annotations

import contextlib
import math
import re
from collections.abc import Sequence
from typing import Any

from rlhf.data.columns import Row, filled_cells, is_missing
from rlhf.data.records import LeftOutError

#: Words in names of scores of which the lowest is best, and those that turn them round.
_LOWER_IS_BETTER = frozenset(
    ("rank", "ranks", "ranking", "rankings", "position", "positions", "place", "loss", "losses",
     "cost", "costs", "error", "errors", "penalty", "penalties", "perplexity", "ppl", "nll",
     "distance", "toxic", "toxicity", "harm", "harmful", "harmfulness", "unsafe", "violation",
     "violations", "bad", "badness", "spam", "flagged", "hallucination", "hallucinations",
     "rejected")
)  # fmt: skip
_TURNED = frozenset(("neg", "negative", "negated", "minus", "inverse", "not", "non", "no"))
_UP = frozenset(
    {"true", "up", "good", "positive", "like", "liked", "thumbs_up", "thumbsup", "thumbs up",
     "thumb_up", "thumb up", "desirable", "chosen", "yes", "👍", "accept", "accepted"}
)  # fmt: skip
_DOWN = frozenset(
    {"false", "down", "bad", "negative", "dislike", "disliked", "thumbs_down", "thumbsdown",
     "thumb_down", "thumb down", "thumbs down", "undesirable", "rejected", "no", "👎", "reject"}
)  # fmt: skip
#: A number with its unit: "4/5", "80%", "4 stars", "4,5 stars".
_WITH_UNIT = re.compile(
    r"\s*([+-]?\d+(?:\.\d+|,\d{1,2})?)\s*(/\s*\d+(?:\.\d+)?|%|stars?|points?)\s*", re.I
)
#: A whole number, or one with a decimal comma.
_WITH_COMMA = re.compile(r"\s*([+-]?\d+)(?:,(\d+))?\s*")
#: Unit that stands for numbers with decimal commas.
COMMA = "decimal comma"


def thumb_of(value: Any) -> bool | None:
    """Return True for a thumb up, False for one down, None for what is neither."""
    if isinstance(value, str | bool):
        text = str(value).strip().casefold()
        return True if text in _UP else False if text in _DOWN else None
    return None


def has_thumbs(value: Any) -> bool:
    """Return whether a value is a thumb as a word or a Boolean, or a list that holds one."""
    if isinstance(value, list | tuple):
        return any(map(has_thumbs, value))
    return thumb_of(value) is not None


def read_score(value: Any, column: str) -> float:
    """Return a label or score as a number; thumbs are 1 and 0.

    Raises:
        LeftOutError: It is neither.
    """
    if (thumb := thumb_of(value)) is not None:
        return float(thumb)
    with contextlib.suppress(OverflowError, ValueError):  # an integer of 400 digits
        if isinstance(value, str | int | float) and math.isfinite(number := float(value)):
            return number
    raise LeftOutError(f"{column} is neither a number nor a thumb", beginning(value))


def with_unit(value: Any) -> tuple[str, str] | None:
    """Return number and unit of a text such as "4/5", "80%" or "4 stars"."""
    match = _WITH_UNIT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    unit = "".join(match[2].lower().split())
    return match[1].replace(",", "."), unit if unit[0] == "/" else unit.removesuffix("s")


def find_unit(sample: Sequence[Row], column: str) -> str | None:
    """Return the unit of a column's numbers, if it is one and all of its first texts have it."""
    values = filled_cells(sample, column)
    units = {found[1] if (found := with_unit(value)) else None for value in values}
    if units == {None} and _have_commas(values):
        return COMMA
    return units.pop() if len(units) == 1 else None


def _have_commas(values: Sequence[Any]) -> bool:
    """Return whether all values are numbers, some of them with a decimal comma.

    Three digits behind a comma may be thousands: 1,000.
    """
    texts = [str(value) for value in values if isinstance(value, bool) or type(value) is not int]
    matches = [_WITH_COMMA.fullmatch(text) for text in texts]
    digits = [len(match[2]) for match in matches if match and match[2]]
    return None not in matches and bool(digits) and 3 not in digits


def without_unit(value: Any, unit: str | None, column: str) -> Any:
    """Return the number of a value with a unit, as text.

    Raises:
        LeftOutError: It has another unit than the first rows, or none.
    """
    if unit is None or value is None or value == "":
        return value
    if unit == COMMA:
        match = _WITH_COMMA.fullmatch(str(value))
        if match and len(match[2] or "") != 3:  # those may be thousands
            return str(value).replace(",", ".")
        raise LeftOutError(
            f"{column} is no number with a decimal comma, as in the first rows", beginning(value),
            "write all values in one way",
        )  # fmt: skip
    found = with_unit(value)
    if found is None or found[1] != unit:
        raise LeftOutError(
            f"{column} has another unit than the first rows", f"{beginning(value)!r}, not {unit!r}",
            "write all values in one unit",
        )  # fmt: skip
    return found[0]


def optional_score(value: Any, column: str) -> float | None:
    """Return a score, None for a missing one."""
    return None if is_missing(value) else read_score(value, column)


def mean_score(value: Any, column: str) -> float:
    """Return a score, or the mean of several annotators' scores."""
    if not isinstance(value, list | tuple):
        return read_score(value, column)
    scores = [score for v in value if (score := optional_score(v, column)) is not None]
    if not scores:
        raise LeftOutError(f"{column} is missing")
    return sum(scores) / len(scores)


def is_score(value: Any) -> bool:
    """Return whether a value is a number, a thumb, or a list of them."""
    try:
        mean_score(value, "")
    except LeftOutError:
        return False
    return True


def are_scores(sample: Sequence[Row], column: str) -> bool:
    """Return whether most of a column's values are numbers or thumbs, not texts."""
    values = filled_cells(sample, column)
    if find_unit(sample, column) is not None:
        return True
    return sum(is_score(value) for value in values) > len(values) / 2


def direction(column: str) -> tuple[float, str]:
    """Return the sign and the word for the best value of a score, by its name: a loss is low."""
    words = set(re.findall(r"[a-z]+", column.replace("_", " ").lower()))
    is_low = bool(words & _LOWER_IS_BETTER) and not words & _TURNED
    return (-1.0, "lowest") if is_low else (1.0, "highest")


def beginning(value: Any) -> str:
    """Return the beginning of a value for a message."""
    return str(value)[:60]
