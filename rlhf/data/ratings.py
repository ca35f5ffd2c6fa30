"""Replies that are rated one by one: by thumbs (KTO), scores, or HelpSteer's attributes."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.config import DataConfig
from rlhf.data.cells import Cells, Found
from rlhf.data.columns import Row, cell_of, is_missing, value_of
from rlhf.data.records import Converted, LeftOutError, Rated
from rlhf.data.scores import (
    COMMA,
    Scale,
    are_scores,
    beginning,
    direction,
    find_scale,
    find_unit,
    has_thumbs,
    is_score,
    mean_score,
    thumb_of,
)
from rlhf.errors import ConfigError

#: Columns of a model's reply. Beside one of the first row, those of later rows are something else:
#: the gold answer, or a document.
_REPLY_TIERS = (
    ("completion", "response", "reply", "generation", "model_output", "model_response",
     "model_answer", "generated_text", "prediction"),
    ("output",), ("answer", "text"),
)  # fmt: skip
REPLIES = (*_REPLY_TIERS[0], *_REPLY_TIERS[1], *_REPLY_TIERS[2])
#: Columns of whole conversations, whose last message is the reply that is rated.
CONVERSATIONS = ("messages", "conversations", "conversation", "contents")
RATINGS = (
    "label", "thumbs", "feedback", "vote", "kto_tag", "rating", "score", "overall_score", "reward",
    "quality", "overall", "is_good", "desirable", "is_desirable", "thumb", "thumbs_up", "liked",
)  # fmt: skip
#: Default of `data.score_weights`: HelpSteer's attributes, as NVIDIA's SteerLM weighs them.
ATTRIBUTES = {
    "helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45, "complexity": 0.55,
    "verbosity": -0.4,
}  # fmt: skip
#: Columns of thumbs, whose numbers are no scale.
_THUMBS = ("label", "thumbs", "feedback", "vote", "kto_tag")
#: Values of thumbs as numbers.
_THUMB_SCORES = frozenset((-1.0, 0.0, 1.0))
#: Ranks grow with the number of replies, so that the first rows show no scale.
_RANKS = re.compile(r"rank|position|place")
#: Share of the pairs of different prompts above which two ratings contradict each other.
_CONTRARY = 0.25
#: Rows of which each two are compared for that.
_COMPARED = 200


@dataclass(frozen=True)
class _Column:
    """A column that rates the reply."""

    name: str
    weight: float = 1.0
    unit: str | None = None
    """Unit of its numbers, such as `/5`."""
    scale: Scale | None = None
    """Scale of the first rows, which later ones must not leave."""


def _column(sample: Sequence[Row], name: str, weight: float, is_scale_checked: bool) -> _Column:
    """Return a column with the unit and the scale of its first rows."""
    unit = find_unit(sample, name)
    if not is_scale_checked or _RANKS.search(name.lower()):
        return _Column(name, weight, unit)
    values = (cell_of(row, name) for row in sample)
    scores = [mean_score(v, name, unit) for v in values if _is_rated(v) and is_score(v, unit)]
    return _Column(name, weight, unit, find_scale(scores))


@dataclass(frozen=True)
class _Rating:
    """Rows of one reply with a label or scores."""

    ratings: tuple[_Column, ...]
    are_thumbs: bool = False
    """True if the first rows hold thumbs alone, which later ones must hold too."""
    are_numbers: bool = False
    """True if the first rows hold numbers alone, among which a later thumb has no place."""

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(column.name for column in self.ratings)

    def convert(self, row: Row, cells: Cells, roles: Sequence[str]) -> Converted:
        notes: set[str] = set()
        if cells.prompt is None:
            prompt, reply = cells.read_conversation(row, roles[0], notes)
        else:
            prompt = cells.read_prompt(row, notes)
            value = cell_of(row, cells.first)
            reply = cells.read_reply(value, cells.first, prompt, roles[0], notes)
        score = sum(column.weight * self._score(row, column) for column in self.ratings)
        return Converted(rated=[Rated(prompt, reply, score)], notes=frozenset(notes))

    def _score(self, row: Row, column: _Column) -> float:
        name = column.name
        value = cell_of(row, name)
        if not _is_rated(value):
            raise LeftOutError(f"the reply is not rated: {name} is empty", is_choice=True)
        if self.are_numbers and has_thumbs(value):
            raise ConfigError(
                f"data.label_column: {name!r} holds {beginning(value)!r}, but in the first rows "
                "numbers alone; write all of them as numbers"
            )
        score = mean_score(value, name, column.unit)
        if column.scale is not None and not column.scale.holds(score):
            weights = ", ".join(f"{c.name}: {c.weight:g}" for c in self.ratings)
            raise ConfigError(
                f"data.source: {name!r} holds {score:g}, but in the first rows {column.scale.name} "
                "alone; write all of its ratings on one scale, or, if they are, set "
                f"data.score_weights='{{{weights}}}'"
            )
        if self.are_thumbs and score not in _THUMB_SCORES:
            raise ConfigError(
                f"data.label_column: {name!r} holds {score:g}, but in the first rows thumbs of 0 "
                "and 1 alone, of which 1 is up; write all of them as true and false, or rename "
                "the column to rating (the highest is best) or rank (the lowest)"
            )
        return score


def _is_rated(value: Any) -> bool:
    """Return whether a cell holds a rating, or several; pandas writes NaN for none."""
    if isinstance(value, list | tuple):
        return any(map(_is_rated, value))
    return not is_missing(value.strip() if isinstance(value, str) else value)


def find_rated(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig,
    prompt: Cells,
) -> Found | None:  # fmt: skip
    """Return the columns of a prompt, a reply, and its label or scores, if there are such.

    Raises:
        ConfigError: Several columns may hold the reply, or its score.
    """
    ratings = [names[n] for n in RATINGS if n in names and are_scores(sample, names[n])]
    label = config.label_column or next(iter(ratings), None)
    attributes = config.score_weights or {
        names[n]: weight for n, weight in ATTRIBUTES.items() if n in names
    }
    if not config.score_weights and label is None and not attributes:
        return None
    reply = config.chosen_column or _reply_column(names, sample, prompt.prompt)
    if reply is None and prompt.prompt in [names.get(n) for n in CONVERSATIONS]:
        reply, prompt = prompt.prompt, replace(prompt, prompt=None)
    elif prompt.prompt in (None, reply):
        return None
    if reply is None:
        return None
    cells = replace(prompt, first=reply, second=reply)
    if config.score_weights or (label is None and len(attributes) > 1):
        total = " ".join(f"{weight:+g} {name}" for name, weight in attributes.items())
        note = f"rated: replies to one prompt are compared by {total}"
        are_numbers = not any(_hold_thumbs(sample, name) for name in attributes)
        is_default = not config.score_weights
        columns = [_column(sample, name, w, is_default) for name, w in attributes.items()]
        rating = _Rating((*columns,), are_numbers=are_numbers)
        return cells, ("reply", "reply"), rating, (note,)
    label = label or next(iter(attributes), None)
    if label is None or not are_scores(sample, label):
        return None
    if config.label_column is None:
        _check_ratings(ratings, sample, prompt.prompt or reply)
    are_thumbs = _are_thumbs(sample, label)
    sign, order = direction(label)
    source = f"{reply} to {prompt.prompt}" if prompt.prompt else f"the last reply of {reply}"
    note = f"rated: {source}; replies to one prompt are compared by {label}, the {order} is best"
    column = _column(sample, label, sign, not are_thumbs)
    note += ", numbers have decimal commas" if column.unit == COMMA else ""
    are_numbers = not _hold_thumbs(sample, label)
    if not are_numbers and not are_thumbs and not _scores(sample, label) <= _THUMB_SCORES:
        raise ConfigError(
            f"data.label_column: {label!r} holds both thumbs and numbers that are none; write all "
            "of them as numbers"
        )
    rating = _Rating((column,), are_thumbs, are_numbers)
    return cells, ("reply", "reply"), rating, (note,)


def _reply_column(
    names: Mapping[str, str], sample: Sequence[Row], prompt: str | None
) -> str | None:
    """Return the column of the reply.

    Raises:
        ConfigError: There are several.
    """
    for tier in _REPLY_TIERS:
        found = [
            names[n] for n in tier
            if n in names and names[n] != prompt and _hold_replies(sample, names[n])
        ]  # fmt: skip
        if len(found) > 1:
            raise ConfigError(
                f"data.chosen_column: {' and '.join(found)} may each hold the reply that is rated; "
                "set data.chosen_column to one of them"
            )
        if found:
            return found[0]
    return None


def _hold_replies(sample: Sequence[Row], column: str) -> bool:
    """Return whether a column holds texts, objects or messages."""
    return any(isinstance(v := cell_of(row, column), str | list | dict) and v for row in sample)


def _check_ratings(columns: Sequence[str], sample: Sequence[Row], prompt: str) -> None:
    """Refuse several columns of scores that order the replies differently.

    Raises:
        ConfigError: With the setting that decides.
    """
    for one, other in itertools.combinations(columns, 2):
        signs = direction(one)[0] * direction(other)[0]
        products = [((a - b) * (c - d) * signs, is_same) for a, b, c, d, is_same in
                    _score_pairs(sample, one, other, prompt)]  # fmt: skip
        same = [product for product, is_same in products if is_same]
        contrary = sum(product < 0 for product, _ in products)
        if any(product < 0 for product in same) or (
            not same and contrary > _CONTRARY * sum(product != 0 for product, _ in products)
        ):
            raise ConfigError(
                f"data.label_column: {one} and {other} order the replies differently; set "
                f"data.label_column={one} or data.label_column={other}"
            )


def _score_pairs(
    sample: Sequence[Row], one: str, other: str, prompt: str
) -> Iterator[tuple[float, float, float, float, bool]]:
    """Yield the two scores of two rows each, and whether the rows have one prompt."""
    scored = [
        (a, b, repr(cell_of(row, prompt)))
        for row in sample[:_COMPARED]
        if (a := _known_score(row, one)) is not None and (b := _known_score(row, other)) is not None
    ]
    for (a, c, asked), (b, d, again) in itertools.combinations(scored, 2):
        yield a, b, c, d, asked == again


def _known_score(row: Row, column: str) -> float | None:
    value = value_of(row, column)
    try:
        return mean_score(value, column, find_unit([row], column))
    except LeftOutError:
        return None


def _hold_thumbs(sample: Sequence[Row], column: str) -> bool:
    return any(has_thumbs(cell_of(row, column)) for row in sample)


def _scores(sample: Sequence[Row], column: str) -> set[float]:
    values = (cell_of(row, column) for row in sample)
    return {mean_score(value, column) for value in values if is_score(value)}


def _are_thumbs(sample: Sequence[Row], column: str) -> bool:
    """Return whether a column holds thumbs, not a scale; a unit makes it one.

    Raises:
        ConfigError: Its values are 1 and 2 or 2 alone: nothing says which of them is up.
    """
    if find_unit(sample, column) is not None:
        return False
    if column.lower() not in _THUMBS:
        values = [v for row in sample if is_score(v := cell_of(row, column))]
        return bool(values) and all(thumb_of(value) is not None for value in values)
    scores = _scores(sample, column)
    if scores and scores <= {1.0, 2.0} and 2.0 in scores:
        raise ConfigError(
            f"data.label_column: {column!r} holds 1 and 2, which don't say whether 1 or 2 is the "
            "better; write true and false, or rename the column to rating (the highest is best) "
            "or rank (the lowest)"
        )
    return scores <= _THUMB_SCORES
