"""Words of labels that compare two replies, and the verdict that each of them means."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any, Literal

from rlhf.config import DataConfig
from rlhf.data.columns import Row, is_missing, value_of
from rlhf.errors import ConfigError

Verdict = Literal["first", "second", "tie"]

_REPLY_NAMES = ("response", "model", "assistant", "answer", "output", "completion", "option")
TIES = (
    "tie", "tied", "both", "both bad", "bothbad", "tie bothbad", "neither", "equal", "draw", "none",
    "same", "no preference", "equally good", "equally bad",
)  # fmt: skip
_WORDS: Mapping[str, Verdict] = {
    **dict.fromkeys(("left", "first", "a", "response a", "model a", "assistant a", "answer a"),
                    "first"),
    **dict.fromkeys(("right", "second", "b", "response b", "model b", "assistant b", "answer b"),
                    "second"),
    **dict.fromkeys(TIES, "tie"),
}  # fmt: skip
#: Judgements of language models: `[[A>>B]]`, and the sentence "Response 1 is slightly better".
_RELATION = re.compile(r"\[*\s*(\w)\s*(>{1,3}|<{1,3}|={1,3})\s*(\w)\s*\]*")
_IS_BETTER = re.compile(
    r"@?(?:(?:response|answer|model|assistant|output|option) )?(\w) is "
    r"(?:(?:much|slightly|significantly|clearly|far|a bit|a little|somewhat) )?better\b"
)
_CONTRARY = re.compile(r"\b(?:but|however|although|though|only|not)\b")
#: Fields of an object that hold its vote.
_VOTE_KEYS = ("selected", "value", "label", "preference", "winner", "choice")
#: Nested lists and objects around a vote.
_MAX_DEPTH = 8
#: Settings of `data.labels`, each of one value.
_SETTABLE = ("first", "second", "tie")
#: Share of the labels that must be understood; others are left out one by one.
_ENOUGH = 0.5


def relation(value: Any, suffixes: tuple[str, str]) -> Verdict | None:
    """Return the verdict of `A>>B`, `A=B` or "Response 1 is slightly better"; None for others."""
    if not isinstance(value, str) or len(value) > 1000:
        return None
    text = value.strip().casefold()
    if match := _RELATION.fullmatch(text):
        one, sign, other = match.groups()
        if {one, other} != set(suffixes):
            return None
        if sign[0] == "=":
            return "tie"
        return "first" if (one == suffixes[0]) == (sign[0] == ">") else "second"
    match = _IS_BETTER.match(text)
    # "A is better formatted, but B is better overall" says nothing certain
    is_sure = len(set(_IS_BETTER.findall(text))) == 1 and not _CONTRARY.search(text)
    if match and is_sure and match.group(1) in suffixes:
        return "first" if match.group(1) == suffixes[0] else "second"
    return None


def label_words(
    label: str, sample: Sequence[Row], replies: tuple[str, ...],
    suffixes: tuple[str, str], config: DataConfig,
) -> dict[str, Verdict]:  # fmt: skip
    """Return the verdict of each label; a label may also be the text of one of the columns.

    Args:
        label: Column of the label.
        sample: First rows.
        replies: Columns of the two replies, and of their models' names if there are such.
        suffixes: The part in which the two replies' columns differ.
        config: Meaning of the labels.
    """
    settings = config.labels
    if settings.first is not None or settings.second is not None:
        meanings: dict[Verdict, str | None] = {
            "first": settings.first, "second": settings.second, "tie": settings.tie,
        }  # fmt: skip
        return _set_words(meanings)
    words: dict[str, Verdict] = {**_WORDS}
    if settings.tie is not None:
        words[exact_label(settings.tie)] = "tie"
    sides: tuple[tuple[str, str, Verdict], ...] = (
        (replies[0], suffixes[0], "first"), (replies[1], suffixes[1], "second"),
    )  # fmt: skip
    for column, suffix, verdict in sides:
        words[plain_label(column)] = verdict
        words |= {f"{word} {suffix}": verdict for word in _REPLY_NAMES}
    votes = [vote for row in sample for vote in votes_of(value_of(row, label))]
    values = Counter(plain_label(vote) for vote in votes)
    numbers = {value for value in values if is_number(value)}
    if plain_label(replies[0]) == "human ref a" and label in ("labels", "label"):
        words |= {"1": "first", "0": "second"}  # Stanford Human Preferences
    elif "2" in numbers <= {"1", "1.5", "2"} and suffixes in (("1", "2"), ("a", "b")):
        words |= {"1": "first", "2": "second", "1.5": "tie"}  # AlpacaEval's draws are 1.5
    elif suffixes == ("0", "1") and label.endswith(("_id", "_idx", "_index")):
        words |= {"0": "first", "1": "second"}
    texts = {
        plain_label(text)
        for row in sample
        for column in replies
        if isinstance(text := value_of(row, column), str)
    }
    known = sum(count for value, count in values.items() if value in words or value in texts)
    known += sum(
        relation(vote, suffixes) is not None
        for vote in votes
        if plain_label(vote) not in words and plain_label(vote) not in texts
    )
    if known < _ENOUGH * sum(values.values()) or not values:
        raise ConfigError(
            f"data.label_column = {label!r}: its values ({_most_common(values)}) don't say which "
            f"of {replies[0]} and {replies[1]} is better; "
            f"{_cure(label, votes, len(numbers), replies)}"
        )
    return words


def _most_common(values: Counter[str]) -> str:
    return ", ".join(f"{value!r} × {count}" for value, count in values.most_common(5)) or "none"


def _cure(label: str, votes: Sequence[Any], numbers: int, replies: tuple[str, ...]) -> str:
    """Return the settings that tell the meaning of labels, or another column to set."""
    if numbers > len(_SETTABLE):
        return (
            "they are a scale, of which the settings can't give a meaning to each value; add a "
            f"column that names the better reply, {replies[0]} or {replies[1]}"
        )
    first = votes[0] if votes else None
    fields = [f"{label}.{key}" for key in _VOTE_KEYS if isinstance(first, Mapping) and key in first]
    if len(fields) > 1:
        return f"set data.label_column to one of {', '.join(fields)}"
    return (
        f"set data.labels.first to the value that prefers {replies[0]}, data.labels.second to "
        "the other, and data.labels.tie if there are ties"
    )


def _set_words(meanings: Mapping[Verdict, str | None]) -> dict[str, Verdict]:
    """Return the verdicts of the labels that are set, which may differ in marks alone: A>B, A=B."""
    words: dict[str, Verdict] = {}
    for name, value in meanings.items():
        if value is None:
            continue
        if other := words.get(exact_label(value)):
            raise ConfigError(
                f"data.labels.{name} = {value!r}: data.labels.{other} and data.labels.{name} have "
                "the same value; set each to a value of its own"
            )
        words[exact_label(value)] = name
    return words


def names_a_reply(value: Any, columns: Sequence[str]) -> bool:
    """Return whether a value is a label or a column's name rather than a reply."""
    return plain_label(value) in _WORDS or plain_label(value) in {
        plain_label(column) for column in columns
    }


