"""Listings of the commands: tables that fit 80 columns, whole by `--wide`, as data by `--json`."""

from __future__ import annotations

import json as json_module
import math
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

from cyclopts import Parameter
from rich.console import RenderableType
from rich.measure import Measurement
from rich.table import Table

from rlhf.plain_text import one_line
from tasks.console import PlainConsole, console, styled

if TYPE_CHECKING:
    from rich.text import Text

WideOption = Annotated[bool, Parameter(help="Show all columns, and texts whole.")]
JsonOption = Annotated[bool, Parameter(help="Print JSON.")]

#: Characters of a text that a narrow table shows; more would push the next row off the screen.
CUT = 160
#: Up to this length a cell that is not the last one stays on one line.
UNBROKEN = 34
#: Columns that a table gets whose reader is a pipe, or who asked for all of it.
ENDLESS = 10_000


class Column(NamedTuple):
    """One column of a listing."""

    title: str
    """Its heading."""
    key: str
    """Key of the value in each row."""
    wide: bool = False
    """Whether only `--wide` shows it."""
    show: Callable[[Any], str | Text] = str
    """Makes the value text; it is not asked about None."""
    right: bool = False
    """Whether it is aligned to the right, as numbers are."""


def show_listing(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], *, wide: bool = False,
    json: bool = False, on: PlainConsole = console,
) -> None:  # fmt: skip
    """Print rows as a table, or as a JSON list.

    On a terminal, long texts of the last column are cut and continued on the next line; a pipe, and
    `wide`, get one line for each row.

    Args:
        rows: The values by key; JSON prints all of them, whether there is a column or not.
        columns: Those of the table; the last one gets the width that is left.
        wide: Print all columns.
        json: Print JSON instead.
        on: The console.
    """
    if json:
        show_json([*rows], on=on)
        return
    table = listing_table(rows, columns, wide=wide, on=on)
    print_listing(table, table, wide=wide, on=on)


def listing_table(
    rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], *, wide: bool = False,
    on: PlainConsole = console,
) -> Table:  # fmt: skip
    """Return rows as the table that `show_listing` prints."""
    whole = wide or not on.is_terminal
    shown = [column for column in columns if wide or not column.wide]
    cells = [[_cell(column, row.get(column.key), whole) for column in shown] for row in rows]
    table = Table(box=None, pad_edge=False, header_style="bold")
    for position, column in enumerate(shown):
        longest = max((len(line[position]) for line in cells), default=0)
        table.add_column(
            column.title, overflow="fold", justify="right" if column.right else "left",
            no_wrap=whole or (longest <= UNBROKEN and position < len(shown) - 1),
        )  # fmt: skip
    for line in cells:
        table.add_row(*line)
    return table


def print_listing(
    what: RenderableType, table: Table, *, wide: bool = False, on: PlainConsole = console
) -> None:
    """Print something with a listing's table in it, at the width that the table needs.

    That of a whole table may be beyond the terminal's, to which rich would cut it.
    """
    before = on._width
    if wide or not on.is_terminal:
        endless = on.options.update(width=ENDLESS)
        on._width = max(Measurement.get(on, endless, table).maximum, on.width)
    try:
        on.print(what, crop=False)
    finally:
        on._width = before


def show_json(value: Any, *, indent: int | None = 1, on: PlainConsole = console) -> None:
    """Print a value as JSON in ASCII, which no terminal acts upon; null for NaN and infinity.

    Objects of other types than JSON's are printed as text.
    """
    text = json_module.dumps(
        _finite(value), indent=indent, ensure_ascii=True, allow_nan=False, default=str
    )
    on.print(text, soft_wrap=True)


def _finite(value: Any) -> Any:
    """Return a value with null in place of numbers that are not finite, which JSON has not."""
    if isinstance(value, Mapping):
        return {str(key): _finite(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(each) for each in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _cell(column: Column, value: Any, whole: bool) -> Text:
    """Return a value as text on one line, cut unless the table shall be whole."""
    text = "" if value is None else column.show(value)
    if not isinstance(text, str):
        return text
    line = one_line(text)
    return styled(line if whole or len(line) <= CUT else f"{line[:CUT].rstrip()}…")
