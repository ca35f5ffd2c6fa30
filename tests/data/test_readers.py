"""Readers of data files: layouts, guesses that are noted, faults of rows and of files, limits."""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import math
import pickle
import random
import sqlite3
import tracemalloc
import zipfile
import zlib
from datetime import datetime
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pyarrow import ipc, parquet

from rlhf.data import columnar, content, json_rows
from rlhf.data.readers import (
    ENDINGS,
    MalformedError,
    ReadOptions,
    ending,
    is_metadata,
    read_records,
)
from rlhf.data.records import Record
from tests.examples import examples

PAIR = {"prompt": "p", "chosen": "c", "rejected": "r"}
OTHER = {"prompt": "größe 漢字", "chosen": "a\u2028b\x85c", "rejected": "NA"}


class Reading:
    """Everything that reading a file gave."""

    def __init__(self, folder: Path, name: str, data: bytes | str, **options: Any) -> None:
        path = folder / "local copy"
        path.write_bytes(data.encode() if isinstance(data, str) else data)
        self.notes: list[str] = []
        self.records: list[Record] = []
        self.error = ""
        try:
            for record in read_records(path, name, ReadOptions(**options), self.notes.append):
                self.records.append(record)
        except MalformedError as error:
            self.error = str(error)
            assert "\n" not in self.error
            assert len(self.error) < 500

    @property
    def rows(self) -> list[dict[str, Any] | None]:
        assert not self.error
        return [record.fields for record in self.records]

    @property
    def faults(self) -> list[tuple[int, str, str]]:
        return [(r.line, r.fault, r.text) for r in self.records if r.fields is None]


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def table(rows: list[dict[str, Any]], form: str = "parquet", batch: int = 1000) -> bytes:
    sink, data = io.BytesIO(), pyarrow.Table.from_pylist(rows)
    if form == "parquet":
        parquet.write_table(data, sink, row_group_size=batch)
    else:
        new = ipc.new_stream if form == "stream" else ipc.new_file
        with new(sink, data.schema) as writer:
            writer.write_table(data, max_chunksize=batch)
    return sink.getvalue()


# --- names ---------------------------------------------------------------------------------------


def test_endings():
    assert ending("a/Pairs.CSV.GZ") == ending("x.csv") == ".csv"
    assert all(ending(f"a{end}.gz") == ending(f"a{end}") == end for end in ENDINGS)


@pytest.mark.parametrize(
    "name",
    [
        *("dataset_infos.json", "a/dataset_info.json", "state.json", "README.md", "LICENSE"),
        *(".gitattributes", ".cache/x.csv", "a/.x.jsonl", "train.parquet.lock", "data/NOTES.md"),
    ],
)
def test_files_beside_the_data(name):
    assert is_metadata(name)


@pytest.mark.parametrize("name", ["train.json", "state.jsonl", "info.json", "a/readme-pairs.csv"])
def test_data_is_not_taken_for_metadata(name):
    assert not is_metadata(name)


# --- round trips ---------------------------------------------------------------------------------

#: Anything that UTF-8 can hold, with what has meaning in some format made frequent.
TEXT = st.text(
    st.one_of(
        st.sampled_from(list('",;\t|\r\n \u2028\x85\ufeff\x1f[]{}:\\')),
        st.characters(exclude_categories=["Cs"], exclude_characters="\0"),
    ),
    max_size=8,
)
QUOTED = ": a text that holds ',' must stand in quotes"
NAMES = ["prompt", "chosen", "rejected"]
ROWS = st.lists(st.fixed_dictionaries(dict.fromkeys(NAMES, TEXT)), min_size=1, max_size=6)


@settings(max_examples=examples(60), deadline=None)
@given(
    rows=ROWS,
    delimiter=st.sampled_from(",;\t|"),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    mark=st.booleans(),
    told=st.booleans(),
)
def test_any_text_survives_csv(tmp_path_factory, rows, delimiter, end, quoting, mark, told):
    if end != "\r\n" and any(set("\r\n") & set(cell) for row in rows for cell in row.values()):
        quoting = csv.QUOTE_ALL  # Python's writer quotes no other line end than its own
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, NAMES, delimiter=delimiter, lineterminator=end, quoting=quoting)
    writer.writeheader()
    writer.writerows(rows)
    data = (codecs.BOM_UTF8 if mark else b"") + file.getvalue().encode()
    folder = tmp_path_factory.mktemp("csv")
    options = {"delimiter": delimiter} if told else {}
    filled = [r for r in rows if quoting == csv.QUOTE_ALL or _is_filled(r, delimiter, end)]
    assert Reading(folder, "a.csv", data, **options).rows == filled


def _is_filled(row: dict[str, str], delimiter: str, end: str) -> bool:
    """Return whether a row is written as more than delimiters and blanks."""
    file = io.StringIO(newline="")
    csv.writer(file, delimiter=delimiter, lineterminator=end).writerow(row.values())
    return bool(file.getvalue().replace(delimiter, "").strip())