def votes_of(value: Any, depth: int = 0) -> list[Any]:
    """Return the votes of one cell: of a list each item, of an object its value."""
    if is_missing(value):
        return []
    if depth > _MAX_DEPTH:
        return ["a deeply nested value"]
    if isinstance(value, Mapping):
        found = [key for key in _VOTE_KEYS if key in value]
        # Of {"label": …, "winner": …} nothing says which one is the vote.
        return votes_of(value[found[0]], depth + 1) if len(found) == 1 else [value]
    if isinstance(value, list | tuple):
        return [vote for item in value for vote in votes_of(item, depth + 1)]
    if isinstance(value, str) and selects_side(value):
        return votes_of(json.loads(value), depth + 1)
    return [value]


def plain_label(value: Any) -> str:
    """Return a label as text: 1.0 and "1" alike, case and marks ignored."""
    text = exact_label(value)
    if is_number(text):
        return text
    return " ".join("".join(c if c.isalnum() else " " for c in text).split())


def exact_label(value: Any) -> str:
    """Return a label as text: 1.0 and "1" alike, case and what joins words ignored."""
    if isinstance(value, float) and value.is_integer():
        value = int(value)
    text = str(value).strip().casefold()
    if is_number(text):
        return text.removesuffix(".0")
    return re.sub(r"(?<=[^\W_])[\s_-]+(?=[^\W_])", " ", text)


def is_marked(value: Any) -> bool:
    """Return whether a mark changes a label's meaning: !B, -B, and the grades A+ and B-."""
    text = str(value).strip()
    return isinstance(value, str) and (text[:1] in "!-~¬^" or text[-1:] in "+-") and text != "-"


def is_number(text: str) -> bool:
    """Return whether a text is a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def selects_side(cell: Any) -> bool:
    """Return whether a cell is a selection of Label Studio's, also as JSON text."""
    if isinstance(cell, str):
        return re.fullmatch(r'\s*\{\s*"selected"\s*:\s*"\w+"\s*\}\s*', cell) is not None
    return isinstance(cell, Mapping) and {*cell} == {"selected"}
