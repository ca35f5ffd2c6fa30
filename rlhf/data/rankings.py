"""Lists of replies to one prompt, with ranks or scores, or the best first."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from rlhf.config import DataConfig
from rlhf.data.cells import Cells, Found
from rlhf.data.chat import REPLY_KEYS
from rlhf.data.collect import MAX_RANKED_PAIRS
from rlhf.data.columns import Row, cell_of, plain_name, value_of
from rlhf.data.ratings import REPLIES
from rlhf.data.records import Comparison, Converted, LeftOutError
from rlhf.data.reply_lists import (
    LISTS,
    MAX_REPLIES,
    filled_lists,
    hold_lists,
    is_list_of_replies,
    items_of,
    key_of,
    parsed_list,
    text_of,
)
from rlhf.data.scores import beginning, direction, optional_score, unit_of
from rlhf.data.verdicts import prefers_worse
from rlhf.errors import ConfigError

#: Columns with the position of the best reply in a list.
_BEST = ("best", "best_index", "best_idx", "chosen_index", "chosen_idx", "chosen", "choice",
         "preferred", "winner", "preferred_index", "label")  # fmt: skip
#: Lists whose names say that the best comes first.
_BEST_FIRST = ("output", "ranking", "ranked", "ranked_responses")
_SCORE_KEYS = (
    "overall_score", "score", "rating", "reward", "fine_grained_score", "fine-grained_score",
    "pm_score", "label",
)  # fmt: skip
#: Scores of one reply of which the earlier wins without a word: UltraFeedback's two.
_SUMMED_UP = ("overall_score", "fine_grained_score", "fine-grained_score", "label")
_SCORE_LISTS = (
    "scores", "score", "ratings", "rating", "rewards", "reward_scores", "overall_scores",
    "correct", "is_correct",
)  # fmt: skip
_RANK_LISTS = ("rank", "ranks", "ranking", "rankings")
#: Columns that say in which order a list stands.
_ORDERS = ("order", "sorting", "sort_order", "ranking_order")
#: Names of all columns that a ranking reads.
COLUMNS = (*LISTS, *_BEST, *_SCORE_LISTS, *_RANK_LISTS, *_ORDERS)


@dataclass(frozen=True)
class _Ranking:
    """Rows of several replies with their scores, ranks or order."""

    column: str
    scores: str | None = None
    sign: float = 1.0
    """−1 for ranks, of which the lowest is best."""
    by: Literal["scores", "order", "best", "id", "field"] = "scores"
    """`order` if the best reply stands first; if `scores` names the best one, `best` if by its
    position and `id` if by a field of the reply; `field` if `scores` is a path into each reply."""
    start: int = 0
    """Position of the first reply, if `scores` is a position."""
    may_be_order: bool = False
    """True if nothing but the name says that `scores` are ranks, not the replies' order."""
    units: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    """Units of the numbers in `scores`, or in the replies' fields."""

    @property
    def columns(self) -> tuple[str, ...]:
        return (self.column, self.scores) if self.scores else (self.column,)

    def convert(self, row: Row, cells: Cells, roles: Sequence[str]) -> Converted:
        notes: set[str] = set()
        prompt = cells.read_prompt(row, notes)
        items = items_of(value_of(row, self.column))
        if not isinstance(items, list | tuple) or len(items) < 2:
            raise LeftOutError(f"{self.column} has fewer than two replies", str(items)[:60])
        if len(items) > MAX_REPLIES:
            raise LeftOutError(
                f"{self.column} has more than {MAX_REPLIES} replies", f"{len(items):,}",
                "give the best and the worst of them",
            )  # fmt: skip
        scores = self._fields(items) if self.by == "field" else self._scores(row, items)
        if any(score is None for score in scores):
            notes.add(f"replies in {self.column} without a score are not compared")
        scored = [
            (score, cells.read_reply(text_of(item), self.column, prompt, roles[0], notes))
            for score, item in zip(scores, items, strict=True)
            if score is not None
        ]
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
        skipped = max(len(pairs) - MAX_RANKED_PAIRS, 0)
        return Converted(comparisons, notes=frozenset(notes), skipped=skipped)

    def _has_grades(self, items: Sequence[Any]) -> bool:
        if self.by != "scores" or self.scores is not None:
            return self.by in ("scores", "field") and self.sign > 0
        return any(
            isinstance(item, Mapping) and any(item.get(key) is not None for key in _SCORE_KEYS)
            for item in items
        )

    def _scores(self, row: Row, items: Sequence[Any]) -> list[float | None]:
        if self.by == "order":
            return [float(-index) for index in range(len(items))]
        if self.by == "best":
            best = _position(cell_of(row, self.scores or ""), self.scores or "") - self.start
            if best == (-1 if self.start else len(items)):
                raise ConfigError(
                    f"data.label_column: {self.scores!r} holds {best + self.start} for a list of "
                    f"{len(items)} replies, but the first rows count from {self.start}; count all "
                    "positions alike"
                )
            if not 0 <= best < len(items):
                raise LeftOutError(
                    f"{self.scores} is no position in {self.column}",
                    f"{best + self.start} of {len(items)} replies",
                )
            return [float(index == best) for index in range(len(items))]
        if self.by == "id":
            named = [_names_item(cell_of(row, self.scores or ""), item) for item in items]
            if sum(named) != 1:
                raise LeftOutError(
                    f"{self.scores} does not name one reply of {self.column}",
                    beginning(cell_of(row, self.scores or "")),
                )
            return [float(is_best) for is_best in named]
        if self.scores is not None:
            listed = parsed_list(value_of(row, self.scores))
            if isinstance(listed, Mapping):  # {"model": score} beside {"model": reply}
                listed = [listed.get(key_of(item)) for item in items]
            if not isinstance(listed, list | tuple) or len(listed) != len(items):
                raise LeftOutError(
                    f"{self.scores} does not have one number for each reply", str(listed)[:60]
                )
            if self.may_be_order:
                _check_order([listed], self.scores)
            unit = self.units.get(self.scores)
            found = [optional_score(value, self.scores, unit) for value in listed]
            scores = [None if score is None else self.sign * score for score in found]
        else:
            scores = _item_scores(items, self.column, self.units)
            _check_ranks(items, scores)
        if all(score is None for score in scores):
            raise LeftOutError(f"no reply in {self.column} has a score")
        return scores

    def _fields(self, items: Sequence[Any]) -> list[float | None]:
        """Return the scores in a field of each reply, which may be nested."""
        path = (self.scores or "").removeprefix(f"{self.column}.")
        values = [cell_of(item, path) if isinstance(item, Mapping) else None for item in items]
        found = [optional_score(value, self.scores or "") for value in values]
        if all(score is None for score in found):
            raise LeftOutError(f"no reply has {self.scores}")
        return [None if score is None else self.sign * score for score in found]