def test_blank_rows_below_a_sheet_are_skipped_like_blank_lines(tmp_path):
    data = 'a;b\nx;y\n;\n ; \n\n"";""\n;z\n'
    rows = [{"a": "x", "b": "y"}, {"a": "", "b": ""}, {"a": "", "b": "z"}]
    assert Reading(tmp_path, "a.csv", data).rows == rows


@given(st.data())
def test_a_document_that_was_cut_off_says_so_wherever_it_ends(tmp_path_factory, data):
    values = st.none() | st.booleans() | st.text(max_size=4) | st.floats(allow_nan=False)
    rows = data.draw(st.lists(st.dictionaries(st.text(max_size=3), values), min_size=1, max_size=3))
    whole = "[\n" + json.dumps(rows)[1:]
    cut = whole[: data.draw(st.integers(3, len(whole) - 1))]
    error = Reading(tmp_path_factory.mktemp("cut"), "a.json", cut).error
    assert "the file ends within the JSON that it holds" in error
    wrong = Reading(tmp_path_factory.mktemp("cut"), "a.json", '[\n{"a": 1} x]').error
    assert "not JSON" in wrong


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("やかんの掃除方法を教えてください。型番は0です。", "cp932"),
        ("如何清洁水壶？请告诉我具体的步骤。", "gb18030"),
        ("주전자를 어떻게 청소하나요? 알려 주세요.", "cp949"),
        ("Wie reinige ich den Kessel für größere Töpfe?", "cp1252"),
    ],
)
def test_the_encodings_proposed_decode_the_bytes(tmp_path, text, encoding):
    data = f"a,b\n{text},x\n".encode(encoding)
    error = Reading(tmp_path, "a.csv", data).error
    proposed = error.split("data.encoding=")[1].split(",")[0]
    assert Reading(tmp_path, "b.csv", data, encoding=proposed).rows == [{"a": text, "b": "x"}]
    others = error.split("also possible: ")[1].split(")")[0].split(", ")
    assert all(data.decode(name) for name in others)


@settings(max_examples=examples(50), deadline=None)
@given(
    rows=ROWS,
    ascii=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16", "utf-32"]),
    layout=st.sampled_from(["lines", "crlf", "array", "indented", "columns", "data", "one-line"]),
    packed=st.booleans(),
)
def test_any_text_survives_json(tmp_path_factory, rows, ascii, encoding, layout, packed):
    def dump(value: Any, **options: Any) -> str:
        return json.dumps(value, ensure_ascii=ascii, **options)

    text = {
        "lines": "\n".join(map(dump, rows)),
        "crlf": "".join(f"{dump(row)}\r\n" for row in rows),
        "array": dump(rows),
        "indented": dump(rows, indent=2),
        "columns": dump({name: [row[name] for row in rows] for name in NAMES}, indent=1),
        "data": dump({"version": "1", "data": rows}, indent=2),
        "one-line": dump({"data": rows}),
    }[layout]
    data = text.encode(encoding)
    data = gzip.compress(data) if packed else data
    folder = tmp_path_factory.mktemp("json")
    found = Reading(folder, "a.json.gz" if packed else "a.json", data)
    assert found.rows == rows
    assert bool(found.notes) == (
        layout in ("columns", "data", "one-line") or encoding in ("utf-16", "utf-32")
    )


@settings(max_examples=examples(20), deadline=None)
@given(rows=ROWS, form=st.sampled_from(["parquet", "stream", "file"]), packed=st.booleans())
def test_any_text_survives_tables(tmp_path_factory, rows, form, packed):
    data = table(rows, form, batch=2)
    name = "a.parquet" if form == "parquet" else "a.arrow"
    folder = tmp_path_factory.mktemp("table")
    data, name = (gzip.compress(data), f"{name}.gz") if packed else (data, name)
    found = Reading(folder, name, data)
    assert found.rows == rows
    assert [record.line for record in found.records] == list(range(1, len(rows) + 1))
    assert found.notes == []


# --- CSV -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("a,b\n1,2\n", [{"a": "1", "b": "2"}]),
        ("a;b\n1,5;2\n", [{"a": "1,5", "b": "2"}]),
        ("a|b\n1,2|2;\n", [{"a": "1,2", "b": "2;"}]),
        ("text\nhello, world\n", None),
        ("text\nhello\n", [{"text": "hello"}]),
        ('a,b\r1,"x\ry"\r', [{"a": "1", "b": "x\ry"}]),
        ('a, "b, c", d\n1, "2, 3", 4\n', [{"a": "1", "b, c": "2, 3", "d": "4"}]),
        ('a,b\n" x"," ""y"""\n', [{"a": " x", "b": ' "y"'}]),
        ('a,b\n"1, ""2"", 3", x\n', [{"a": '1, "2", 3', "b": " x"}]),
        (" a , b\n1,2\n", [{"a": "1", "b": "2"}]),
        ("a,b\n\n1,2\n   \n3,4\n\n", [{"a": "1", "b": "2"}, {"a": "3", "b": "4"}]),
        ('a\n""\nx\n', [{"a": ""}, {"a": "x"}]),
        (",a\n0,x\n1,y\n", [{"a": "x"}, {"a": "y"}]),
        ("a,b\n007,1e5\nNA,\n", [{"a": "007", "b": "1e5"}, {"a": "NA", "b": ""}]),
        ("sep=;\na;b\n1;2\n", [{"a": "1", "b": "2"}]),
        ("a,b\n", []),
        ("\n\n", []),
        ("", []),
    ],
)
def test_csv_dialects(tmp_path, text, rows):
    found = Reading(tmp_path, "a.csv", text)
    if rows is None:
        assert found.faults == [(2, f"2 cells for 1 column{QUOTED}", "hello, world")]
    else:
        assert found.rows == rows


