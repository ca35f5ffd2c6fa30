"""Values of a row by column, also nested ones by a dotted path."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Final, TypeAlias

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
