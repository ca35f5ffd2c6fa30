"""Replies that are rated one by one (KTO, scores), or listed with ranks or scores."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.config import DataConfig
from rlhf.data.cells import Cells
from rlhf.data.collect import MAX_RANKED_PAIRS
from rlhf.data.columns import Row, cell_of, value_of
from rlhf.data.records import Comparison, Converted, LeftOutError, Rated

#: What a finder returns: cells, the replies' names in reasons, the converter, sentences.
Found = tuple[Cells, tuple[str, str], Any, tuple[str, ...]]

REPLIES = ("completion", "response", "answer", "reply", "output", "generation", "text")
#: Columns of whole conversations, whose last message is the reply that is rated.
CONVERSATIONS = ("messages", "conversations", "conversation")
RATINGS = (
    "label", "thumbs", "feedback", "vote", "rating", "score", "overall_score", "reward", "quality",
    "overall", "is_good", "desirable",
)  # fmt: skip
#: Default of `data.score_weights`: HelpSteer's attributes, as NVIDIA's SteerLM weighs them.
ATTRIBUTES = {
    "helpfulness": 0.65, "correctness": 0.8, "coherence": 0.45, "complexity": 0.55,
    "verbosity": -0.4,
}  # fmt: skip
LISTS = (
    "completions", "responses", "outputs", "output", "replies", "candidates", "answers",
    "generations", "ranking", "ranked_responses", "ranked", "choices",
)  # fmt: skip
#: Lists whose names say that the best comes first.
_BEST_FIRST = ("output", "ranking", "ranked", "ranked_responses")
_TEXT_KEYS = ("response", "text", "content", "completion", "answer", "output", "reply")
_SCORE_KEYS = ("overall_score", "score", "rating", "reward", "fine_grained_score")
_SCORE_LISTS = ("scores", "score", "ratings", "rewards", "overall_scores")
_RANK_LISTS = ("rank", "ranks", "ranking")
_UP = frozenset(
    {"true", "up", "good", "positive", "like", "liked", "thumbs_up", "thumbsup", "thumbs up",
     "desirable", "chosen", "yes", "👍", "accept", "accepted"}
)  # fmt: skip
_DOWN = frozenset(
    {"false", "down", "bad", "negative", "dislike", "disliked", "thumbs_down", "thumbsdown",
     "thumbs down", "undesirable", "rejected", "no", "👎", "reject"}
)  # fmt: skip


@dataclass(frozen=True)
class _Rating:
    """Rows of one reply with a label or scores."""

    columns: tuple[str, ...]
    weights: tuple[float, ...] = (1.0,)

    def convert(self, row: Row, cells: Cells, roles: Sequence[str]) -> Converted:
        notes: set[str] = set()
        if cells.prompt is None:
            prompt, reply = cells.read_conversation(row, roles[0], notes)
        else:
            prompt = cells.read_prompt(row, notes)
            value = cell_of(row, cells.first)
            reply = cells.read_reply(value, cells.first, prompt, roles[0], notes)
        score = sum(
            weight * _score(value_of(row, column), column)
            for column, weight in zip(self.columns, self.weights, strict=True)
        )
        return Converted(rated=[Rated(prompt, reply, score)], notes=frozenset(notes))


def find_rated(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig,
    prompt: Cells,
) -> Found | None:  # fmt: skip
    """Return the columns of a prompt, a reply, and its label or scores, if there are such."""
    reply = config.chosen_column or next((names[n] for n in REPLIES if n in names), None)
    label = config.label_column or next((names[n] for n in RATINGS if n in names), None)
    if reply is None and prompt.prompt in [names.get(n) for n in CONVERSATIONS]:
        reply, prompt = prompt.prompt, replace(prompt, prompt=None)
    elif prompt.prompt in (None, reply):
        return None
    if reply is None:
        return None
    cells = replace(prompt, first=reply, second=reply)
    attributes = config.score_weights or {
        names[n]: weight for n, weight in ATTRIBUTES.items() if n in names
    }
    if config.score_weights or (label is None and len(attributes) > 1):
        total = " ".join(f"{weight:+g} {name}" for name, weight in attributes.items())
        note = f"rated: replies to one prompt are compared by {total}"
        return cells, ("reply", "reply"), _Rating((*attributes,), (*attributes.values(),)), (note,)
    label = label or next(iter(attributes), None)
    if label is None or not any(_is_score(value_of(row, label)) for row in sample):
        return None
    source = f"{reply} to {prompt.prompt}" if prompt.prompt else f"the last reply of {reply}"
    note = f"rated: {source}; replies to one prompt are compared by {label}"
    return cells, ("reply", "reply"), _Rating((label,)), (note,)


@dataclass(frozen=True)
class _Ranking:
    """Rows of several replies with their scores, ranks or order."""

    column: str
    scores: str | None = None
    sign: float = 1.0
    """−1 for ranks, of which the lowest is best."""
    by_order: bool = False
    """True if the best reply stands first."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column, self.scores) if self.scores else (self.column,)

    def convert(self, row: Row, cells: Cells, roles: Sequence[str]) -> Converted:
        notes: set[str] = set()
        prompt = cells.read_prompt(row, notes)
        items = value_of(row, self.column)
        if not isinstance(items, list | tuple) or len(items) < 2:
            raise LeftOutError(f"{self.column} has fewer than two replies", str(items)[:60])
        texts = [_text_of(item) for item in items]
        replies = [cells.read_reply(t, self.column, prompt, roles[0], notes) for t in texts]
        scored = [*zip(self._scores(row, items), replies, strict=True)]
        scored.sort(key=lambda item: -item[0])
        pairs = [
            (high - low, one, other)
            for (high, one), (low, other) in itertools.combinations(scored, 2)
            if high > low
        ]
        if not pairs:
            raise LeftOutError("tie: all replies have the same score", is_choice=True)
        pairs.sort(key=lambda item: -item[0])
        # Ranks are an order without distances.
        is_graded = self._has_grades(items)
        comparisons = [
            Comparison(prompt, one, other, difference if is_graded else None)
            for difference, one, other in pairs[:MAX_RANKED_PAIRS]
        ]
        return Converted(comparisons, notes=frozenset(notes))

    def _has_grades(self, items: Sequence[Any]) -> bool:
        if self.scores is not None:
            return self.sign > 0
        return not self.by_order and any(
            isinstance(item, Mapping) and any(item.get(key) is not None for key in _SCORE_KEYS)
            for item in items
        )

    def _scores(self, row: Row, items: Sequence[Any]) -> list[float]:
        if self.scores is not None:
            listed = value_of(row, self.scores)
            if not isinstance(listed, list | tuple) or len(listed) != len(items):
                raise LeftOutError(
                    f"{self.scores} does not have one number for each reply", str(listed)[:60]
                )
            return [self.sign * _score(value, self.scores) for value in listed]
        if not self.by_order:
            return [_item_score(item, self.column) for item in items]
        return [float(-index) for index in range(len(items))]


