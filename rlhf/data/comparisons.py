"""Rows of two replies: of which one is preferred by its column, or by a label."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rlhf.config import DataConfig
from rlhf.data.cells import Cells, Found
from rlhf.data.chat import REPLY_KEYS, loose_text, to_messages, to_text
from rlhf.data.columns import Row, cell_of, value_of
from rlhf.data.markup import LISTS
from rlhf.data.rankings import find_unranked
from rlhf.data.ratings import CONVERSATIONS
from rlhf.data.records import Comparison, Converted, LeftOutError
from rlhf.data.verdicts import LABEL_COLUMNS, Judge, find_judge, names_a_reply, relation
from rlhf.errors import ConfigError

#: Columns of the preferred and the other reply.
PAIRS = (
    ("chosen", "rejected"), ("chosen_response", "rejected_response"),
    ("response_chosen", "response_rejected"), ("answer_chosen", "answer_rejected"),
    ("output_chosen", "output_rejected"), ("chosen_answer", "rejected_answer"),
    ("preferred", "dispreferred"), ("preferred_output", "non_preferred_output"),
    ("preferred_response", "dispreferred_response"), ("preferred", "rejected"),
    ("accepted", "rejected"), ("accepted_response", "rejected_response"),
    ("better", "worse"), ("better_response", "worse_response"),
    ("best", "worst"), ("pos_answer", "neg_answer"), ("positive", "negative"), ("pos", "neg"),
    ("good", "bad"), ("good_response", "bad_response"), ("winner", "loser"),
    ("winning_response", "losing_response"), ("winner_response", "loser_response"),
    ("win", "lose"), ("y_w", "y_l"), ("chosen_messages", "rejected_messages"),
    ("response_j", "response_k"),
)  # fmt: skip
#: Words for a reply in the names of two columns that differ in a suffix alone.
_REPLY_WORDS = (
    "response", "answer", "output", "completion", "reply", "text", "conversation", "generation",
    "candidate", "option", "human_ref", "assistant", "summary", "message", "model_response",
    "continuation", "chat", "responses",
)  # fmt: skip
_SUFFIXES = (("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"), ("first", "second"))
#: Different values of so many rows that are labels, whatever they are, beside columns of replies.
_FEW, _MANY = 4, 12
#: Share of labels above which a column of labels and texts is refused.
_SOME = 0.1
#: Longest name of a model, in characters.
_LONGEST_NAME = 80
_SCORES = (
    ("score_chosen", "score_rejected"), ("chosen_score", "rejected_score"),
    ("chosen_rating", "rejected_rating"), ("rating_chosen", "rating_rejected"),
    ("chosen_reward", "rejected_reward"),
)  # fmt: skip


@dataclass(frozen=True)
class _Pair:
    """Rows of a preferred reply and another one; either may be a list of texts."""

    scores: tuple[str, str] | None = None

    @property
    def columns(self) -> tuple[str, ...]:
        return self.scores or ()

    def convert(self, row: Row, cells: Cells, roles: Sequence[str]) -> Converted:
        notes: set[str] = set()
        margin = self._margin(row)
        if not self._may_be_lists(row, cells):
            pair = Comparison(*cells.read(row, roles, notes), margin)
            return Converted([pair], notes=frozenset(notes))
        comparisons = []
        for one in _alternatives(row, cells, cells.first):
            for other in _alternatives(row, cells, cells.second):
                comparisons.append(Comparison(*cells.read({**row, **one, **other}, roles, notes),
                                              margin))  # fmt: skip
        return Converted(comparisons=comparisons, notes=frozenset(notes))

    @staticmethod
    def _may_be_lists(row: Row, cells: Cells) -> bool:
        texts = all(isinstance(row.get(column), str) for column in (cells.first, cells.second))
        return not texts or cells.text_cells

    def _margin(self, row: Row) -> float | None:
        if self.scores is None:
            return None
        values = [value_of(row, column) for column in self.scores]
        try:
            one, other = (float(value) for value in values)
        except (TypeError, ValueError, OverflowError):  # an integer of 400 digits
            return None
        if not (math.isfinite(one) and math.isfinite(other)):
            return None
        if one == other:
            raise LeftOutError("tie: both replies have the same score", f"{one:g}", is_choice=True)
        if one < other:
            raise LeftOutError(
                "the scores contradict the labels", f"{one:g} for chosen, {other:g} for rejected",
                "check which column holds the preferred reply",
            )  # fmt: skip
        return one - other


@dataclass(frozen=True)
class _Comparison:
    """Rows of two replies and a label that says which is better."""

    judge: Judge

    @property
    def columns(self) -> tuple[str, ...]:
        return self.judge.columns

    def convert(self, row: Row, cells: Cells, roles: Sequence[str]) -> Converted:
        notes: set[str] = set()
        verdict, margin = self.judge.decide(row)
        if verdict == "tie":
            raise LeftOutError("tie: neither reply is preferred", is_choice=True)
        prompt, first, second = cells.read(_turns(row, cells), roles, notes)
        if verdict == "second":
            first, second = second, first
        comparison = Comparison(prompt, first, second, margin, verdict)
        return Converted([comparison], notes=frozenset(notes))


def find_pairs(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig, prompt: Cells
) -> Found | None:
    """Return the columns of a preferred and another reply, if there are such.

    Raises:
        ConfigError: A column that is set is no reply's, or the prompt's.
    """
    if config.chosen_column and config.rejected_column and config.label_column:
        return None  # a comparison of two columns that are set
    chosen, rejected = _pair_columns(names, sample, config)
    if chosen is None or rejected is None:
        return None
    if config.label_column and config.label_column == _label_naming(
        names, sample, {chosen, rejected}
    ):
        return None  # {"chosen": …, "rejected": …, "preference": "rejected"}
    _check_pair(names, sample, config, prompt, chosen, rejected)
    if _are_labels(names, sample, chosen, rejected):
        if config.chosen_column or config.rejected_column:
            raise ConfigError(
                f"data.chosen_column, data.rejected_column: {chosen} and {rejected} hold labels "
                f"({cell_of(sample[0], chosen)!r}), not replies; remove the settings, and set "
                "data.label_column to the column that says which reply is better"
            )
        return None  # the label of a comparison: {"response_a": …, "chosen": "response_a"}
    scores = next(((names[a], names[b]) for a, b in _SCORES if a in names and b in names), None)
    cells = replace(prompt, first=chosen, second=rejected)
    if cells.prompt in (chosen, rejected):
        cells = replace(cells, prompt=None)
    source = f"prompt from {cells.prompt}" if cells.prompt else "prompt is what both share"
    if cells.prompt is None and _plain_texts(sample, rejected) and chosen in _chats(names):
        source = f"prompt is what precedes the last reply of {chosen}"
    note = f"pairs: {source}; {chosen} is preferred to {rejected}"
    return cells, ("chosen", "rejected"), _Pair(scores), (note, *_prompt_notes(cells))


def _pair_columns(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig
) -> tuple[str | None, str | None]:
    """Return the columns of the preferred and the other reply, as far as they are known."""
    chosen, rejected = config.chosen_column, config.rejected_column
    if chosen is None and rejected is None:
        for one, other in PAIRS:
            if one in names and other in names:
                return names[one], names[other]
        # ms-swift and others: a conversation that ends with the preferred reply, and another one
        alone = next((names[n] for _, n in PAIRS if n in names), None)
        whole = next((c for c in _chats(names) if _end_with_reply(sample, c)), None)
        return (whole, alone) if alone and whole else (None, None)
    for one, other in PAIRS:
        if rejected is None:
            rejected = names.get(other)
        elif chosen is None:
            chosen = names.get(one)
    return chosen, rejected


def _check_pair(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig, prompt: Cells,
    chosen: str, rejected: str,
) -> None:  # fmt: skip
    """Refuse reply columns that are the prompt's, or of which another column says the better.

    Raises:
        ConfigError: With the setting to change.
    """
    is_set = config.prompt_column or config.chosen_column or config.rejected_column
    if prompt.prompt in (chosen, rejected) and is_set and prompt.prompt not in _chats(names):
        raise ConfigError(
            f"data.prompt_column = {prompt.prompt!r}: is the column of a reply; remove the "
            "setting: the prompt is what both conversations share"
        )
    if chosen == rejected:
        raise ConfigError(
            f"data.chosen_column = {chosen!r}: is data.rejected_column too; set two columns"
        )
    label = _label_naming(names, sample, {chosen, rejected})
    if label:
        raise ConfigError(
            f"data.chosen_column = {chosen!r}: {label!r} says for each row which of {chosen} and "
            f"{rejected} is better; set data.label_column={label} too, or remove the column"
        )


def find_comparison(
    names: Mapping[str, str], sample: Sequence[Row], config: DataConfig, prompt: Cells
) -> Found | None:
    """Return two reply columns and what says which is better, if there are such.

    Raises:
        ConfigError: There are two replies, but nothing certain says which is better.
    """
    found = _reply_columns(names, sample)
    if config.chosen_column and config.rejected_column:
        found = (config.chosen_column, config.rejected_column), ("", "")
    found = found or _replies_by_label(names, sample)
    if found is None:
        return None
    replies, suffixes = found
    judge = find_judge(names, sample, replies, suffixes, config, prompt.text_cells)
    cells = replace(prompt, first=replies[0], second=replies[1])
    if prompt.prompt in replies:
        cells = replace(cells, prompt=None)
    note = f"comparison: {replies[0]} against {replies[1]}, {judge.description}"
    return cells, replies, _Comparison(judge), (note, *_prompt_notes(cells))


def _are_labels(
    names: Mapping[str, str], sample: Sequence[Row], chosen: str, rejected: str
) -> bool:
    """Return whether the preferred reply's column holds labels of replies in other columns."""
    others = {n: c for n, c in names.items() if c not in (chosen, rejected)}
    listed = find_unranked(others, sample)
    values = [(row, v) for row in sample if (v := cell_of(row, chosen)) not in (None, "")]
    holders = listed is not None or _reply_columns(others, sample) is not None
    if not holders:
        # Columns of any name, which the values name: {"gpt": …, "llama": …, "chosen": "gpt"}.
        columns = set(others.values())
        return bool(values) and all(isinstance(v, str) and v in columns for _, v in values)
    if len(values) >= _MANY and len({repr(value) for _, value in values}) <= _FEW:
        return True  # so few texts are no replies to so many prompts
    labels = sum(_is_label(value, row, [*others.values()], listed) for row, value in values)
    if 0 < labels < len(values) and labels > len(values) * _SOME:
        raise ConfigError(
            f"data.source: {chosen} holds labels of other columns in {labels} of the first "
            f"{len(values)} rows, and other texts in the rest; give all rows alike"
        )
    return bool(values) and labels == len(values)


