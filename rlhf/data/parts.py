"""Records of a part with the layout that reads them: found in the first rows, held to the last.

A layout that can't be found in the first rows is looked for in more of them. A column that first
appears later is taken into the layout if that leaves the meaning of earlier rows as it was; one
that no layout of pairs could read is listed as unused. Pairs, demonstrations and prompts of their
own are read by the same rule.
"""

from __future__ import annotations

import itertools
import shlex
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Generic, Protocol, TypeVar, runtime_checkable

from rlhf.config import DataConfig
from rlhf.data.columns import Row
from rlhf.data.formats import Layout, detect
from rlhf.data.margins import add_margins
from rlhf.data.records import Converted, Record
from rlhf.data.sources import Part
from rlhf.data.unread_content import check_unread
from rlhf.data.vocabulary import could_matter
from rlhf.errors import ConfigError, NoPreferences

#: Rows of a file that its format is detected from, and those it is looked for in if they don't do.
SAMPLE_ROWS = 200
MORE_ROWS = 10_000
#: Most characters of those rows: a row may hold megabytes.
MAX_SAMPLE_CHARS = 50_000_000
#: Times that a layout is found anew for a column that appears later.
MAX_CHANGES = 50
#: Later columns that are listed by name among those that are not read.
MAX_LISTED = 1000


@runtime_checkable
class AnyLayout(Protocol):
    """Layout of pairs, or of rows of their own: all that is needed to compare two of them."""

    @property
    def name(self) -> str:
        """Name of the format."""
        ...

    @property
    def columns(self) -> tuple[str, ...]:
        """Columns that are read."""
        ...

    @property
    def notes(self) -> tuple[str, ...]:
        """Sentences for the user; the first one says which columns are taken for what."""
        ...


LayoutT = TypeVar("LayoutT", bound=AnyLayout)


@dataclass(frozen=True)
class Detector(Generic[LayoutT]):
    """Detection of a layout, and the words for errors about it."""

    detect: Callable[[Sequence[str], Sequence[Row], bool], LayoutT]
    """Returns the layout by columns, first rows, and whether all cells are text; raises
    ConfigError."""
    field: str
    """The setting, which begins a message: `data.source`."""
    settings: str
    """Settings that fix a layout: `data.format and the columns to read`."""
    inspect: str
    """Command that shows more of the source."""
    could_matter: Callable[[str, Row, LayoutT], bool] = lambda *_: True
    """Whether a later column, of this row, could change the layout."""
    with_unused: Callable[[LayoutT, Sequence[str]], LayoutT] = lambda layout, _: layout
    """Adds columns that are not read."""


def with_layouts(
    part: Part, config: DataConfig, limit: int | None, report: Callable[[Layout], None]
) -> Iterator[tuple[Record, Layout | None]]:
    """Return a part's records of preferences, each with its layout, by `records_with_layouts`.

    Args:
        part: A file of the source.
        config: Format and columns that the user set.
        limit: Read at most this many rows.
        report: Called with the layout, and again whenever later columns change it.
    """

    def find(columns: Sequence[str], sample: Sequence[Row], text_cells: bool) -> Layout:
        layout = detect(columns, sample, config, text_cells=text_cells)
        return add_margins(layout, columns, sample, config)

    source = config.eval_source if part.held_out and config.eval_source else config.source
    detector = Detector(
        find, "data.source", "data.format and the columns to read",
        f"rlhf data inspect {shlex.quote(str(source))}",
        lambda name, row, layout: could_matter(name, row, layout, config),
        lambda layout, names: replace(layout, unused=(*layout.unused, *names)),
    )  # fmt: skip
    return records_with_layouts(part, detector, limit, report)