@pytest.mark.parametrize(
    ("name", "text", "notes"),
    [
        ("a.csv", "a,b\n1,2\n", []),
        ("a.csv", "a;b\n1;2\n", ["delimiter ';', by the first records"]),
        ("a.csv", "a\tb\n1\t2\n", ["delimiter '\\t', by the first records"]),
        ("a.tsv", "a\tb,c\n1\t2\n", []),
        ("a.csv", ",a\n0,1\n", ["a column without a name is left out"]),
        ("a.csv", 'a, "b"\n1, 2\n', ["blanks after the delimiter are skipped"]),
        ("a.csv", "sep=|\na|b\n", ["delimiter '|', by the line sep= at the top"]),
    ],
)
def test_guesses_about_csv_are_noted(tmp_path, name, text, notes):
    found = Reading(tmp_path, name, text)
    assert found.error == ""
    assert found.notes == notes


def test_delimiter_that_is_set_is_not_guessed(tmp_path):
    found = Reading(tmp_path, "a.csv", "a;b,c\n1;2,3\n", delimiter=",")
    assert found.rows == [{"a;b": "1;2", "c": "3"}]
    assert Reading(tmp_path, "a.csv", "a\tb\n1\t2\n", delimiter="\\t").rows == [
        {"a": "1", "b": "2"}
    ]
    for wrong in ("", ",,", "\n"):
        error = Reading(tmp_path, "a.csv", "a,b\n", delimiter=wrong).error
        assert error.startswith(f"data.delimiter = {wrong!r} can't separate")


def test_csv_rows_that_are_left_out(tmp_path):
    text = 'a,b\n1,2\n1,2,3\n"x\ny",z\n1\n"p"q,2\nn\0,1\n5,6\n'
    found = Reading(tmp_path, "a.csv", text)
    assert found.faults == [
        (3, f"3 cells for 2 columns{QUOTED}", "1,2,3"),
        (6, "1 cell for 2 columns: a text that holds a line break must stand in quotes", "1"),
        (7, "a quote within quotes, which is not doubled", '"p"q,2'),
        (8, "holds a NUL character", "n\0,1"),
    ]
    kept = [(r.line, r.fields) for r in found.records if r.fields]
    assert kept == [
        (2, {"a": "1", "b": "2"}),
        (4, {"a": "x\ny", "b": "z"}),
        (9, {"a": "5", "b": "6"}),
    ]
    assert {record.file for record in found.records} == {"a.csv"}


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ("a,b,a\n", "two columns are named 'a'"),
        ("a, a\n", "two columns are named 'a'"),
        ('a,b\n1,2\n"x,y\n1,2\n', "line 3: the file ends within the quotes"),
        ('"a"b,c\n', "line 1: a quote within quotes, which is not doubled in the names"),
        (",".join(map(str, range(10_001))), "line 1: 10,001 names of columns"),
    ],
)
def test_csv_files_that_are_refused(tmp_path, text, error):
    assert error in Reading(tmp_path, "a.csv", text).error


def test_rows_before_an_unclosed_quote_are_read(tmp_path):
    found = Reading(tmp_path, "a.csv", 'a,b\n1,2\n"x,y\n')
    assert [record.fields for record in found.records] == [{"a": "1", "b": "2"}]


# --- JSON ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.ndjson.gz"])
@pytest.mark.parametrize("indent", [None, 2])
def test_array_of_objects(tmp_path, name, indent):
    found = Reading(tmp_path, name, json.dumps([PAIR, OTHER], indent=indent))
    assert found.rows == [PAIR, OTHER]
    assert [record.line for record in found.records] == [1, 2]
    is_lines = "json" in name and not name.endswith(".json")
    assert any("a JSON array, though" in note for note in found.notes) == is_lines


@pytest.mark.parametrize("key", ["data", "rows", "train", "examples", "anything"])
def test_rows_under_a_key(tmp_path, key):
    wrapped = {"version": "1.0", "meta": {"by": "x"}, "tags": ["a"], key: [PAIR, OTHER]}
    found = Reading(tmp_path, "a.json", json.dumps(wrapped))
    assert found.rows == [PAIR, OTHER]
    assert found.notes == [f"rows are under {key!r}"]