def _is_label(value: Any, row: Row, columns: Sequence[str], listed: str | None) -> bool:
    """Return whether a value is a number, or names a column, a model or an item of a list."""
    if isinstance(value, bool | int | float):
        return True
    if not isinstance(value, str):
        return False
    items = cell_of(row, listed) if listed else None
    fields = [item for item in items if isinstance(item, Mapping)] if items else []
    texts = [text for item in fields for key in REPLY_KEYS if (text := item.get(key))]
    texts += [item for item in items or () if isinstance(item, str)]
    is_short = len(value) <= _LONGEST_NAME and "\n" not in value
    return value not in texts and (
        names_a_reply(value, columns)
        or any(relation(value, suffixes) for suffixes in _SUFFIXES)
        or value.strip().lstrip("-").isdecimal()
        or (is_short and any(value == cell_of(row, c) for c in columns if _names_model(c)))
        or any(value in item.values() for item in fields)
    )


def _names_model(column: str) -> bool:
    """Return whether a column's name is one of models' names."""
    return bool(re.search(r"model|policy|name|system_[ab12]|source_[ab12]|engine", column.lower()))


def _label_naming(
    names: Mapping[str, str], sample: Sequence[Row], columns: set[str] | None = None
) -> str | None:
    """Return a label column whose values are the names of two columns, each in some row."""
    known = set(names.values())
    for name in LABEL_COLUMNS:
        values = {v for row in sample if (v := cell_of(row, names.get(name, ""))) is not None
                  and isinstance(v, str)}  # fmt: skip
        if len(values) == 2 and values <= known and columns in (None, values):
            return names[name]
    return None


