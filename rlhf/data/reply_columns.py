"""Columns of two replies, told from columns of labels, ids and numbers."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.chat import REPLY_KEYS
from rlhf.data.columns import Row, cell_of
from rlhf.data.label_words import names_a_reply, relation
from rlhf.data.ratings import CONVERSATIONS, REPLIES
from rlhf.data.reply_lists import find_unranked
from rlhf.errors import ConfigError

#: Words for a reply in the names of two columns that differ in a suffix alone.
REPLY_WORDS = (
    "response", "answer", "output", "completion", "reply", "text", "conversation", "generation",
    "candidate", "option", "human_ref", "assistant", "summary", "message", "model_response",
    "continuation", "chat", "responses",
)  # fmt: skip
SUFFIXES = (("a", "b"), ("1", "2"), ("0", "1"), ("left", "right"), ("first", "second"))
#: Columns with the first part of both replies, such as the steps before the one that differs.
STARTS = ("initial_reason_steps", "assistant_prefix", "response_prefix", "reply_prefix",
          "partial_response", "prefill")  # fmt: skip
#: Different values of so many rows that are labels, whatever they are, beside columns of replies.
_FEW, _MANY = 4, 12
#: Share of labels above which a column of labels and texts is refused.
_SOME = 0.1
#: Share of numbers or ids from which a column holds nothing else.
_MOSTLY = 0.9
#: Longest name of a model, in characters.
_LONGEST_NAME = 80


def reply_columns(
    names: Mapping[str, str], sample: Sequence[Row]
) -> tuple[tuple[str, str], tuple[str, str]] | None:
    """Return two columns of replies whose names differ in a suffix, and the suffixes."""
    for suffixes in SUFFIXES:
        for word in REPLY_WORDS:
            replies = _with_suffixes(names, word, suffixes)
            if replies is not None and hold_text(sample, replies):
                return replies, suffixes
    return None


def _with_suffixes(
    names: Mapping[str, str], word: str, suffixes: tuple[str, str]
) -> tuple[str, str] | None:
    stem, _, tail = word.partition("_") if word.startswith("model_") else (word, "", "")
    for form in ("{0}_{1}", "{0}{1}", "{1}_{0}", "{0}_{1}_{2}", "{0}{1}_{2}", "{0}_{2}_{1}"):
        if ("{2}" in form) != bool(tail):
            continue
        one, other = (form.format(stem, suffix, tail) for suffix in suffixes)
        if one in names and other in names:
            return names[one], names[other]
    return None


def with_start(start: Any, reply: str) -> str:
    """Return a reply with the first part that stands in a column of its own."""
    if not isinstance(start, str) or not start.strip() or reply.startswith(start):
        return reply
    is_apart = start[-1].isspace() or reply[:1].isspace()
    return f"{start}{reply}" if is_apart else f"{start} {reply}"


def hold_text(sample: Sequence[Row], columns: Sequence[str]) -> bool:
    """Return whether columns hold replies, not scores or names of models."""
    values = [row.get(column) for row in sample for column in columns]
    return any(isinstance(value, str | list | dict) and value for value in values)


def are_labels(names: Mapping[str, str], sample: Sequence[Row], chosen: str, rejected: str) -> bool:
    """Return whether the preferred reply's column holds labels of replies in other columns."""
    others = {n: c for n, c in names.items() if c not in (chosen, rejected)}
    listed = find_unranked(others, sample)
    values = [(row, v) for row in sample if (v := cell_of(row, chosen)) not in (None, "")]
    holders = listed is not None or reply_columns(others, sample) is not None
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
        or any(relation(value, suffixes) for suffixes in SUFFIXES)
        or value.strip().lstrip("-").isdecimal()
        or (is_short and any(value == cell_of(row, c) for c in columns if _names_model(c)))
        or any(value in item.values() for item in fields)
    )


def _names_model(column: str) -> bool:
    """Return whether a column's name is one of models' names."""
    return bool(re.search(r"model|policy|name|system_[ab12]|source_[ab12]|engine", column.lower()))


#: Names of a pair that are names of counts, probabilities and flags too.
_VAGUE = ("better", "worse", "best", "worst", "positive", "negative", "pos", "neg", "good", "bad",
          "winner", "loser", "win", "lose", "accepted", "preferred")  # fmt: skip
_ID = re.compile(r"(?=.*\d)[\w.:/-]{1,64}")
_FLAGS = ("true", "false")


def check_replies(
    names: Mapping[str, str], sample: Sequence[Row], prompt: str | None, pair: tuple[str, str]
) -> None:
    """Refuse columns of a pair, found by their names, that hold numbers, flags or ids.

    Raises:
        NotRepliesError: With the settings that take them as replies all the same.
    """
    for column in pair:
        values = [v for row in sample for v in _flat(cell_of(row, column))]
        kinds = [_kind_of(value) for value in values]
        for kind in ("numbers", "flags", "ids"):
            if not values or kinds.count(kind) <= len(values) * _MOSTLY:
                continue
            is_beside = _has_replies(names, sample, {prompt, *pair})
            is_vague = any(names.get(name) == column for name in _VAGUE)
            if kind == "ids" or is_beside or (is_vague and kind == "numbers"):
                raise NotRepliesError(
                    f"data.chosen_column: {column} seems to hold {kind} ({values[0]!r}), not "
                    "replies; give the texts of the replies, or set data.chosen_column and "
                    f"data.rejected_column to {pair[0]} and {pair[1]} if these are the replies"
                )


class NotRepliesError(ConfigError):
    """Columns are named like those of a pair, but hold no replies; another format may fit."""


def _flat(value: Any) -> list[Any]:
    """Return the values of a cell that are no messages."""
    items = value if isinstance(value, list | tuple) else [value]
    return [item for item in items if item not in (None, "")]


def _kind_of(value: Any) -> str:
    if isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in _FLAGS):
        return "flags"
    if isinstance(value, int | float):
        return "numbers"
    if not isinstance(value, str):
        return "others"
    text = value.strip()
    if re.fullmatch(r"[+-]?\d*\.?\d+", text):
        return "numbers"
    return "ids" if _ID.fullmatch(text) and re.search(r"[A-Za-z]", text) else "texts"


def _has_replies(names: Mapping[str, str], sample: Sequence[Row], pair: set[str | None]) -> bool:
    """Return whether columns beside a pair hold replies."""
    others = {n: c for n, c in names.items() if c not in pair}
    single = [n for n in (*REPLIES, *CONVERSATIONS) if n in others]
    return (
        any(_hold_words(sample, others[n]) for n in single)
        or find_unranked(others, sample) is not None
        or reply_columns(others, sample) is not None
    )


def _hold_words(sample: Sequence[Row], column: str) -> bool:
    values = [v for row in sample if (v := cell_of(row, column))]
    texts = [v for v in values if not isinstance(v, str) or len(v.split()) > 1]
    return bool(values) and len(texts) > len(values) / 2
