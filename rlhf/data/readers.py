"""Readers of data files: CSV, JSON lines, JSON and Parquet, plain or gzipped.

Text stays text: no cell is parsed as a number, a date or a missing value.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

Row = dict[str, Any]
Table = tuple[list[str], list[Row]]
"""Names of all columns, and the rows with the wanted ones."""


class MalformedError(Exception):
    """Position and reason of a syntax error; the caller adds the file's name."""


def ending(name: str) -> str:
    """Return the suffix that gives the format: `.csv` of `pairs.csv.gz`."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix == ".gz" else path.suffix


def read_file(path: Path, wanted: Sequence[str]) -> Table:
    """Read the wanted columns of a file whose ending is one of READERS.

    Raises:
        MalformedError: The content is not of the format.
        OSError: It can't be opened or read.
    """
    data = path.read_bytes()
    if path.suffix.lower() == ".gz":
        try:
            data = gzip.decompress(data)
        except (gzip.BadGzipFile, EOFError, zlib.error) as error:
            raise MalformedError(f"broken gzip: {error}") from None
    return READERS[ending(path.name)](data, wanted)


def _csv(data: bytes, wanted: Sequence[str]) -> Table:
    text = _text(data)
    # The default limit of 128 KiB per cell would save no memory: the text is loaded already.
    csv.field_size_limit(max(csv.field_size_limit(), len(text)))
    reader = csv.reader(io.StringIO(text, newline=""), strict=True)
    try:
        names = next(reader, [])
        duplicates = [name for name in wanted if names.count(name) > 1]
        if duplicates:
            raise MalformedError(f"two columns are named {duplicates[0]!r}")
        rows: list[Row] = []
        for cells in reader:
            if cells and len(cells) != len(names):
                raise MalformedError(
                    f"line {reader.line_num}: {len(cells)} cells for {len(names)} columns"
                )
            if cells:
                row = dict(zip(names, cells, strict=True))
                rows.append({name: row[name] for name in wanted if name in row})
    except csv.Error as error:
        raise MalformedError(f"line {reader.line_num}: {error}") from None
    return names, rows


def _json_lines(data: bytes, wanted: Sequence[str]) -> Table:
    # Not splitlines(), which also splits at characters that JSON text may hold, like U+2028.
    lines = enumerate(_text(data).split("\n"), start=1)
    return _objects(((f"line {n}", _json(line, n)) for n, line in lines if line.strip()), wanted)


def _json_file(data: bytes, wanted: Sequence[str]) -> Table:
    text = _text(data)
    if not text.lstrip().startswith("["):
        return _json_lines(data, wanted)  # the hub and many tools write JSON lines as .json
    items = enumerate(_json(text), start=1)
    return _objects(((f"item {n}", item) for n, item in items), wanted)


def _parquet(data: bytes, wanted: Sequence[str]) -> Table:
    import pyarrow
    from pyarrow import parquet

    try:
        file = parquet.ParquetFile(pyarrow.BufferReader(data))
        names = list(file.schema_arrow.names)
        return names, file.read(columns=[name for name in wanted if name in names]).to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise MalformedError(f"not Parquet: {error}") from None


#: The reader of each ending, which .gz may follow.
READERS: dict[str, Callable[[bytes, Sequence[str]], Table]] = {
    ".csv": _csv,
    ".jsonl": _json_lines,
    ".json": _json_file,
    ".parquet": _parquet,
}


def _text(data: bytes) -> str:
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise MalformedError(f"line {line}: not UTF-8 (byte {data[error.start]:#04x})") from None


def _json(text: str, line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        position = f"line {line + error.lineno - 1}, column {error.colno}"
        raise MalformedError(f"{position}: not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:
        raise MalformedError(f"line {line}: JSON that can't be read ({error})") from None


def _objects(items: Iterator[tuple[str, Any]], wanted: Sequence[str]) -> Table:
    names: dict[str, None] = {}
    rows: list[Row] = []
    for position, item in items:
        if not isinstance(item, dict):
            raise MalformedError(f"{position}: not an object with named fields")
        names |= dict.fromkeys(item)
        rows.append({name: item[name] for name in wanted if name in item})
    return list(names), rows