def _replies_by_label(
    names: Mapping[str, str], sample: Sequence[Row]
) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """Return two columns that a label column names: {"gpt": …, "llama": …, "winner": "gpt"}."""
    label = _label_naming(names, sample)
    if label is None:
        return None
    values = {v for row in sample if isinstance(v := cell_of(row, label), str)}
    one, other = (column for column in names.values() if column in values)
    return ((one, other), ("", "")) if _hold_text(sample, (one, other)) else None


def _chats(names: Mapping[str, str]) -> list[str]:
    return [names[n] for n in CONVERSATIONS if n in names]


def _end_with_reply(sample: Sequence[Row], column: str) -> bool:
    """Return whether a column's conversations end with a reply."""
    values = [value for row in sample if (value := cell_of(row, column))]
    ends = 0
    for value in values:
        try:
            ends += to_messages(value, "chosen")[-1]["role"] == "assistant"
        except LeftOutError:
            continue
    return ends > len(values) / 2


def _plain_texts(sample: Sequence[Row], column: str) -> bool:
    return any(isinstance(cell_of(row, column), str) for row in sample)


def _reply_columns(
    names: Mapping[str, str], sample: Sequence[Row]
) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """Return two columns of replies whose names differ in a suffix, and the suffixes."""
    for suffixes in _SUFFIXES:
        for word in _REPLY_WORDS:
            replies = _with_suffixes(names, word, suffixes)
            if replies is not None and _hold_text(sample, replies):
                return replies, suffixes
    return None