def find_ranking(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig,
    prompt: Cells,
) -> Found | None:  # fmt: skip
    """Return the columns of a prompt and a list of replies, if the best of them is known.

    Raises:
        ConfigError: A column orders the replies, but in which way is not certain.
    """
    wanted = [config.chosen_column] if config.chosen_column else [
        names[n] for n in LISTS if n in names
    ]  # fmt: skip
    column = next((c for c in wanted if is_list_of_replies(sample, c)), None)
    if column is None or prompt.prompt in (None, column):
        return None
    cells = replace(prompt, first=column, second=column)
    decided = _decision(names, sample, config, column)
    if decided is None:
        return None
    ranking, order = decided
    return cells, ("reply", "reply"), ranking, (f"ranking: the replies in {column} {order}",)


def _decision(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig, column: str
) -> tuple[_Ranking, str] | None:
    """Return how the replies of a list are ordered, and a sentence about it."""
    if config.label_column and config.label_column.startswith(f"{column}."):
        sign, order = direction(config.label_column)
        ranking = _Ranking(column, config.label_column, sign, by="field")
        return ranking, f"are compared by {config.label_column}, the {order} is best"
    if config.label_column is None and _has_scores(sample, column):
        ranking = _Ranking(column, units=_units(sample, column))
        return ranking, f"are compared by their {_deciding(sample, column)}"
    ranks = [names[n] for n in _RANK_LISTS if n in names and hold_lists(sample, names[n])]
    scores = [names[n] for n in _SCORE_LISTS if n in names and hold_lists(sample, names[n])]
    listed = [c for c in (*scores, *ranks) if c != column]
    if config.label_column and hold_lists(sample, config.label_column):
        listed = [config.label_column]
    best = [names[n] for n in _BEST if n in names] if not config.label_column else [
        config.label_column
    ]  # fmt: skip
    if config.format == "ranking" and not config.label_column and column.lower() in _BEST_FIRST:
        listed = best = []
    if listed:
        is_named = plain_name(listed[0]) in ("ranking", "rankings") and not config.label_column
        if is_named:
            _check_order(filled_lists(sample, listed[0]), listed[0])
        sign, order = direction(listed[0])
        units = {listed[0]: unit_of(_score_lists(sample, listed[0]))}
        ranking = _Ranking(column, listed[0], sign, may_be_order=is_named, units=units)
        return ranking, f"by {listed[0]}, the {order} first"
    for name in best:
        if prefers_worse(name):
            raise ConfigError(
                f"data.label_column = {name!r}: seems to name the worst reply; set a column that "
                "names the best one, or remove the setting"
            )
        start = _start(sample, name, column)
        if start is not None:
            ranking = _Ranking(column, name, by="best", start=start)
            return ranking, f"by {name}, the position of the best, counted from {start}"
        if _name_items(sample, name, column):
            return _Ranking(column, name, by="id"), f"by {name}, which names the best"
    return _in_order(names, sample, config, column)