def records_with_layouts(
    part: Part,
    detector: Detector[LayoutT],
    limit: int | None,
    report: Callable[[LayoutT], None],
) -> Iterator[tuple[Record, LayoutT | None]]:
    """Return a part's records, each with its layout.

    Args:
        part: A file of the source.
        detector: Finds the layout.
        limit: Read at most this many rows.
        report: Called with the layout, and again whenever later columns change it.

    Returns:
        Records in the order of the file; the layout is None if no row can be parsed.

    Raises:
        ConfigError: No format fits, or a later column would change the meaning of earlier rows.
    """
    records = itertools.islice(part.records(), limit)
    head, layout = _first_layout(part, records, detector)
    if layout is not None:
        report(layout)
    sample = _fields(head)
    known = dict.fromkeys(name for row in sample for name in row)
    changes, unused = 0, list[str]()
    for record in itertools.chain(head, records):
        row = record.fields
        if row is not None and layout is not None and not row.keys() <= known.keys():
            new = [name for name in row if name not in known]
            known |= dict.fromkeys(new)
            if any(detector.could_matter(name, row, layout) for name in new):
                changes += 1
                if changes > MAX_CHANGES:
                    raise _too_many_changes(record, new, detector)
                sample.append(row)  # stays, or a third column would unfind the second
                layout = _changed(part, layout, sample, record, new, detector)
                report(layout)
            else:
                unused += new
        yield record, layout
    if layout is not None and unused:
        report(detector.with_unused(layout, _listed(unused)))


def _too_many_changes(
    record: Record, new: Sequence[str], detector: Detector[LayoutT]
) -> ConfigError:
    return ConfigError(
        f"{detector.field}: {', '.join(new)[:200]} first appears in {record.file}:{record.line}, "
        f"after {MAX_CHANGES} other rows with new columns that may hold texts or labels; "
        "give all rows of a file the same columns, or each kind of rows a file of its own"
    )


def _listed(columns: Sequence[str]) -> list[str]:
    more = len(columns) - MAX_LISTED
    return [*columns[:MAX_LISTED], *([f"and {more:,} more"] if more > 0 else [])]


def convert(layout: Layout, record: Record, config: DataConfig) -> Converted:
    """Return everything that a row says.

    Raises:
        LeftOutError: It can't be used, or holds what a model of text does not see.
        ConfigError: Its values have another meaning than those of the first rows.
    """
    try:
        converted = layout.convert(record.fields or {})
        check_unread(record.fields or {}, layout.columns, config)
        return converted
    except ConfigError as error:
        raise ConfigError(f"{error} (in {record.file}:{record.line})") from None


def _first_layout(
    part: Part, records: Iterator[Record], detector: Detector[LayoutT]
) -> tuple[list[Record], LayoutT | None]:
    """Return the rows that were needed to find the layout, and the layout."""
    head = list(itertools.islice(records, SAMPLE_ROWS))
    fault: ConfigError | None = None
    try:
        layout = _layout(part, _fields(head), detector)
        if layout is not None:
            return head, layout
    except ConfigError as error:
        fault = error
    more = _more(records)
    if more:
        head += more
        return head, _layout(part, _fields(head), detector)
    if fault is not None:
        raise fault
    return head, None


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


def _fields(records: Sequence[Record]) -> list[Row]:
    return [record.fields for record in records if record.fields is not None]


def _layout(part: Part, sample: Sequence[Row], detector: Detector[LayoutT]) -> LayoutT | None:
    """Detect a part's layout from some rows; None if none of them can be parsed."""
    if not sample:
        return None
    columns = list(dict.fromkeys(name for row in sample for name in row))
    try:
        return detector.detect(columns, sample, part.text_cells)
    except ConfigError as error:
        # The command looks for demonstrations where there are no preferences.
        kind = NoPreferences if isinstance(error, NoPreferences) else ConfigError
        raise kind(f"{error} (in {part.name}; {detector.inspect} shows more)") from None


def _changed(
    part: Part, layout: LayoutT, sample: Sequence[Row], record: Record, new: Sequence[str],
    detector: Detector[LayoutT],
) -> LayoutT:  # fmt: skip
    """Return the layout with later columns.

    Raises:
        ConfigError: With them, earlier rows would have another meaning.
    """
    try:
        found = _layout(part, sample, detector)
    except ConfigError:
        found = None
    same = found is not None and (found.name, found.notes[:1]) == (layout.name, layout.notes[:1])
    if found is None or not same or not {*layout.columns} <= {*found.columns}:
        raise ConfigError(
            f"{detector.field}: {', '.join(new)} first appears in {record.file}:{record.line}, and "
            f"with it the rows would be read in another way than those before ({layout.notes[0]}); "
            f"give all rows of a file the same columns, or set {detector.settings}"
        )
    return found
