"""Records of delimited text: CSV and its relatives."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator
from typing import Any

from rlhf.data.content import MalformedError, Note, ReadOptions, Text
from rlhf.data.records import Record
from rlhf.plain_text import counted

#: More names in a header than any table has: the content is something else.
MAX_COLUMNS = 10_000


def csv_records(text: Text, name: str, is_tsv: bool, note: Note) -> Iterator[Record]:
    """Yield the records below the header, with text in all fields.

    Raises:
        MalformedError: The header is unusable, a quote is never closed, or a record is longer than
            a row may be.
    """
    options = text.options
    # For the whole process; the default of 128 KiB is less than a long conversation.
    csv.field_size_limit(options.row_limit)
    lines = _Lines(text)
    delimiter = _delimiter(lines, options, is_tsv, note)
    lines.delimiter = delimiter
    skip = _pads(lines.sample, delimiter)
    if skip:
        note("blanks after the delimiter are skipped")
    reader = csv.reader(lines, delimiter=delimiter, skipinitialspace=skip, strict=True)
    names: list[str] | None = None
    for cells, broken in _parsed(reader, lines):
        if names is None:
            names = _names(cells, broken, lines.start, note)
            continue
        if not broken and len(names) > 1 and lines.are_blank():
            continue  # as spreadsheets write below the last row
        fault = broken or _row_fault(cells, names, lines)
        if fault:
            yield Record(name, lines.start, None, fault, lines.record_text())
        else:
            fields: dict[str, Any] = dict(zip(names, cells, strict=True))
            fields.pop("", None)
            yield Record(name, lines.start, fields)


def _parsed(reader: Iterator[list[str]], lines: _Lines) -> Iterator[tuple[list[str], str]]:
    """Yield (cells, fault) of each record that is not an empty line."""
    while True:
        lines.start_record()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            # The csv module goes on with the next line.
            yield [], lines.fault(str(error))
        else:
            if cells:
                yield cells, ""


class _Lines:
    """Lines for the csv module, and where in them a record began."""

    def __init__(self, text: Text) -> None:
        self._text, self._lines = text, text.lines()
        self._ahead: list[str] = []
        self._error: MalformedError | None = None
        self._number = 0
        self._record: list[str] = []
        self._size = 0
        self.start = 1
        self.has_nul = False
        self.delimiter = ","
        self._read_ahead()
        self.sample = list(self._ahead)
        self._ahead.reverse()

    def _read_ahead(self) -> None:
        """Hold the first lines for guesses; a fault among them is raised where it stands."""
        size = 0
        try:
            for line in self._lines:
                self._ahead.append(line)
                size += len(line)
                if size > _SAMPLE:
                    return
        except MalformedError as error:
            self._error = error

    def drop_line(self) -> None:
        """Leave out the first line."""
        self._ahead.pop()
        self._number += 1
        del self.sample[0]

    def start_record(self) -> None:
        """Count from the next line."""
        self.start, self._size, self.has_nul = self._number + 1, 0, False
        self._record.clear()

    def record_text(self) -> str:
        """Return the beginning of the record, as in the file."""
        return "".join(self._record)[:500].rstrip("\r\n")

    def are_blank(self) -> bool:
        """Return whether the record is delimiters and blanks alone, without a quote."""
        return self._size < 500 and not self.record_text().replace(self.delimiter, "").strip()

    def fault(self, reason: str) -> str:
        """Return the csv module's reason in plain words, or raise at a fatal one."""
        if "unexpected end of data" in reason:
            raise MalformedError(
                f"line {self.start}: the file ends within the quotes of this record; close them"
            )
        if "field larger than" in reason:
            raise self._text.options.too_long(f"line {self.start}", _UNCLOSED)
        return "a quote within quotes, which is not doubled" if "expected" in reason else reason

    def __iter__(self) -> _Lines:
        return self

    def __next__(self) -> str:
        if self._ahead:
            line = self._ahead.pop()
        elif self._error is not None:
            raise self._error
        else:
            line = next(self._lines)
        self._number += 1
        self._size += len(line)
        if self._size > self._text.options.row_limit:
            raise self._text.options.too_long(f"line {self.start}", _UNCLOSED)
        if len(self._record) < 500:
            self._record.append(line[:500])
        if "\0" in line:
            self.has_nul = True
        return line


