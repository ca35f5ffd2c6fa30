"""JSON files, content hashes and paths with `~`."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from rlhf.files import expand_home, file_sha256, files_sha256, folder_sha256, read_json, write_json


def test_json_has_one_form_and_no_nan(tmp_path):
    path = tmp_path / "a.json"
    write_json(path, {"b": 1, "a": "ü"})
    assert path.read_text(encoding="utf-8") == '{\n "a": "ü",\n "b": 1\n}\n'
    assert read_json(path) == {"a": "ü", "b": 1}
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, float("nan"))


def test_hashes_are_those_of_existing_checkpoints_and_fingerprints(tmp_path):
    """Recomputed here by hand: a change of the format would make every stage run again."""
    (tmp_path / "sub").mkdir()
    first, second = tmp_path / "b.txt", tmp_path / "sub" / "a.txt"
    first.write_bytes(b"x")
    second.write_bytes(b"")
    contents = [hashlib.sha256(data).digest() for data in (b"x", b"")]
    assert file_sha256(first) == contents[0].hex()
    expected = hashlib.sha256(b"b.txt" + contents[0] + b"sub/a.txt" + contents[1]).hexdigest()
    assert folder_sha256(tmp_path) == expected
    pairs = [("b.txt", first), ("a.txt", second)]
    expected = hashlib.sha256(b"b.txt\0" + contents[0] + b"a.txt\0" + contents[1]).hexdigest()
    assert files_sha256(pairs, separator=b"\0") == expected


def test_the_home_of_an_unknown_user_stays_as_written(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    assert expand_home("~/x") == tmp_path / "x"
    assert expand_home("~no-such-user-here/x") == Path("~no-such-user-here/x")
