"""Lists of tests and modules in tests/conftest.py: each of their entries still names something.

An entry that a renamed test leaves behind matches nothing: the test would leave `make test`, or
join it, unnoticed.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from tests import conftest

ROOT = Path(__file__).parents[1]
LISTS = ("WHOLE", "EACH_COMMIT", "CHECKED", "LONG")


def ids(path: Path) -> list[str]:
    """Return the ids of a file's functions and classes of tests, by reading it."""
    body = ast.parse(path.read_bytes()).body
    names = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    file = path.relative_to(ROOT).as_posix()
    return [f"{file}::{name}" for name in names if name.startswith(("test", "Test"))]


@pytest.fixture(scope="module")
def tests() -> list[str]:
    return [name for path in sorted((ROOT / "tests").rglob("test_*.py")) for name in ids(path)]


def unmatched(prefixes: tuple[str, ...], names: list[str]) -> list[str]:
    """Return the entries with which no test's id begins; a case in brackets is not looked for."""
    return [one for one in prefixes if not any(n.startswith(one.split("[")[0]) for n in names)]


@pytest.mark.parametrize("name", LISTS)
def test_each_entry_is_the_start_of_a_tests_id(name, tests):
    assert unmatched(getattr(conftest, name), tests) == []


def test_each_case_exists_if_its_test_was_collected(request):
    collected = request.config.stash[conftest.COLLECTED]
    for entry in (entry for name in LISTS for entry in getattr(conftest, name) if "[" in entry):
        cases = [one for one in collected if one.startswith(entry.split("[")[0])]
        assert not cases or any(one.startswith(entry) for one in cases), f"{entry}: {cases}"


def test_an_entry_of_a_renamed_test_is_found(tests):
    here = "tests/test_selection.py::test_an_entry_of"
    assert unmatched((here, f"{here}_no", "tests/no/"), tests) == [f"{here}_no", "tests/no/"]


def test_the_sample_of_each_commit_is_of_tests_that_are_left_out():
    """An entry of `EACH_COMMIT` outside of `WHOLE` says nothing."""
    assert [one for one in conftest.EACH_COMMIT if not one.startswith(conftest.WHOLE)] == []
