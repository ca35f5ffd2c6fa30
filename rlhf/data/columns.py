"""Columns of a source: values by name or dotted path, and the settings that name them."""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

from rlhf.config import DataConfig
from rlhf.errors import ConfigError

#: Values of a row by column.
Row: TypeAlias = Mapping[str, Any]
#: What `value_of` returns for a column that a row does not have.
MISSING: Final = object()


def value_of(row: Row, path: str) -> Any:
    """Return a column's value, or MISSING.

    A column of that very name wins; else `a.b.0` is item 0 of the list in field `b` of column `a`.
    """
    if path in row:
        return row[path]
    value: Any = row
    for part in path.split("."):
        if isinstance(value, Mapping) and part in value:
            value = value[part]
        elif isinstance(value, Sequence) and not isinstance(value, str) and part.isdecimal():
            if int(part) >= len(value):
                return MISSING
            value = value[int(part)]
        else:
            return MISSING
    return value


def cell_of(row: Row, path: str) -> Any:
    """Return a column's value, None for a column that the row does not have."""
    value = value_of(row, path)
    return None if value is MISSING else value


def filled_cells(sample: Sequence[Row], path: str) -> list[Any]:
    """Return the values of a column, without null and empty ones."""
    return [value for row in sample if (value := cell_of(row, path)) not in (None, "")]


def is_missing(value: Any) -> bool:
    """Return whether a cell is empty: no column, null, no text, or the NaN that pandas writes."""
    is_nan = isinstance(value, float) and math.isnan(value)
    return is_nan or value is MISSING or value is None or value == ""


def plain_name(column: str) -> str:
    """Return a column's name in lower case, its words joined by underscores."""
    spaced = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", column.strip())
    return re.sub(r"[\s\-.]+", "_", spaced).lower()


def _is_field_of_items(sample: Sequence[Row], path: str) -> bool:
    """Return whether a path leads through a list of objects: `candidates.scores.bleu`."""
    column, _, field = path.partition(".")
    lists = [value for row in sample if isinstance(value := row.get(column), list | tuple)]
    items = [item for value in lists for item in value if isinstance(item, Mapping)]
    return bool(field) and any(value_of(item, field) is not MISSING for item in items)


def check_settings(
    columns: Sequence[str], sample: Sequence[Mapping[str, Any]], config: DataConfig
) -> None:
    """Refuse columns that are set and don't exist, and one that is set twice.

    Raises:
        ConfigError: With the names of the columns that exist.
    """
    settings = ["prompt_column", "chosen_column", "rejected_column", "system_column",
                "label_column", "reference_column"]  # fmt: skip
    pinned = [(name, getattr(config, name)) for name in settings]
    pinned += [("metadata_columns", column) for column in config.metadata_columns]
    pinned += [("score_weights", column) for column in config.score_weights]
    for name, column in pinned:
        if column is None or any(value_of(row, column) is not MISSING for row in sample):
            continue
        if column in columns or (name == "label_column" and _is_field_of_items(sample, column)):
            continue
        close = difflib.get_close_matches(column, columns, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        holders = [
            c for c in columns if any(isinstance(row.get(c), list | Mapping) for row in sample)
        ]
        if holders and not hint:
            hint = f" (fields of objects and items of lists are named as {holders[0]}.0.text)"
        raise ConfigError(
            f"data.{name} = {column!r}: not a column of the source, which has {_listed(columns)}"
            f"{hint}; correct it, or remove it to find the column by name"
        )
    roles: dict[str, str] = {}
    for name, column in pinned[:3]:
        if column is not None and column in roles:
            raise ConfigError(
                f"data.{name} = {column!r}: is {roles[column]} too; set another column"
            )
        if column is not None:
            roles[column] = f"data.{name}"
    if config.reference_column in roles:
        raise ConfigError(
            f"data.reference_column = {config.reference_column!r}: is "
            f"{roles[config.reference_column]} too; set the column of the right answers"
        )


def _listed(columns: Sequence[str]) -> str:
    text = ", ".join(map(str, columns))
    return text if len(text) <= 200 else f"{text[:199]}…"
