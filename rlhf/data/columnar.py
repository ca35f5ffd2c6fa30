"""Rows of Parquet and Arrow files, batch by batch.

A module of its own because it loads pyarrow, which readers of text do without.
"""

from __future__ import annotations

import io
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pyarrow
from pyarrow import ipc, parquet

from rlhf.data.content import MB, MalformedError, ReadOptions, check_ratio
from rlhf.data.delimited import MAX_COLUMNS
from rlhf.data.records import Record


def table_records(
    content: io.BufferedIOBase, head: bytes, name: str, options: ReadOptions
) -> Iterator[Record]:
    """Yield the rows of a Parquet file, or of an Arrow file or stream.

    Raises:
        MalformedError: It is broken, or declares more than it can hold.
    """
    kind = "Parquet" if head.startswith(b"PAR1") else "Arrow"
    with _seekable(content) as (stream, size), _broken(kind):
        if kind == "Parquet":
            batches = _parquet_batches(parquet.ParquetFile(stream, buffer_size=MB), size)
        elif head.startswith(b"ARROW1"):
            batches = _arrow_batches(ipc.open_file(stream))
        else:
            batches = _arrow_batches(ipc.open_stream(stream))
        yield from _records(batches, name, options)


def _parquet_batches(file: parquet.ParquetFile, size: int) -> Iterator[pyarrow.RecordBatch]:
    with file:
        _check_columns(file.schema_arrow)
        widest = _check_sizes(file.metadata, size)
        # A dictionary holds a value once; a batch may repeat its longest one in each row.
        rows = _BATCH if widest * _BATCH <= 1024 * MB else 16
        yield from file.iter_batches(batch_size=rows, use_threads=False)


def _arrow_batches(
    file: ipc.RecordBatchFileReader | ipc.RecordBatchStreamReader,
) -> Iterator[pyarrow.RecordBatch]:
    with file:
        _check_columns(file.schema)
        if isinstance(file, ipc.RecordBatchFileReader):
            yield from (file.get_batch(number) for number in range(file.num_record_batches))
        else:
            yield from file


@contextmanager
def _seekable(content: io.BufferedIOBase) -> Iterator[tuple[io.BufferedIOBase, int]]:
    """Yield the content as a file, and its size; gzip is unpacked to a temporary one."""
    if content.seekable():
        size = content.seek(0, 2)
        content.seek(0)
        yield content, size
        return
    with tempfile.TemporaryFile() as unpacked:
        shutil.copyfileobj(content, unpacked, MB)
        size = unpacked.tell()
        unpacked.seek(0)
        yield unpacked, size


@contextmanager
def _broken(kind: str) -> Iterator[None]:
    """Turn pyarrow's errors into MalformedError."""
    try:
        yield
    except (pyarrow.ArrowException, OSError) as error:
        # Errors of the system have a number, those of a broken format have none.
        if isinstance(error, OSError) and error.errno is not None:
            raise
        reason = " ".join(str(error).split())[:200]
        raise MalformedError(f"not {kind}: {reason}; write it again") from None


def _check_columns(schema: pyarrow.Schema) -> None:
    names = list(schema.names)
    if len(names) > MAX_COLUMNS:
        raise MalformedError(f"{len(names):,} columns; at most {MAX_COLUMNS:,} are read")
    if len(set(names)) < len(names):
        repeated = next(name for name in names if names.count(name) > 1)
        raise MalformedError(f"two columns are named {repeated[:80]!r}; rename one")


def _check_sizes(metadata: parquet.FileMetaData, size: int) -> int:
    """Refuse sizes that no real file has; return a bound of the longest dictionary."""
    # A column that is constant takes no space per row, but a reply does.
    if metadata.num_rows > 1_000_000 and metadata.num_rows > 100 * size:
        raise MalformedError(
            f"declares {metadata.num_rows:,} rows in {size:,} bytes, as no real data does; "
            "write it again"
        )
    unpacked, widest = 0, 0
    for number in range(metadata.num_row_groups):
        group = metadata.row_group(number)
        unpacked += group.total_byte_size
        for place in range(group.num_columns):
            column = group.column(place)
            if column.has_dictionary_page:
                widest = max(widest, column.total_uncompressed_size)
    check_ratio(unpacked, size)
    return widest


def _records(
    batches: Iterator[pyarrow.RecordBatch], name: str, options: ReadOptions
) -> Iterator[Record]:
    item = 0
    for batch in batches:
        for start in range(0, batch.num_rows, _BATCH):
            part = batch.slice(start, _BATCH)
            for fields, fault in _part_rows(part, item, options):
                item += 1
                yield Record(name, item, fields, fault)


def _part_rows(
    part: pyarrow.RecordBatch, item: int, options: ReadOptions
) -> Iterator[tuple[dict[str, Any] | None, str]]:
    """Yield (fields, fault) of each row; large or faulty ones are converted singly."""
    if part.nbytes <= options.row_limit:
        try:
            rows = part.to_pylist()
        except _UNREADABLE:
            pass
        else:
            yield from ((row, "") for row in rows)
            return
    for place in range(part.num_rows):
        row = part.slice(place, 1)
        # Of a dictionary-encoded column this counts the whole dictionary, once per row.
        if row.nbytes > options.row_limit and _text_size(row) > options.row_limit:
            raise options.too_long(f"row {item + place + 1}")
        try:
            yield row.to_pylist()[0], ""
        except _UNREADABLE as error:
            yield None, f"a value that can't be read ({' '.join(str(error).split())[:100]})"


def _text_size(row: pyarrow.RecordBatch) -> int:
    plain = [
        column.dictionary_decode() if isinstance(column, pyarrow.DictionaryArray) else column
        for column in row.columns
    ]
    return sum(column.nbytes for column in plain)


#: Rows that are converted at once.
_BATCH = 256
#: Text that is no UTF-8, times outside of Python's range, types without a Python value.
_UNREADABLE = (ValueError, OverflowError, NotImplementedError, ImportError, pyarrow.ArrowException)
