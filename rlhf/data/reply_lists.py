"""Cells that hold several replies to one prompt: lists, objects by id, and JSON of either."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from rlhf.data.chat import REPLY_KEYS, ROLE_KEYS
from rlhf.data.columns import Row, cell_of

#: Most replies of one row: their pairs grow with the square.
MAX_REPLIES = 200
#: Columns of such cells.
LISTS = (
    "completions", "responses", "outputs", "output", "replies", "candidates", "answers",
    "generations", "responses_and_scores", "summaries", "samples", "ranking", "ranked_responses",
    "ranked", "choices",
)  # fmt: skip
#: Field of a reply that holds its key in an object of replies.
_KEY = "_key"


def items_of(value: Any) -> Any:
    """Return a list of replies; an object with a reply under each id becomes one."""
    value = parsed_list(value)
    if not isinstance(value, Mapping) or len(value) < 2 or {*value} & {*REPLY_KEYS, *ROLE_KEYS}:
        return value
    if all(isinstance(reply, str) for reply in value.values()):
        return [{_KEY: key, "text": reply} for key, reply in value.items()]
    if all(isinstance(reply, Mapping) and {*reply} & {*REPLY_KEYS} for reply in value.values()):
        return [{_KEY: key, **reply} for key, reply in value.items()]
    return value


def parsed_list(value: Any) -> Any:
    """Return a list as it is, and one that a cell of CSV holds as JSON parsed."""
    if isinstance(value, str) and value.lstrip()[:1] in ("[", "{"):
        try:
            return json.loads(value)
        except (ValueError, RecursionError):
            return value
    return value


def key_of(item: Any) -> Any:
    """Return the key under which an object held a reply."""
    return item.get(_KEY) if isinstance(item, Mapping) else None


def text_of(item: Any) -> Any:
    """Return the text of a reply, which may be a field of it."""
    if not isinstance(item, Mapping):
        return item
    return next((item[key] for key in REPLY_KEYS if key in item), None)


def filled_lists(sample: Sequence[Row], column: str) -> list[list[Any]]:
    """Return the lists in a column that are not empty."""
    found = [items_of(cell_of(row, column)) for row in sample]
    return [value for value in found if isinstance(value, list) and value]


def hold_lists(sample: Sequence[Row], column: str) -> bool:
    """Return whether a cell of a column is a list or an object."""
    return any(isinstance(parsed_list(cell_of(row, column)), list | Mapping) for row in sample)


def is_list_of_replies(sample: Sequence[Row], column: str) -> bool:
    """Return whether most cells of a column are lists of texts or objects, and none of messages."""
    lists = filled_lists(sample, column)
    filled = sum(cell_of(row, column) not in (None, "") for row in sample)
    return len(lists) > filled / 2 and all(
        isinstance(item, str) or (isinstance(item, Mapping) and "role" not in item)
        for values in lists
        for item in values
    )


def holds_reply(sample: Sequence[Row], column: str, reply: str) -> bool:
    """Return whether most lists of a column hold the text of another column."""
    rows = [(cell_of(row, reply), items_of(cell_of(row, column))) for row in sample]
    known = [(text, items) for text, items in rows if isinstance(items, list) and items]
    return sum(any(text_of(i) == text for i in items) for text, items in known) > len(known) / 2


def find_unranked(names: Mapping[str, str], sample: Sequence[Row]) -> str | None:
    """Return a column with lists of replies."""
    return next(
        (names[n] for n in LISTS if n in names and is_list_of_replies(sample, names[n])), None
    )
