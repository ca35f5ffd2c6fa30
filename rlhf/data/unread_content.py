"""Columns that a reply may depend on and no model here reads: images, audio, video, tools.

A row with content in such a column is left out: learned as text alone, its reply would answer what
the model never sees. Columns of such names that are empty, or that settings name, are no fault.
"""

from __future__ import annotations

import math
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cache
from typing import Any

from rlhf.config import DataConfig
from rlhf.data.columns import Row, plain_name
from rlhf.data.records import LeftOutError

_MEDIA = re.compile(
    r"(image|img|picture|photo|video|audio)s?"
    r"(_(url|uri|path|file|file_name|filename|name|id|base64|bytes|data|list)s?)?"
)
_TOOLS = re.compile(r"tools|tool_calls?|functions|function_calls?|tool_definitions|available_tools")
#: Objects whose fields exports and chat formats read.
_HOLDERS = ("input", "data", "fields", "prompt")
#: Texts that stand for no content.
_NOTHING = frozenset(("", "[]", "{}", "null", "none", "nan", "false", "0"))


def check_unread(
    row: Row, read: Collection[str], config: DataConfig, setting: str = "source"
) -> None:
    """Refuse a row with content that the layout does not read and a reply may depend on.

    Args:
        row: Values by column.
        read: Columns that the layout reads.
        config: Settings that name columns, which the user knows of.
        setting: The setting of the source, for the cure.

    Raises:
        LeftOutError: With the column, and the setting that uses the row without it.
    """
    for path, value in _candidates(row):
        if path in read or not has_content(value):
            continue
        if path in config.ignore_columns or path in config.metadata_columns:
            continue
        if path == config.reference_column:
            continue
        cure = f"data.ignore_columns={path}"
        if setting != "source":  # the columns of the section are those of the pairs
            cure = f"data.{setting}='{{source: …, ignore_columns: {path}}}'"
        raise LeftOutError(
            f"{path} holds what a model of text does not see", _seen(value),
            f"leave such rows out, or set {cure} if the replies do not depend on it",
        )  # fmt: skip


def has_content(value: Any) -> bool:
    """Return whether a cell holds anything; empty lists and objects of nulls do not."""
    if isinstance(value, str):
        return value.strip().lower() not in _NOTHING
    if isinstance(value, Mapping):
        return any(map(has_content, value.values()))
    if isinstance(value, Sequence) and not isinstance(value, bytes):
        return any(map(has_content, value))
    if isinstance(value, float) and math.isnan(value):
        return False
    return bool(value)


def _candidates(row: Row) -> Iterator[tuple[str, Any]]:
    for name, value in row.items():
        if _is_candidate(name):
            yield name, value
        elif name in _HOLDERS and isinstance(value, Mapping):
            for key, inner in value.items():
                if isinstance(key, str) and _is_candidate(key):
                    yield f"{name}.{key}", inner


@cache
def _is_candidate(column: str) -> bool:
    name = plain_name(column)
    return bool(_MEDIA.fullmatch(name) or _TOOLS.fullmatch(name))


def _seen(value: Any) -> str:
    """Describe a cell without its bytes."""
    shown = f" {value[:40]!r}" if isinstance(value, str) else ""
    return f"{type(value).__name__}{shown}"
