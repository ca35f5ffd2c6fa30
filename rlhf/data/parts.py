"""Records of a part with the layout that reads them: found in the first rows, held to the last.

A layout that can't be found in the first rows is looked for in more of them. A column that first
appears later is taken into the layout if that leaves the meaning of earlier rows as it was.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence

from rlhf.config import DataConfig
from rlhf.data.formats import Layout, detect
from rlhf.data.margins import add_margins
from rlhf.data.records import Converted, Record
from rlhf.data.sources import Part
from rlhf.errors import ConfigError

#: Rows of a file that its format is detected from, and those it is looked for in if they don't do.
SAMPLE_ROWS = 200
MORE_ROWS = 10_000
#: Most characters of those rows: a row may hold megabytes.
MAX_SAMPLE_CHARS = 50_000_000
#: Times that a layout is found anew for a column that appears later.
MAX_CHANGES = 200


def with_layouts(
    part: Part, config: DataConfig, limit: int | None, report: Callable[[Layout], None]
) -> Iterator[tuple[Record, Layout | None]]:
    """Return a part's records, each with its layout.

    Args:
        part: A file of the source.
        config: Format and columns that the user set.
        limit: Read at most this many rows.
        report: Called with the layout, and again whenever later columns change it.

    Returns:
        Records in the order of the file; the layout is None if no row can be parsed.

    Raises:
        ConfigError: No format fits, or a later column would change the meaning of earlier rows.
    """
    records = itertools.islice(part.records(), limit)
    head = list(itertools.islice(records, SAMPLE_ROWS))
    try:
        layout = _layout(part, head, config)
    except ConfigError:
        more = _more(records)
        if not more:
            raise
        head += more
        layout = _layout(part, head, config)
    if layout is not None:
        report(layout)
    known = dict.fromkeys(name for r in head if r.fields is not None for name in r.fields)
    changes = 0
    for record in itertools.chain(head, records):
        if record.fields is not None and layout is not None and record.fields.keys() - known.keys():
            new = [name for name in record.fields if name not in known]
            known |= dict.fromkeys(new)
            changes += 1
            if changes <= MAX_CHANGES:
                layout = _changed(part, layout, [*head[:SAMPLE_ROWS], record], new, config)
                report(layout)
        yield record, layout


def convert(layout: Layout, record: Record) -> Converted:
    """Return everything that a row says.

    Raises:
        LeftOutError: It can't be used.
        ConfigError: Its values have another meaning than those of the first rows.
    """
    try:
        return layout.convert(record.fields or {})
    except ConfigError as error:
        raise ConfigError(f"{error} (in {record.file}:{record.line})") from None


def _more(records: Iterator[Record]) -> list[Record]:
    """Return further rows for a sample, of limited length."""
    more: list[Record] = []
    length = 0
    for record in itertools.islice(records, MORE_ROWS):
        more.append(record)
        values = record.fields.values() if record.fields else ()
        length += sum(len(value) for value in values if isinstance(value, str | list))
        if length > MAX_SAMPLE_CHARS:
            break
    return more


def _layout(part: Part, head: Sequence[Record], config: DataConfig) -> Layout | None:
    """Detect a part's format from its first rows; None if none of them can be parsed."""
    sample = [record.fields for record in head if record.fields is not None]
    if not sample:
        return None
    columns = list(dict.fromkeys(name for row in sample for name in row))
    try:
        layout = detect(columns, sample, config, text_cells=part.text_cells)
        return add_margins(layout, columns, sample, config)
    except ConfigError as error:
        raise ConfigError(f"{error} (in {part.name})") from None


def _changed(
    part: Part, layout: Layout, sample: Sequence[Record], new: Sequence[str], config: DataConfig
) -> Layout:
    """Return the layout with later columns.

    Raises:
        ConfigError: With them, earlier rows would have another meaning.
    """
    try:
        found = _layout(part, sample, config)
    except ConfigError:
        found = None
    same = found is not None and (found.name, found.notes[:1]) == (layout.name, layout.notes[:1])
    if found is None or not same or not {*layout.columns} <= {*found.columns}:
        row = sample[-1]
        raise ConfigError(
            f"data.source: {', '.join(new)} first appears in {row.file}:{row.line}, and with it "
            f"the rows would be read in another way than those before ({layout.notes[0]}); give "
            "all rows of a file the same columns, or set data.format and the columns to read"
        )
    return found