CHAT = [{"role": "user", "content": "hi"}]
LAYOUTS: dict[str, tuple[Any, list[Any], str]] = {
    "columns": (
        {"prompt": ["a", "b"], "chosen": [1, 2]},
        [("a", 1), ("b", 2)],
        "columns are lists",
    ),
    "orient=columns": (
        {"prompt": {"0": "a", "1": "b"}, "chosen": {"0": 1, "1": 2}},
        [("a", 1), ("b", 2)],
        "columns are objects by row number",
    ),
    "orient=index": (
        {"0": {"prompt": "a", "chosen": 1}, "1": {"prompt": "b", "chosen": 2}},
        [("a", 1), ("b", 2)],
        "rows are objects by row number",
    ),
    "orient=split": (
        {"columns": ["prompt", "chosen"], "index": [0], "data": [["a", 1]]},
        [("a", 1)],
        "rows are lists under 'data', with their names under 'columns'",
    ),
    "datasets-server": (
        {
            "features": [{"feature_idx": 0, "name": "prompt"}],
            "rows": [{"row_idx": 0, "row": {"prompt": "a", "chosen": 1}, "truncated_cells": []}],
            "num_rows_total": 1400,
        },
        [("a", 1)],
        "rows are under 'row' of 'rows', as the hub's server sends them, 1 of 1,400",
    ),
    "single object": ({"prompt": "a", "chosen": 1}, [("a", 1)], ""),
    "single chat": ({"prompt": CHAT, "chosen": CHAT}, [(CHAT, CHAT)], ""),
    "single object of objects": (
        {"prompt": {"text": "a"}, "chosen": {"text": "b"}},
        [({"text": "a"}, {"text": "b"})],
        "",
    ),
    "empty array": ([], [], ""),
    "empty object": ({}, [], ""),
    "empty data": ({"version": "1", "data": []}, [], "rows are under 'data'"),
}


@pytest.mark.parametrize("indent", [None, 1])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_of_a_document(tmp_path, layout, indent):
    document, expected, note = LAYOUTS[layout]
    found = Reading(tmp_path, "a.json", json.dumps(document, indent=indent))
    assert found.rows == [{"prompt": a, "chosen": b} for a, b in expected]
    assert found.notes == ([note] if note else [])


def test_pretty_printed_object_in_a_file_of_lines(tmp_path):
    found = Reading(tmp_path, "a.jsonl", "\n" + json.dumps({"data": [PAIR]}, indent=2))
    assert found.rows == [PAIR]
    assert found.notes[0] == "a JSON document, though its name says one object per line"


@pytest.mark.parametrize(
    "text",
    [
        '{"data": [\n{"a": 1}\n]}',
        '[{"a": 1},\n{"a": 2}\n]',
        "[\n" + '{"a": 1}\n]',
        ' [ {"a":1} ]\n',
    ],
)
def test_document_with_a_whole_object_per_line(tmp_path, text):
    for name in ("a.json", "a.jsonl"):
        assert Reading(tmp_path, name, text).rows[0] == {"a": 1}


@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_lines_of_json(tmp_path, name):
    text = "\n \n" + lines(PAIR) + "\n\r\n" + json.dumps(OTHER, ensure_ascii=False)
    found = Reading(tmp_path, name, text)
    assert [(r.line, r.fields) for r in found.records] == [(3, PAIR), (6, OTHER)]
    assert found.notes == []


def test_lines_of_json_end_at_no_other_character(tmp_path):
    text = '{"a": "x\u2028\x85", \r "b": "\u2029\x7f"}\n'
    row = {"a": "x\u2028\x85", "b": "\u2029\x7f"}
    assert Reading(tmp_path, "a.jsonl", text * 2).rows == [row, row]


def test_single_line_is_a_row_of_a_file_of_lines(tmp_path):
    assert Reading(tmp_path, "a.jsonl", lines({"data": [PAIR]})).rows == [{"data": [PAIR]}]


def test_numbers_that_are_none(tmp_path):
    row = Reading(tmp_path, "a.jsonl", '{"a": NaN, "b": -Infinity, "c": null}').rows[0]
    assert math.isnan(row["a"])
    assert row["b"] == -math.inf
    assert row["c"] is None


BAD_LINES = {
    '{"prompt": }': "column 12: not JSON (Expecting value)",
    '{"prompt": "a"} x': "column 17: not JSON (Extra data)",
    '{"prompt": "a",': "column 16: not JSON (Expecting property name enclosed in double quotes)",
    '{"prompt": "a': "column 12: not JSON (Unterminated string starting at)",
    '{"prompt": "\0"}': "column 13: not JSON (Invalid control character at)",
    "nonsense": "column 1: not JSON (Expecting value)",
    "[1, 2]": "a list, not an object with named fields",
    '["a"]': "a list, not an object with named fields",
    '"text"': "a string, not an object with named fields",
    "1.5": "a number, not an object with named fields",
    "null": "null, not an object with named fields",
    "true": "true or false, not an object with named fields",
    '{"prompt": 1, "a": 2, "prompt": 3}': "key 'prompt' occurs twice",
    '{"x": [{"role": 1, "role": 2}]}': "key 'role' occurs twice",
    '{"a": ' + "9" * 5000 + "}": "a number with too many digits",
    "[" * 100_000: "JSON that is nested too deep",
    '{"a": ' * 100_000: "JSON that is nested too deep",
}


