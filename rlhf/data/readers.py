"""Records of data files: CSV, JSON, Parquet and Arrow, plain or gzipped.

Files are streamed, and their size does not decide about memory; only a JSON document that is not
JSON lines is loaded whole. Text stays text: no cell is parsed as a number, a date or a missing
value. All that is guessed about a file is noted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path, PurePosixPath

from rlhf.data.content import MalformedError, ReadOptions, Text, open_content
from rlhf.data.delimited import csv_records
from rlhf.data.json_rows import json_records
from rlhf.data.records import Record

__all__ = ["ENDINGS", "MalformedError", "ReadOptions", "ending", "is_metadata", "read_records"]

#: Endings of the files that are read, which .gz may follow.
ENDINGS = (".csv", ".tsv", ".jsonl", ".ndjson", ".json", ".parquet", ".arrow")


def ending(name: str) -> str:
    """Return the suffix that gives the format: `.csv` of `pairs.csv.gz`."""
    path = PurePosixPath(name.lower())
    return PurePosixPath(path.stem).suffix if path.suffix == ".gz" else path.suffix


def is_metadata(name: str) -> bool:
    """Return whether a file is a card, a licence, hidden or the like, and not data."""
    parts = PurePosixPath(name.lower()).parts
    return bool(parts) and (
        any(part.startswith(".") for part in parts)
        or parts[-1] in _METADATA
        or re.fullmatch(_METADATA_PATTERN, parts[-1]) is not None
    )


def read_records(
    path: Path, name: str, options: ReadOptions, note: Callable[[str], None]
) -> Iterator[Record]:
    """Stream the records of a file, in its order.

    Args:
        path: The local file.
        name: Its name in the source, which gives the format.
        options: Encoding, delimiter and limits.
        note: Called with a sentence for everything that was guessed.

    Raises:
        MalformedError: The whole file can't be read, or not from here on. A row that can't be
            parsed is a record with a fault instead.
        OSError: The file can't be opened or read.
    """
    with open_content(path, name.lower().endswith(".gz"), options, note) as (content, head):
        form = _form(head, ending(name), note)
        if form in (".parquet", ".arrow"):
            # Loads pyarrow, which readers of text do without.
            from rlhf.data.columnar import table_records

            yield from table_records(content, head, name, options)
        elif head:
            is_csv = form in (".csv", ".tsv")
            text = Text(content, head, options, note, newline="" if is_csv else "\n")
            if is_csv:
                yield from csv_records(text, name, form == ".tsv", note)
            else:
                yield from json_records(text, name, form == ".json", note)


def _form(head: bytes, form: str, note: Callable[[str], None]) -> str:
    """Return the ending that fits the content."""
    if form not in ENDINGS:
        raise MalformedError(f"a file of unknown kind; use {', '.join(ENDINGS)} (also .gz)")
    found = next((kind for magic, kind in _MAGIC.items() if re.match(magic, head)), "")
    is_table = form in (".parquet", ".arrow")
    if found == form or (not found and not is_table):
        return form
    if is_table and not found:
        if form == ".arrow" and head.startswith(b"\xff\xff\xff\xff"):
            return form
        kind = "Parquet" if form == ".parquet" else "Arrow"
        raise MalformedError(
            f"not {kind}: {f'begins with {head[:20]!r}' if head else 'empty'}; write it again"
        )
    if found in (".parquet", ".arrow") or form in (".csv", ".tsv"):
        note(f"{_KINDS[found]}, though its name ends in {form}")
        return found
    return form


_METADATA = (
    *("dataset_infos.json", "dataset_info.json", "dataset_dict.json", "state.json"),
    *("_success", "_metadata", "_common_metadata", "croissant.json", "thumbs.db", "desktop.ini"),
)
_METADATA_PATTERN = r"(readme|license|licence|notice|changelog|citation)(\..*)?|.*\.(lock|md|crc)"
#: First bytes by which a file is read in spite of its name.
_MAGIC = {
    rb"PAR1": ".parquet",
    rb"ARROW1": ".arrow",
    # The stream format: a continuation mark, and the length of a schema.
    rb"\xff\xff\xff\xff[\x00-\xff]{2}[\x00-\x0f]\x00": ".arrow",
    rb"(\xef\xbb\xbf)?\s*(\{\s*\"|\[\s*\{)": ".json",
}
_KINDS = {".parquet": "Parquet", ".arrow": "Arrow", ".json": "JSON"}
