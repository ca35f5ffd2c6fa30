"""Exceptions of other libraries in one line, with their kind, place and cure."""

from __future__ import annotations

import json

import jinja2
import pytest
from pydantic import TypeAdapter

from rlhf.errors import (
    ConfigError,
    StoreError,
    UnexpectedError,
    explain,
    explained,
    is_retriable,
)
from rlhf.files import read_json


def recurse():
    return recurse()


#: What raises, and parts of the line about it.
RAISED = [
    (lambda: __import__("no_such_package"), ["ModuleNotFoundError", "no_such_package", "install"]),
    (lambda: jinja2.Template("{% if %}"), ["TemplateSyntaxError: Expected an expression"]),
    (lambda: "x" * (1 << 62), ["MemoryError: memory is used up", "free memory"]),
    (recurse, ["RecursionError: a value is nested too deeply"]),
    ("\ud800".encode, ["UnicodeEncodeError", "UTF-8"]),
    (lambda: 10.0 ** 1000, ["OverflowError: (34, 'Numerical result out of range')"]),
    (lambda: TypeAdapter(dict[str, int]).validate_python({"a": "x", "b": "y"}),
     ["ValidationError: a: Input should be a valid integer"]),
    (lambda: {}["key"], ["KeyError: 'key' is missing"]),
    (lambda: open("/no/such"), ["FileNotFoundError: /no/such: No such file"]),  # noqa: PTH123, SIM115
]  # fmt: skip


@pytest.mark.parametrize(("raises", "words"), RAISED)
def test_an_exception_is_explained_in_one_line(raises, words):
    with pytest.raises(Exception) as caught:  # noqa: PT011
        raises()
    line = explain(caught.value)
    assert "\n" not in line
    for word in words:
        assert word in line
    known = explained(caught.value)
    assert isinstance(known, UnexpectedError)
    assert str(known) == line
    assert is_retriable(known) == is_retriable(caught.value)
    assert known.__cause__ is caught.value


@pytest.mark.parametrize("error", [RuntimeError(), RuntimeError(None), RuntimeError("None")])
def test_no_error_is_none(error):
    assert explain(error).startswith("RuntimeError: no message; this is a fault of the program")


def test_a_place_in_this_project_is_named(tmp_path):
    with pytest.raises(FileNotFoundError) as caught:
        read_json(tmp_path / "none.json")
    assert "(rlhf/files.py:" in explain(caught.value)


def test_the_projects_own_errors_stay():
    error = ConfigError("ppo.x = 1:\n must\x1b[31m be 2")
    assert explained(error) is error
    assert explain(error) == "ppo.x = 1: must\\x1b[31m be 2"
    assert explain(StoreError()) == "StoreError"


@pytest.mark.parametrize("text", ["", "{", "\0", "[" * 10**5, json.dumps("x")[:-1]])
def test_damaged_json_is_named(tmp_path, text):
    (tmp_path / "curve.json").write_text(text)
    with pytest.raises(ValueError, match=r"curve.json is damaged \(.*\); restore it"):
        read_json(tmp_path / "curve.json")