@pytest.mark.parametrize("bad", BAD_LINES, ids=lambda text: text[:20])
@pytest.mark.parametrize("place", [0, 1, 2])
def test_lines_that_are_left_out(tmp_path, bad, place):
    good = [json.dumps(PAIR)] * 2
    good.insert(place, bad)
    found = Reading(tmp_path, "a.jsonl", "\n".join(good) + "\n")
    assert found.faults == [(place + 1, BAD_LINES[bad], bad[:500])]
    assert found.rows.count(PAIR) == 2


def test_items_of_a_document_that_are_left_out(tmp_path):
    text = '[{"a": 1}, 5, {"a": 1, "a": 2},\n{"a": %s}, {"a": [{"b": 1, "b": 1}]}, {"a": 2}]'
    found = Reading(tmp_path, "a.json", text % ("9" * 5000))
    assert found.faults == [
        (2, "a number, not an object with named fields", "5"),
        (3, "key 'a' occurs twice", '{"a": 2}'),
        (4, "a number with too many digits", '{"a": "…"}'),
        (5, "key 'b' occurs twice", '{"a": [{"b": 1}]}'),
    ]
    assert [r.fields for r in found.records if r.fields] == [{"a": 1}, {"a": 2}]


@pytest.mark.parametrize(
    ("text", "error"),
    [
        ('[{"a": 1},\n{"a": }]', "line 2, column 7: not JSON (Expecting value)"),
        ('\n\n[\n\n\n{"a": }]', "line 6, column 7: not JSON (Expecting value)"),
        ('[{"a": 1},\n{"a": 2}', "line 2, column 9: the file ends within the JSON"),
        ("[[1, 2], [3, 4]]", "rows are lists without column names"),
        ('{"a": [1, 2], "b": [1]}', "columns of unequal length ('a' 2, 'b' 1)"),
        ('{"a": {"0": 1}, "b": {"1": 1}}', "column 'b' has other row numbers than 'a'"),
        ('{"train": [{"a": 1}], "test": [{"a": 1}]}', "several keys: 'train', 'test'; keep one"),
        ('{"columns": ["a", "a"], "data": [[1, 2]]}', "two columns are named 'a'"),
        ('{"data": [{"a": 1}],\n"data": []}', "key 'data' occurs twice; keep one"),
        ('"text"', "a string, not rows; write an array of objects"),
        ("17", "a number, not rows"),
        ("[" * 100_000, "nested too deep"),
    ],
)
def test_documents_that_are_refused(tmp_path, text, error):
    assert error in Reading(tmp_path, "a.json", text).error


# --- encodings -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json"])
@pytest.mark.parametrize("encoding", ["utf-16", "utf-32", "utf-16-be"])
def test_wide_encodings_by_their_mark(tmp_path, name, encoding):
    text = {"a.csv": "a;b\nü;\u2028\n", "a.json": '[{"a": "ü",\n"b": "\u2028"}]'}
    data = text.get(name, '{"a": "ü", "b": "\u2028"}\n')
    mark = codecs.BOM_UTF16_BE if encoding == "utf-16-be" else b""
    found = Reading(tmp_path, name, mark + data.encode(encoding))
    assert found.rows == [{"a": "ü", "b": "\u2028"}]
    assert found.notes[0] == f"{encoding[:6].upper()}, by its byte order mark"


@pytest.mark.parametrize("name", ["a.csv", "a.jsonl", "a.json", "a.csv.gz"])
def test_text_that_is_not_utf8(tmp_path, name):
    row = '{"a": "é"}' if "json" in name else "é"
    first = "[\n" if name == "a.json" else '{"a": "b"}\n' if name == "a.jsonl" else "a\n"
    data = (first + row).encode("cp1252")
    error = Reading(tmp_path, name, gzip.compress(data) if name.endswith("gz") else data).error
    assert error.startswith("line 2: not UTF-8 (byte 0xe9); set data.encoding=cp1252")


def test_line_that_is_not_utf8_within_a_document(tmp_path):
    data = b'[\n{"a": 1},\n{"a": 2},\n{"a": "' + b'\xff"}]'
    assert Reading(tmp_path, "a.json", data).error.startswith("line 4: not UTF-8 (byte 0xff)")
    # A line that was cut when it was read ahead goes on as the same line.
    data = b'\n[{"a": "' + b"x" * 2**20 + b'\xff"},\n{}]'
    found = Reading(tmp_path, "a.json", data, max_row_mb=0.5)
    assert found.error.startswith("line 2: not UTF-8 (byte 0xff)")


def test_encoding_that_is_set(tmp_path):
    assert Reading(tmp_path, "a.csv", "a\n’é\n".encode("cp1252"), encoding="cp1252").rows == [
        {"a": "’é"}
    ]
    wrong = Reading(tmp_path, "a.csv", b"a\nb\n\x81\n", encoding="cp1252")
    assert wrong.error.startswith("line 3: not CP1252 (byte 0x81); set data.encoding=cp1251, which")
    wrong = Reading(tmp_path, "a.csv", "a\nb\n".encode("utf-16-le")[:-1], encoding="utf-16-le")
    assert "not UTF-16-LE (" in wrong.error
    for name in ("latin-99", "base64", "\0"):
        error = Reading(tmp_path, "a.csv", "a\n", encoding=name).error
        assert error.startswith(f"data.encoding = {name!r} is no encoding; set one like utf-8")


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le", "utf-32-be"])
def test_wide_encodings_without_a_mark_are_named(tmp_path, encoding):
    data = "prompt,chosen\nhello,there\n".encode(encoding)
    assert Reading(tmp_path, "a.csv", data).error.endswith(f"set data.encoding={encoding}")
    assert Reading(tmp_path, "a.csv", data, encoding=encoding).rows == [
        {"prompt": "hello", "chosen": "there"}
    ]