def _prompt_notes(cells: Cells) -> Iterator[str]:
    if cells.system:
        yield f"{cells.system} goes before the prompt as a system turn"


def _with_suffixes(
    names: Mapping[str, str], word: str, suffixes: tuple[str, str]
) -> tuple[str, str] | None:
    stem, _, tail = word.partition("_") if word.startswith("model_") else (word, "", "")
    for form in ("{0}_{1}", "{0}{1}", "{1}_{0}", "{0}_{1}_{2}", "{0}{1}_{2}"):
        if ("{2}" in form) != bool(tail):
            continue
        one, other = (form.format(stem, suffix, tail) for suffix in suffixes)
        if one in names and other in names:
            return names[one], names[other]
    return None


def _hold_text(sample: Sequence[Row], columns: Sequence[str]) -> bool:
    """Return whether columns hold replies, not scores or names of models."""
    values = [row.get(column) for row in sample for column in columns]
    return any(isinstance(value, str | list | dict) and value for value in values)


def _alternatives(row: Row, cells: Cells, column: str) -> list[Row]:
    """Return a row's values of a column that may be a list of several replies.

    Raises:
        LeftOutError: A list begins with the prompt, so that its texts are turns.
    """
    value = cell_of(row, column)
    markup = (cells.markups or {}).get(column)
    if isinstance(value, str) and cells.text_cells and markup in LISTS:
        assert markup.parse is not None
        listed = markup.parse(value)
        value = listed[0] if listed and len(listed) == 1 else value  # several may be an answer
    if not isinstance(value, list | tuple) or not all(isinstance(v, str) for v in value):
        return [{column: value}]
    asked = cell_of(row, cells.prompt) if cells.prompt else None
    if isinstance(asked, str) and value and loose_text(value[0]) == loose_text(asked):
        if len(value) != 2:
            raise LeftOutError(
                f"{column} is a list of turns", f"{len(value)} texts, the first is the prompt",
                "give the reply alone, or a list of {role, content}",
            )  # fmt: skip
        value = value[1:]
    return [{column: text} for text in value] or [{column: value}]


def _turns(row: Row, cells: Cells) -> Row:
    """Unwrap cells that are JSON lists of turns, one for each, as in arena data."""
    listed = [c for c in cells.columns if (m := (cells.markups or {}).get(c)) and m in LISTS]
    if not {cells.prompt, cells.first, cells.second} <= {*listed}:
        return row
    unwrapped = dict(row)
    for column in listed:
        markup = (cells.markups or {})[column]
        assert markup.parse is not None
        turns = markup.parse(to_text(row.get(column), column))
        if not isinstance(turns, list) or len(turns) != 1:
            raise LeftOutError(
                "several turns are compared at once", f"{column}: {str(turns)[:60]}",
                "compare replies to one prompt", is_choice=True,
            )  # fmt: skip
        unwrapped[column] = turns[0]
    return unwrapped
