"""Scores and thumbs of replies: read from cells, and which end of a scale is best."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from decimal import Decimal
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


def number_of(value: Any, unit: str | None = None) -> float | None:
    """Return a finite number, also one written as text in the unit; None for anything else.

    Every place that reads a score, a rank or a margin reads its numbers by this rule.

    Args:
        value: A cell, or an item of one.
        unit: Unit of the column by `unit_of`.
    """
    if isinstance(value, bool) or not isinstance(value, str | int | float | Decimal):
        return None
    if unit == COMMA and isinstance(value, str):
        match = _WITH_COMMA.fullmatch(value)
        if match is None or len(match[2] or "") == 3:  # three digits may be thousands
            return None
        value = value.replace(",", ".")
    elif unit not in (None, COMMA):
        found = with_unit(value)
        if found is None or found[1] != unit:
            return None
        value = found[0]
    try:
        number = float(value)
    except (OverflowError, ValueError):  # an integer of 400 digits
        return None
    return number if math.isfinite(number) else None


def read_score(value: Any, column: str, unit: str | None = None) -> float:
    """Return a label or score as a number; thumbs are 1 and 0.

    Raises:
        LeftOutError: It is neither, or has another unit than the first rows.
    """
    if unit is None and (thumb := thumb_of(value)) is not None:
        return float(thumb)
    number = number_of(value, unit)
    if number is None:
        raise _unread(value, column, unit)
    return number


def _unread(value: Any, column: str, unit: str | None) -> LeftOutError:
    if unit is None:
        return LeftOutError(f"{column} is neither a number nor a thumb", beginning(value))
    if unit == COMMA:
        return LeftOutError(
            f"{column} is no number with a decimal comma, as in the first rows", beginning(value),
            "write all values in one way",
        )  # fmt: skip
    return LeftOutError(
        f"{column} has another unit than the first rows", f"{beginning(value)!r}, not {unit!r}",
        "write all values in one unit",
    )  # fmt: skip


def with_unit(value: Any) -> tuple[str, str] | None:
    """Return number and unit of a text such as "4/5", "80%" or "4 stars"."""
    match = _WITH_UNIT.fullmatch(value) if isinstance(value, str) else None
    if match is None:
        return None
    unit = "".join(match[2].lower().split())
    return match[1].replace(",", "."), unit if unit[0] == "/" else unit.removesuffix("s")


def find_unit(sample: Sequence[Row], *columns: str) -> str | None:
    """Return the unit of the numbers of columns that are compared with each other."""
    return unit_of([value for column in columns for value in filled_cells(sample, column)])


def unit_of(values: Iterable[Any]) -> str | None:
    """Return the unit of some numbers, if it is one and all texts have it; of lists, their items'.

    `COMMA` stands for numbers with a decimal comma.
    """
    flat = [*_flattened(values)]
    units = {found[1] if (found := with_unit(value)) else None for value in flat}
    if units == {None} and _have_commas(flat):
        return COMMA
    return units.pop() if len(units) == 1 else None


def _flattened(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        if isinstance(value, list | tuple):
            yield from _flattened(value)
        elif not is_missing(value):
            yield value


def _have_commas(values: Sequence[Any]) -> bool:
    """Return whether all texts are numbers, some of them with a decimal comma.

    Three digits behind a comma may be thousands: 1,000.
    """
    texts = [str(v) for v in values if isinstance(v, bool) or not isinstance(v, int | float)]
    matches = [_WITH_COMMA.fullmatch(text) for text in texts]
    digits = [len(match[2]) for match in matches if match and match[2]]
    return None not in matches and bool(digits) and 3 not in digits


def optional_score(value: Any, column: str, unit: str | None = None) -> float | None:
    """Return a score, None for a missing one."""
    return None if is_missing(value) else read_score(value, column, unit)


def mean_score(value: Any, column: str, unit: str | None = None) -> float:
    """Return a score, or the mean of several annotators' scores."""
    if not isinstance(value, list | tuple):
        return read_score(value, column, unit)
    scores = [score for v in value if (score := optional_score(v, column, unit)) is not None]
    if not scores:
        raise LeftOutError(f"{column} is missing")
    return sum(scores) / len(scores)


def is_score(value: Any, unit: str | None = None) -> bool:
    """Return whether a value is a number, a thumb, or a list of them."""
    try:
        mean_score(value, "", unit)
    except LeftOutError:
        return False
    return True


def are_scores(sample: Sequence[Row], column: str) -> bool:
    """Return whether most of a column's values are numbers or thumbs, not texts."""
    values = filled_cells(sample, column)
    if find_unit(sample, column) is not None:
        return True
    return sum(is_score(value) for value in values) > len(values) / 2


@dataclass(frozen=True)
class Scale:
    """Range of ratings that the first rows show, which later ones must not leave."""

    name: str
    low: float
    """A rating below it is of another scale."""
    high: float
    """A rating above it is of another scale."""

    def holds(self, rating: float) -> bool:
        """Return whether a rating may be of this scale."""
        return self.low <= rating <= self.high


#: Shares, and thumbs as numbers: 4 is none of them.
_SHARES = Scale("numbers from 0 to 1", 0.0, 1.0)
#: Below are shares, 80 is a percentage; 6 to 10 may be grades that are rare.
_GRADES = Scale("whole numbers from 1 to 5", 1.0, 10.0)
#: Fewest ratings that show a scale.
MIN_RATINGS = 30


def find_scale(ratings: Sequence[float]) -> Scale | None:
    """Return the scale of some ratings; None for one without bounds, or too few ratings."""
    if len(ratings) < MIN_RATINGS:
        return None
    if all(0 <= rating <= 1 for rating in ratings):
        return _SHARES
    return _GRADES if all(rating in (1, 2, 3, 4, 5) for rating in ratings) else None


def direction(column: str) -> tuple[float, str]:
    """Return the sign and the word for the best value of a score, by its name: a loss is low."""
    words = set(re.findall(r"[a-z]+", column.replace("_", " ").lower()))
    is_low = bool(words & _LOWER_IS_BETTER) and not words & _TURNED
    return (-1.0, "lowest") if is_low else (1.0, "highest")


def beginning(value: Any) -> str:
    """Return the beginning of a value for a message."""
    return str(value)[:60]