def test_file_of_nothing_but_nul(tmp_path):
    assert "nothing but NUL bytes" in Reading(tmp_path, "a.jsonl", bytes(5000)).error


# --- kinds by content ----------------------------------------------------------------------------


def test_gzip_goes_by_content(tmp_path):
    found = Reading(tmp_path, "a.jsonl", gzip.compress(lines(PAIR).encode()))
    assert (found.rows, found.notes) == (
        [PAIR],
        ["gzip, though its name does not end in .gz: unpacked"],
    )
    found = Reading(tmp_path, "a.jsonl.GZ", lines(PAIR))
    assert (found.rows, found.notes) == (
        [PAIR],
        ["not gzip, though its name ends in .gz: read as it is"],
    )
    members = gzip.compress(lines(PAIR).encode()) + gzip.compress(lines(OTHER).encode())
    assert Reading(tmp_path, "a.jsonl.gz", members).rows == [PAIR, OTHER]


def test_gzip_that_is_cut_gives_the_rows_before(tmp_path):
    rows = [{"a": str(number), "b": "x"} for number in range(20_000)]
    whole = gzip.compress(lines(*rows).encode())
    found = Reading(tmp_path, "a.jsonl.gz", whole[: len(whole) // 2])
    assert found.error.startswith("broken gzip: Compressed file ended before")
    assert len(found.records) > 5_000
    assert all(record.fields for record in found.records)
    broken = bytearray(whole)
    broken[-6] ^= 1
    found = Reading(tmp_path, "a.jsonl.gz", bytes(broken))
    assert found.error.startswith("broken gzip: CRC check failed")
    assert len(found.records) == 20_000


def zipped(name: str) -> bytes:
    sink = io.BytesIO()
    with zipfile.ZipFile(sink, "w") as archive:
        archive.writestr(name, "a,b\n1,2\n")
    return sink.getvalue()


def sqlite() -> bytes:
    database = sqlite3.connect(":memory:")
    database.execute("create table a (b)")
    data = database.serialize()
    database.close()
    return data


FOREIGN = {
    "a zip archive; unpack it first": zipped("a.csv"),
    "an Excel workbook; save the sheet as CSV": zipped("xl/workbook.xml"),
    "compressed with zstd; unpack it first": b"\x28\xb5\x2f\xfd\x04\x00",
    "compressed with bzip2; unpack it first": bz2.compress(b"a,b\n1,2\n"),
    "compressed with xz; unpack it first": lzma.compress(b"a,b\n1,2\n"),
    "a 7z archive; unpack it first": b"7z\xbc\xaf\x27\x1c\x00\x04",
    "an SQLite database; export the table as CSV": sqlite(),
    "a Python pickle, which may run code; export it as JSON lines": pickle.dumps([PAIR]),
    "a tar archive; unpack it first": b"a.csv".ljust(257, b"\0") + b"ustar\x0000",
    "a Git LFS pointer, not the data; run git lfs pull": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    ),
    "a web page was downloaded instead of the file": b"\n<!DOCTYPE html>\n<html></html>",
    "gzip within gzip; unpack it first": gzip.compress(gzip.compress(b"a,b\n")),
}


@pytest.mark.parametrize("reason", FOREIGN)
@pytest.mark.parametrize("name", ["a.csv", "a.jsonl.gz", "a.parquet"])
def test_content_of_other_kinds_is_named(tmp_path, name, reason):
    for data in (FOREIGN[reason], gzip.compress(FOREIGN[reason])):
        expected = "gzip within gzip" if data[:2] == FOREIGN[reason][:2] == b"\x1f\x8b" else reason
        assert Reading(tmp_path, name, data).error.startswith(expected)


@pytest.mark.parametrize(
    ("form", "name", "note"),
    [
        ("parquet", "a.csv", "Parquet, though its name ends in .csv"),
        ("parquet", "a.arrow", "Parquet, though its name ends in .arrow"),
        ("stream", "a.parquet", "Arrow, though its name ends in .parquet"),
        ("file", "a.jsonl", "Arrow, though its name ends in .jsonl"),
    ],
)
def test_tables_with_another_ending(tmp_path, form, name, note):
    found = Reading(tmp_path, name, table([PAIR, OTHER], form))
    assert found.rows == [PAIR, OTHER]
    assert found.notes == [note]


def test_json_with_the_ending_of_csv(tmp_path):
    found = Reading(tmp_path, "a.csv", lines(PAIR, OTHER))
    assert found.rows == [PAIR, OTHER]
    assert found.notes == ["JSON, though its name ends in .csv"]


@pytest.mark.parametrize("name", [f"a{end}{gz}" for end in ENDINGS[:5] for gz in ("", ".gz")])
@pytest.mark.parametrize("data", [b"", b"\n", codecs.BOM_UTF8])
def test_empty_files_hold_no_rows(tmp_path, name, data):
    assert Reading(tmp_path, name, data).rows == []
    assert Reading(tmp_path, name, gzip.compress(data)).rows == []


def test_unknown_ending(tmp_path):
    assert "unknown kind; use .csv, .tsv, " in Reading(tmp_path, "a.txt", "a\nb\n").error


# --- tables --------------------------------------------------------------------------------------


def test_values_of_tables_are_kept(tmp_path):
    rows = [{"chat": CHAT, "n": 1, "x": 2.5, "none": None, "when": datetime(2026, 1, 2)}]
    assert Reading(tmp_path, "a.parquet", table(rows)).rows == rows


def test_table_with_text_that_is_not_utf8(tmp_path):
    raw = pyarrow.array([b"good", b"\xff", b"fine"], pyarrow.binary())
    text = pyarrow.StringArray.from_buffers(3, *raw.buffers()[1:])
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"a": text}), sink)
    found = Reading(tmp_path, "a.parquet", sink.getvalue())
    assert [record.fields for record in found.records] == [{"a": "good"}, None, {"a": "fine"}]
    assert found.records[1].fault.startswith("a value that can't be read ('utf-8' codec")
    assert found.records[1].line == 2