def _in_order(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig, column: str
) -> tuple[_Ranking, str] | None:
    """Return that the best reply stands first, if the list's name or the format says so."""
    if config.format != "ranking" and _may_be_names(names, sample, column):
        return None
    _check_sorting(names, sample, column)
    is_plain = any(isinstance(cell_of(row, column), list) for row in sample) and all(
        isinstance(item, str) or {*item} <= {*REPLY_KEYS, "model", "role"}
        for values in filled_lists(sample, column)
        for item in values
    )
    if is_plain and (column.lower() in _BEST_FIRST or config.format == "ranking"):
        return _Ranking(column, by="order"), "are taken as the best first"
    return None


def _may_be_names(names: Mapping[str, str], sample: Sequence[Row], column: str) -> bool:
    """Return whether the texts of a list name columns or models, or are single words: no replies.

    Beside a column that holds a reply they are something else too, such as a program's output.
    """
    if any(n in names and _hold_texts(sample, names[n]) for n in REPLIES if names.get(n) != column):
        return True
    items = [item for values in filled_lists(sample, column) for item in values]
    words = [item for item in items if isinstance(item, str) and len(item.split()) < 2]
    others = [n for n in names if names[n] != column and n not in ("id", "source", "dataset")]
    are_names = bool(words) and {plain_name(word) for word in words} <= {*others}
    return are_names or (len(words) > len(items) / 2 and len(others) > 2)


def _hold_texts(sample: Sequence[Row], column: str) -> bool:
    return any(isinstance(cell_of(row, column), str) and cell_of(row, column) for row in sample)


def _check_sorting(names: Mapping[str, str], sample: Sequence[Row], column: str) -> None:
    """Refuse a list that another column says to begin with the worst.

    Raises:
        ConfigError: With the column.
    """
    for name in (names[n] for n in _ORDERS if n in names):
        values = {plain_name(v) for row in sample if isinstance(v := cell_of(row, name), str)}
        for value in values:
            if re.match(r"(worst|asc|low|incr)", value):
                raise ConfigError(
                    f"data.source: {name} says {value!r} of the replies in {column}; put the best "
                    f"reply first, and drop {name}"
                )


def _check_order(lists: Sequence[Sequence[Any]], column: str) -> None:
    """Refuse a ranking that may be each reply's rank or the replies' order.

    Raises:
        ConfigError: The two readings differ in a row.
    """
    for values in lists:
        if not all(isinstance(v, int) and not isinstance(v, bool) for v in values):
            return
        low = min(values)
        order = [value - low for value in values]
        if sorted(order) != list(range(len(order))):
            return  # ties or gaps: no list of positions
        if any(order[place] != index for index, place in enumerate(order)):
            raise ConfigError(
                f"data.label_column: {column!r} ({values}) may hold the rank of each reply, or the "
                f"positions of the replies, the best first; set data.label_column={column} if it "
                "is the rank of each, or else put the replies in that order, drop the column, and "
                "set data.format=ranking"
            )


def _start(sample: Sequence[Row], name: str, column: str) -> int | None:
    """Return the position of a list's first reply as a column counts, 0 or 1.

    Raises:
        ConfigError: The column holds positions of which this is not certain.
    """
    pairs = [(cell_of(row, name), items_of(cell_of(row, column))) for row in sample]
    known = [
        (int(value), len(items))
        for value, items in pairs
        if _is_whole(value) and isinstance(items, list) and len(items) > 1
    ]
    given = [value for value, _ in pairs if value is not None]
    if not known or len(known) < len(given) / 2:
        return None
    if any(position == 0 for position, _ in known):
        return 0
    if any(position == length for position, length in known):
        return 1
    raise ConfigError(
        f"data.label_column: {name!r} holds positions in {column}, but nothing says whether the "
        f"first reply is 0 or 1; give a score for each reply instead"
    )


