"""Data sources that are files: every format, and the message for each broken file."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pyarrow
import pytest
from pyarrow import parquet

from rlhf.data.sources import source_name
from rlhf.errors import ConfigError, DataError
from tests.data.helpers import digest, message, read, rows

FORMATS = (".csv", ".jsonl", ".json", ".parquet")
ODD = [
    {"prompt": 'say "hi", now', "chosen": "one\ntwo\r\nthree", "rejected": "a\u2028b\x85c"},
    {"prompt": "größe 漢字 🙂", "chosen": "NA", "rejected": "null"},
    {"prompt": "  spaces ", "chosen": "1", "rejected": "2024-01-01"},
    {"prompt": "x" * 300_000, "chosen": "True", "rejected": "nan"},
]


def encode(form: str, data: list[dict[str, Any]], end: str = "\n") -> bytes:
    """The rows as a file of this format, not written by the code under test."""
    if form == ".csv":
        file = io.StringIO(newline="")
        writer = csv.DictWriter(file, list(data[0]), lineterminator=end)
        writer.writeheader()
        writer.writerows(data)
        return file.getvalue().encode()
    if form == ".jsonl":
        return "".join(json.dumps(row, ensure_ascii=False) + end for row in data).encode()
    if form == ".json":
        return json.dumps(data, indent=2).replace("\n", end).encode()
    sink = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_pylist(data), sink)
    return sink.getvalue()


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    data = data.encode() if isinstance(data, str) else data
    path.write_bytes(gzip.compress(data) if path.suffix.lower() == ".gz" else data)
    return path


@pytest.mark.parametrize("gz", ["", ".gz", ".GZ"])
@pytest.mark.parametrize("form", FORMATS)
def test_text_arrives_as_it_was_written(tmp_path, form, gz):
    path = write(tmp_path / f"my pairs{form}{gz}", encode(form, ODD))
    assert read(path) == ODD
    assert read(path.as_uri()) == ODD


@pytest.mark.parametrize("form", [".csv", ".jsonl", ".json"])
def test_windows_line_ends_and_byte_order_mark(tmp_path, form):
    path = write(tmp_path / f"pairs{form}", b"\xef\xbb\xbf" + encode(form, rows(), end="\r\n"))
    assert read(path) == rows()


@pytest.mark.parametrize("form", [".jsonl", ".json", ".parquet"])
def test_chats_numbers_and_nulls_are_kept_as_they_are(tmp_path, form):
    chat = [{"role": "user", "content": "hi"}]
    data = [{"prompt": chat, "chosen": [{"role": "assistant", "content": "x"}], "rejected": None}]
    assert read(write(tmp_path / f"a{form}", encode(form, data))) == data
    data = [{"prompt": 1, "chosen": 2.5, "rejected": True}]
    assert read(write(tmp_path / f"b{form}", encode(form, data))) == data


def test_json_may_hold_lines_and_lines_may_lack_fields(tmp_path):
    text = '{"prompt": "p", "chosen": "c"}\n\n{"prompt": "q", "rejected": NaN}'
    found = read(write(tmp_path / "pairs.json", text))
    assert found[0] == {"prompt": "p", "chosen": "c"}
    assert found[1]["prompt"] == "q"
    assert found[1]["rejected"] != found[1]["rejected"]


def test_folder_is_read_in_order_without_hidden_and_other_files(tmp_path):
    first, second, third = ([row] for row in rows(3))
    folder = tmp_path / ".data" / "pairs"
    write(folder / "b.jsonl.gz", encode(".jsonl", second))
    write(folder / "a.jsonl", encode(".jsonl", first))
    write(folder / "c" / "a.jsonl", encode(".jsonl", third))
    write(folder / ".cache" / "x.csv", "prompt\n")
    write(folder / ".hidden.jsonl", "broken")
    write(folder / "README.md", "# Pairs")
    assert read(folder) == [*first, *second, *third]


def test_broken_parquet_in_its_middle(tmp_path):
    data = bytearray(encode(".parquet", [{"prompt": "x" * 5000, "chosen": "c", "rejected": "r"}]))
    data[8:60] = bytes(52)
    assert "a.parquet: not Parquet" in message(
        DataError, read, write(tmp_path / "a.parquet", bytes(data))
    )


def test_column_that_spoils_only_itself_is_not_read(tmp_path):
    """A column of mixed types would not even load by libraries that guess types."""
    text = '{"prompt": "p", "chosen": "c", "rejected": "r", "x": %s}\n'
    path = write(tmp_path / "a.jsonl", text % "1" + text % '"one"' + text % "[1]")
    assert len(read(path)) == 3


@pytest.mark.parametrize("call", [read, digest])
def test_sources_that_are_not_there(tmp_path, call):
    for source in (tmp_path / "none.jsonl", tmp_path / "none", "~nobody-x/a", "imdb", "a/b/c"):
        text = message(ConfigError, call, source)
        assert text == (
            f"data.source = {str(source)!r}: no such file or folder; give an existing path, an "
            "s3:// URI or a hub dataset id"
        )
    assert "no such file or folder" in message(ConfigError, call, "./" + "x" * 5000)


@pytest.mark.parametrize("call", [read, digest])
def test_sources_that_hold_nothing_to_read(tmp_path, call):
    write(tmp_path / "notes" / "README.md", "x")
    write(tmp_path / "hidden" / ".x" / "a.jsonl", "x")
    (tmp_path / "empty").mkdir()
    for source in ("empty", "notes", "notes/README.md", "hidden"):
        text = message(ConfigError, call, tmp_path / source)
        assert text.endswith(
            "holds no file that can be read; use .csv, .tsv, .jsonl, .ndjson, .json, .parquet, "
            ".arrow (also .gz)"
        )


@pytest.mark.parametrize("call", [read, digest])
def test_mixed_formats(tmp_path, call):
    for form in (".jsonl", ".csv"):
        write(tmp_path / f"a{form}", encode(form, rows()))
    text = message(ConfigError, call, tmp_path)
    assert text == f"data.source = {str(tmp_path)!r}: mixes .csv, .jsonl; keep one format"


@pytest.mark.parametrize("call", [read, digest])
def test_unreadable_file(tmp_path, call):
    # Reading the start of one's own memory fails for everyone, root included.
    path = tmp_path / "a.jsonl"
    path.symlink_to("/proc/self/mem")
    text = message(ConfigError, call, path)
    assert "can't be read (Input/output error); check the file and its rights" in text


def test_digest_follows_content_and_names_below_the_folder(tmp_path):
    path = write(tmp_path / "one" / "a.jsonl", encode(".jsonl", rows()))
    one = digest(tmp_path / "one")
    write(tmp_path / "two" / "a.jsonl", path.read_bytes())
    write(tmp_path / "two" / ".x" / "b.jsonl", "hidden")
    assert digest(tmp_path / "two") == one
    assert digest(path) == one
    (tmp_path / "one" / "sub").mkdir()
    path = path.rename(tmp_path / "one" / "sub" / "a.jsonl")
    assert digest(tmp_path / "one") != one
    write(path, encode(".jsonl", rows(4)))
    assert digest(path) != one
    assert digest("world") == "world"


def test_name_in_a_summary_has_no_folder(tmp_path):
    assert source_name(str(tmp_path / "a.jsonl")) == "a.jsonl"
    assert source_name((tmp_path / "ü b.jsonl").as_uri()) == "ü b.jsonl"
    assert source_name("owner/name") == "owner/name"
    assert source_name("s3://bucket/key.jsonl") == "s3://bucket/key.jsonl"


def test_nothing_is_printed_or_left_behind(tmp_path):
    write(tmp_path / "in" / "a.csv", encode(".csv", ODD))
    script = (
        "import sys\n"
        "from rlhf.config import DataConfig, StoreConfig\n"
        "from rlhf.data.sources import open_source\n"
        "config = DataConfig(source=sys.argv[1])\n"
        "with open_source(config, StoreConfig(), print) as (part,):\n"
        "    assert len(list(part.records())) == 4\n"
        "assert not {'torch', 'datasets', 'pyarrow'} & sys.modules.keys()\n"
    )
    (tmp_path / "home").mkdir()
    (tmp_path / "tmp").mkdir()
    environment = {"HOME": str(tmp_path / "home"), "TMPDIR": str(tmp_path / "tmp")}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tmp_path / "in")],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout + done.stderr == ""
    assert not any((tmp_path / "home").iterdir())
    assert not any((tmp_path / "tmp").iterdir())


def test_a_file_is_hashed_once_until_it_changes(tmp_path, monkeypatch):
    file, calls, real = tmp_path / "a.jsonl", [], hashlib.file_digest
    monkeypatch.setattr(hashlib, "file_digest", lambda *a: calls.append(1) or real(*a))
    file.write_text("{}")
    # What has just changed may change again within the resolution of its time.
    assert digest(file) == digest(file)
    assert len(calls) == 2
    os.utime(file, (1e9, 1e9))
    first = digest(file)
    assert digest(tmp_path) == digest(file) == first
    assert len(calls) == 3
    file.write_text("[]")
    os.utime(file, (1e9 + 1, 1e9 + 1))
    assert digest(file) != first
    assert len(calls) == 4