@pytest.mark.parametrize(
    ("name", "data", "error"),
    [
        ("a.parquet", b"", "not Parquet: empty"),
        ("a.parquet", b"a,b\n1,2\n", "not Parquet: begins with b'a,b"),
        ("a.parquet", b"PAR1" + bytes(50), "not Parquet: "),
        ("a.parquet", table([PAIR])[:-9], "not Parquet: Parquet magic bytes not found in footer"),
        ("a.arrow", b"a,b\n1,2\n", "not Arrow: begins with b'a,b"),
        ("a.arrow", table([PAIR], "file")[:-9], "not Arrow: "),
        ("a.arrow", table([PAIR], "stream")[:200], "not Arrow: "),
    ],
)
def test_tables_that_are_refused(tmp_path, name, data, error):
    assert Reading(tmp_path, name, data).error.startswith(error)


def test_parquet_that_is_broken_in_its_middle(tmp_path):
    data = bytearray(table([{"prompt": "x" * 5000}]))
    data[8:60] = bytes(52)
    assert Reading(tmp_path, "a.parquet", bytes(data)).error.startswith("not Parquet: ")


def test_tables_with_two_columns_of_a_name(tmp_path):
    sink = io.BytesIO()
    columns = [pyarrow.array(["a"]), pyarrow.array(["b"])]
    parquet.write_table(pyarrow.Table.from_arrays(columns, ["x", "x"]), sink)
    assert "two columns are named 'x'" in Reading(tmp_path, "a.parquet", sink.getvalue()).error


# --- limits --------------------------------------------------------------------------------------