def find_ranking(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig,
    prompt: Cells,
) -> Found | None:  # fmt: skip
    """Return the columns of a prompt and a list of replies, if the best of them is known."""
    wanted = [config.chosen_column] if config.chosen_column else [
        names[n] for n in LISTS if n in names
    ]  # fmt: skip
    column = next((c for c in wanted if _is_list_of_replies(sample, c)), None)
    if column is None or prompt.prompt in (None, column):
        return None
    cells = replace(prompt, first=column, second=column)
    roles = ("reply", "reply")
    if config.label_column is None and _has_scores(sample, column):
        note = f"ranking: the replies in {column} are compared by their scores"
        return cells, roles, _Ranking(column), (note,)
    ranks = [names[n] for n in _RANK_LISTS if n in names]
    scores = config.label_column or next(
        (c for c in (*(names[n] for n in _SCORE_LISTS if n in names), *ranks) if c != column), None
    )
    if scores is not None:
        is_rank = scores in ranks or "rank" in scores.lower()
        order, sign = ("lowest", -1.0) if is_rank else ("highest", 1.0)
        note = f"ranking: the replies in {column} by {scores}, the {order} first"
        return cells, roles, _Ranking(column, scores, sign), (note,)
    if column.lower() in _BEST_FIRST or config.format == "ranking":
        note = f"ranking: the replies in {column}, taken as the best first"
        return cells, roles, _Ranking(column, by_order=True), (note,)
    return None


def find_unranked(names: Mapping[str, str], sample: Sequence[Row]) -> str | None:
    """Return a column with lists of replies."""
    return next(
        (names[n] for n in LISTS if n in names and _is_list_of_replies(sample, names[n])), None
    )


def _has_scores(sample: Sequence[Row], column: str) -> bool:
    """Return whether the replies of a list are objects with a score or a rank."""
    first = next(v for row in sample if isinstance(v := value_of(row, column), list) and v)[0]
    return isinstance(first, Mapping) and any(key in first for key in (*_SCORE_KEYS, "rank"))


def _is_list_of_replies(sample: Sequence[Row], column: str) -> bool:
    lists = [v for row in sample if isinstance(v := value_of(row, column), list) and v]
    return bool(lists) and all(
        isinstance(item, str) or (isinstance(item, Mapping) and "role" not in item)
        for values in lists
        for item in values
    )


def _text_of(item: Any) -> Any:
    if not isinstance(item, Mapping):
        return item
    return next((item[key] for key in _TEXT_KEYS if key in item), None)


def _item_score(item: Any, column: str) -> float:
    if isinstance(item, Mapping):
        for key in _SCORE_KEYS:
            if item.get(key) is not None:
                return _score(item[key], f"{column}.{key}")
        if item.get("rank") is not None:
            return -_score(item["rank"], f"{column}.rank")
    raise LeftOutError(f"a reply in {column} has no score", _beginning(item))


def _beginning(value: Any) -> str:
    """Return the beginning of a value for a message."""
    return str(value)[:60]


def _is_score(value: Any) -> bool:
    try:
        _score(value, "")
    except LeftOutError:
        return False
    return True


def thumb_of(value: Any) -> bool | None:
    """Return True for a thumb up, False for one down, None for what is neither."""
    if isinstance(value, str | bool):
        text = str(value).strip().casefold()
        return True if text in _UP else False if text in _DOWN else None
    return None


def _score(value: Any, column: str) -> float:
    """Return a label or score as a number; thumbs are 1 and 0.

    Raises:
        LeftOutError: It is neither.
    """
    if isinstance(value, str):
        text = value.strip().casefold()
        if text in _UP:
            return 1.0
        if text in _DOWN:
            return 0.0
        try:
            value = float(text)
        except ValueError:
            value = None
    with contextlib.suppress(OverflowError):  # an integer of 400 digits
        if isinstance(value, bool | int | float) and math.isfinite(value):
            return float(value)
    raise LeftOutError(f"{column} is neither a number nor a thumb", _beginning(value))