def _names_item(value: Any, item: Any) -> bool:
    """Return whether a value is a field of a reply, but not its text."""
    if not isinstance(item, Mapping) or not isinstance(value, str | int) or value == "":
        return False
    nested = [v for v in item.values() if isinstance(v, Mapping)]  # {"meta": {"id": …}, "text": …}
    return any(
        key not in REPLY_KEYS and fields[key] == value
        for fields in (item, *nested)
        for key in fields
    )


def _name_items(sample: Sequence[Row], name: str, column: str) -> bool:
    """Return whether most values of a column name exactly one reply in a list."""
    pairs = [(cell_of(row, name), items_of(cell_of(row, column))) for row in sample]
    lists = [(value, items) for value, items in pairs if isinstance(items, list)]
    named = sum(sum(_names_item(value, item) for item in items) == 1 for value, items in lists)
    return named > len(sample) / 2


def _position(value: Any, column: str) -> int:
    if not _is_whole(value):
        raise LeftOutError(f"{column} is no position", beginning(value))
    return int(value)


def _is_whole(value: Any) -> bool:
    if isinstance(value, str):
        return value.strip().isdecimal() and len(value) < 10
    return isinstance(value, int) and not isinstance(value, bool)


def _has_scores(sample: Sequence[Row], column: str) -> bool:
    """Return whether the replies of a list are objects with a score or a rank."""
    return any(
        isinstance(item, Mapping) and any(key in item for key in (*_SCORE_KEYS, "rank"))
        for values in filled_lists(sample, column)
        for item in values
    )


def _deciding(sample: Sequence[Row], column: str) -> str:
    """Return the field of the replies that orders them, and which end of it is best."""
    items = [item for values in filled_lists(sample, column) for item in values]
    given = [
        key
        for key in (*_SCORE_KEYS, "rank")
        if any(isinstance(item, Mapping) and item.get(key) is not None for item in items)
    ]
    if not given:
        return "scores"
    return f"{given[0]}, the {'lowest' if given[0] == 'rank' else 'highest'} is best"


def _units(sample: Sequence[Row], column: str) -> dict[str, str | None]:
    """Return the unit of each field of the replies that holds scores."""
    items = [item for values in filled_lists(sample, column) for item in values]
    return {
        key: unit_of(item.get(key) for item in items if isinstance(item, Mapping))
        for key in (*_SCORE_KEYS, "rank")
    }


def _score_lists(sample: Sequence[Row], column: str) -> list[Any]:
    """Return the scores of all rows; of an object of scores by reply its values."""
    found = [parsed_list(cell_of(row, column)) for row in sample]
    return [[*value.values()] if isinstance(value, Mapping) else value for value in found]


def _item_scores(
    items: Sequence[Any], column: str, units: Mapping[str, str | None]
) -> list[float | None]:
    """Return the replies' scores by one field, or their ranks with a minus; None where missing.

    Raises:
        LeftOutError: A reply has no fields, or two fields order the replies differently.
    """
    for item in items:
        if not isinstance(item, Mapping):
            raise LeftOutError(f"a reply in {column} has no score", beginning(item))
    by_key = {
        key: [optional_score(item.get(key), f"{column}.{key}", units.get(key)) for item in items]
        for key in (*_SCORE_KEYS, "rank")
        if any(item.get(key) is not None for item in items)
    }
    others = [key for key in by_key if key not in _SUMMED_UP and key != "rank"]
    for one, other in itertools.combinations(others, 2):
        if _disagree(by_key[one], by_key[other]):
            raise LeftOutError(
                f"{one} and {other} order the replies in {column} differently",
                cure="leave one of them out",
            )
    ranks = by_key.pop("rank", [None] * len(items))
    scores = next(iter(by_key.values()), None)
    return scores or [None if rank is None else -rank for rank in ranks]


def _disagree(one: Sequence[float | None], other: Sequence[float | None]) -> bool:
    known = [(a, b) for a, b in zip(one, other, strict=True) if a is not None and b is not None]
    return any((a - c) * (b - d) < 0 for (a, b), (c, d) in itertools.combinations(known, 2))


def _check_ranks(items: Sequence[Any], scores: Sequence[float | None]) -> None:
    """Refuse replies whose ranks and scores order them differently."""
    ranks = [optional_score(item.get("rank"), "rank") for item in items]
    known = [(s, r) for s, r in zip(scores, ranks, strict=True) if s is not None and r is not None]
    for (one, rank), (two, other) in itertools.combinations(known, 2):
        if (one - two) * (rank - other) > 0:
            raise LeftOutError(
                "the scores contradict the ranks",
                f"scores {one:g} and {two:g}, ranks {rank:g} and {other:g}",
                "leave out the scores or the ranks",
            )  # fmt: skip