def bomb(piece: bytes, size: int) -> bytes:
    packer, parts = zlib.compressobj(9, wbits=31), []
    for _ in range(size // len(piece)):
        parts.append(packer.compress(piece))
    return b"".join([*parts, packer.flush()])


@pytest.fixture(scope="module")
def bombs() -> dict[str, bytes]:
    size = 80 * 2**20
    pieces = {"zeros": b"x" * 2**20, "lines": b"\n" * 2**20, "rows": b'{"a":1}\n' * 2**17}
    return {kind: bomb(piece, size) for kind, piece in pieces.items()}


@pytest.mark.parametrize("kind", ["zeros", "lines", "rows"])
@pytest.mark.parametrize("name", ["a.csv.gz", "a.jsonl.gz", "a.json.gz", "a.parquet.gz"])
def test_gzip_bomb(tmp_path, bombs, kind, name):
    tracemalloc.start()
    found = Reading(tmp_path, name, bombs[kind])
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.error.startswith("unpacks to more than 200 times its size")
    assert found.records == []
    assert peak < 30 * 2**20


def test_bomb_behind_good_rows(tmp_path):
    good = gzip.compress(lines(PAIR, OTHER).encode())
    found = Reading(tmp_path, "a.jsonl.gz", good + bomb(b"\n" * 2**20, 70 * 2**20))
    assert found.error.startswith("unpacks to more than 200 times its size")


def test_bomb_behind_much_real_data(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "SMALL_MB", 0.05)
    rows = lines(*({"a": random.Random(seed).randbytes(300).hex()} for seed in range(200)))
    good = gzip.compress(rows.encode())
    blank = b" " * (2**20 - 1) + b"\n"
    found = Reading(tmp_path, "a.jsonl.gz", good + bomb(blank, 40 * 2**20))
    assert found.error.startswith("unpacks to more than 200 times its size")
    assert len(found.records) == 200


def test_total_that_a_compressed_file_unpacks_to(tmp_path):
    data = gzip.compress(lines(*[PAIR] * 30_000).encode())
    assert len(Reading(tmp_path, "a.jsonl.gz", data).rows) == 30_000
    found = Reading(tmp_path, "a.jsonl.gz", data, max_mb=1)
    assert found.error.startswith("unpacks to more than 1 MB")


@pytest.mark.parametrize(
    ("name", "start", "error"),
    [
        ("a.jsonl", b'{"a": "', "line 1: a row of more than 1 MB"),
        ("a.jsonl", b'{"a": 1}\n{"a": "', "line 2: a row of more than 1 MB"),
        ("a.jsonl", b'{"a": 1}\n{"a": 1}\n{"a": "', "line 3: a row of more than 1 MB"),
        ("a.csv", b"a,b\n", "line 2: a row of more than 1 MB"),
        ("a.csv", b'a,b\n1,2\n"x\n', "line 4: a row of more than 1 MB"),
        ("a.csv", b"", "line 1: a row of more than 1 MB"),
    ],
)
def test_row_without_an_end(tmp_path, name, start, error):
    data = start + b"x" * (40 * 2**20)
    tracemalloc.start()
    found = Reading(tmp_path, name, data, max_row_mb=1)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert found.error.startswith(error)
    assert found.error.endswith("set data.max_row_mb to more")
    assert peak < len(data) // 4


def test_record_of_many_lines_without_an_end(tmp_path):
    text = 'a,b\n1,2\n"' + "x\n" * 30_000
    found = Reading(tmp_path, "a.csv", text, max_row_mb=0.05)
    assert found.error.startswith("line 3: a row of more than 0.05 MB (is a quote never closed?)")
    many = "a,b\n" + '"x\n",' * 30_000
    found = Reading(tmp_path, "a.csv", many, max_row_mb=0.05)
    assert found.error.startswith("line 2: a row of more than 0.05 MB")


def test_limits_allow_long_rows(tmp_path):
    row = {"a": "x" * 300_000, "b": "y\n" * 100_000}
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, row)
    writer.writeheader()
    writer.writerow(row)
    assert Reading(tmp_path, "a.csv", file.getvalue()).rows == [row]
    assert Reading(tmp_path, "a.parquet", table([row])).rows == [row]
    assert "row 1: a row of more than" in (
        Reading(tmp_path, "a.parquet", table([row]), max_row_mb=0.25).error
    )


def test_document_over_the_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(json_rows, "DOCUMENT_MB", 1)
    found = Reading(tmp_path, "a.json", json.dumps([{"a": "x" * 400_000}] * 4), max_row_mb=0.5)
    assert found.error.startswith("a JSON document of more than 1 MB; write it as JSON lines")
    assert len(Reading(tmp_path, "a.json", json.dumps([{"a": "x" * 400_000}] * 2)).rows) == 2


def test_parquet_that_declares_too_much(tmp_path):
    sink = io.BytesIO()
    constant = pyarrow.repeat(pyarrow.scalar("x" * 1000), 500_000)
    parquet.write_table(
        pyarrow.table({"a": constant}), sink, use_dictionary=False, compression="zstd"
    )
    assert "unpacks to more than 200 times" in Reading(tmp_path, "a.parquet", sink.getvalue()).error
    sink = io.BytesIO()
    parquet.write_table(pyarrow.table({"a": pyarrow.nulls(2_000_000, pyarrow.int8())}), sink)
    assert "declares 2,000,000 rows in" in Reading(tmp_path, "a.parquet", sink.getvalue()).error


def test_dictionary_of_a_long_text_is_not_expanded_at_once(tmp_path):
    values = pyarrow.array(["x" * 8_000_000])
    column = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 300), values)
    path = tmp_path / "a.parquet"
    # Without the schema it is read back as text, not as a dictionary.
    parquet.write_table(pyarrow.table({"a": column}), path, store_schema=False)
    records = read_records(path, "a.parquet", ReadOptions(), lambda _: None)
    assert len(next(records).fields["a"]) == 8_000_000
    assert pyarrow.total_allocated_bytes() < 400_000_000
    records.close()


def test_error_of_the_disk_is_none_of_the_format(tmp_path, monkeypatch):
    def fail(*_: Any, **__: Any) -> None:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(columnar.parquet, "ParquetFile", fail)
    with pytest.raises(OSError, match="Input/output error"):
        Reading(tmp_path, "a.parquet", table([PAIR]))


def test_files_are_streamed(tmp_path):
    """The first record arrives without the rest of the file, and few are held at a time."""
    rows = [{"a": "x" * 2000, "b": str(number)} for number in range(4_000)]
    file = io.StringIO()
    writer = csv.DictWriter(file, rows[0])
    writer.writeheader()
    writer.writerows(rows)
    for name, data in (
        ("a.csv", file.getvalue().encode()),
        ("a.jsonl", lines(*rows).encode()),
        ("a.jsonl.gz", gzip.compress(lines(*rows).encode(), 1)),
        ("a.parquet", table(rows)),
    ):
        path = tmp_path / name
        path.write_bytes(data)
        tracemalloc.start()
        found = sum(1 for _ in read_records(path, name, ReadOptions(), lambda _: None))
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        assert found == len(rows)
        assert peak < 4 * 2**20, name