def _delimiter(lines: _Lines, options: ReadOptions, is_tsv: bool, note: Note) -> str:
    if options.delimiter is not None:
        delimiter = "\t" if options.delimiter == "\\t" else options.delimiter
        if len(delimiter) != 1 or delimiter in '\r\n"':
            raise MalformedError(
                f"data.delimiter = {options.delimiter!r} can't separate cells; set one character"
            )
        return delimiter
    # The first line by which Excel is told the delimiter.
    told = re.fullmatch(r"sep=(.)[\r\n]*", lines.sample[0]) if lines.sample else None
    if told:
        lines.drop_line()
        note(f"delimiter {told[1]!r}, by the line sep= at the top")
        return told[1]
    if is_tsv:
        return "\t"
    delimiter = max(_DELIMITERS, key=lambda each: _consistency(lines.sample, each))
    if delimiter != ",":
        note(f"delimiter {delimiter!r}, by the first records")
    return delimiter


def _consistency(sample: list[str], delimiter: str) -> tuple[bool, float, int]:
    """Return a rank: is a table, share of records of the header's width, width."""
    widths = []
    try:
        for cells in csv.reader(sample, delimiter=delimiter, skipinitialspace=True, strict=True):
            if cells:
                widths.append(len(cells))
    except csv.Error:
        pass  # the sample ends within a record, or quotes are wrong with this delimiter
    if not widths or widths[0] == 1:
        return False, 0.0, 0
    records = widths[1:]
    share = records.count(widths[0]) / len(records) if records else 0.0
    return True, share, widths[0]


def _pads(sample: list[str], delimiter: str) -> bool:
    """Return whether blanks follow the delimiters, as in `a, "b, c", d`."""
    if delimiter == " ":
        return False
    mark = re.escape(delimiter)
    # Quoted cells are matched as a whole, or their text would be taken for structure.
    quoted = r'"(?:[^"]|"")*+"'
    padded = rf"(?P<padded>[ ]+{quoted}[ ]*(?={mark}|[\r\n]|$))"
    cell = re.compile(rf"(?:^|{mark}|[\r\n]+)(?:{quoted}|{padded}|[^{mark}\r\n]*+)")
    return any(match["padded"] for match in cell.finditer("".join(sample)))


def _names(cells: list[str], fault: str, line: int, note: Note) -> list[str]:
    if fault:
        raise MalformedError(f"line {line}: {fault} in the names of columns; mend the first line")
    if len(cells) > MAX_COLUMNS:
        raise MalformedError(
            f"line {line}: {len(cells):,} names of columns; the first line must hold the names, "
            f"at most {MAX_COLUMNS:,}"
        )
    names = [cell.strip() for cell in cells]
    seen: set[str] = set()
    for name in names:
        if name and name in seen:
            raise MalformedError(f"two columns are named {name[:80]!r}; rename one")
        seen.add(name)
    if "" in seen:
        note("a column without a name is left out")
    return names


def _row_fault(cells: list[str], names: list[str], lines: _Lines) -> str:
    if len(cells) != len(names):
        counts = f"{counted(len(cells), 'cell')} for {counted(len(names), 'column')}"
        held = repr(lines.delimiter) if len(cells) > len(names) else "a line break"
        return f"{counts}: a text that holds {held} must stand in quotes"
    return "holds a NUL character" if lines.has_nul else ""


_DELIMITERS = (",", ";", "\t", "|")
#: Characters from the front of a file by which its form is guessed.
_SAMPLE = 64 * 1024
_UNCLOSED = " (is a quote never closed?)"
