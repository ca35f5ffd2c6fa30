"""Reference answers and metadata of prompts."""

from __future__ import annotations

from datetime import date

import pytest

from rlhf.config import DataConfig
from rlhf.data.prompt_fields import PromptFields
from rlhf.data.records import LeftOutError
from rlhf.data.rows import PromptRow
from tests.data.helpers import user


def fields_of(*rows, **options):
    """The completed prompts p and q, and the reasons of the rows left out."""
    fields = PromptFields(DataConfig(source="x.csv", **options))
    reasons = []
    for row in rows:
        try:
            fields.read(row, row.get("prompt", "p"))()
        except LeftOutError as reason:
            reasons.append(reason.reason)
    return [fields.complete(PromptRow(p)) for p in ("p", "q")], reasons


@pytest.mark.parametrize(
    ("cell", "reference"),
    [
        ("four", "four"), (" 4 ", " 4 "), (4, "4"), (0.5, "0.5"),
        (None, None), ("", None), (" \n", None), (float("nan"), None),
    ],
)  # fmt: skip
def test_reference_answers(cell, reference):
    found, reasons = fields_of({"answer": cell}, reference_column="answer")
    assert found == [PromptRow("p", reference=reference), PromptRow("q")]
    assert reasons == []


@pytest.mark.parametrize("cell", [True, ["a"], "half \ud83d", {"a": 1}])
def test_a_reference_that_is_no_answer_is_left_out(cell):
    found, reasons = fields_of({"answer": cell}, reference_column="answer")
    assert found[0].reference is None
    assert reasons == ["the reference is no text or number"]


def test_one_prompt_has_one_reference_and_another_case_is_another_prompt():
    data = [
        {"answer": None},
        {"prompt": [user("p")], "answer": "4"},
        {"answer": "5"},
        {"prompt": "P", "answer": "6"},
        {"prompt": "q", "answer": "5"},
    ]
    found, reasons = fields_of(*data, reference_column="answer")
    assert [row.reference for row in found] == ["4", "5"]
    assert reasons == ["another reference for the same prompt"]


def test_metadata_is_what_json_can_hold():
    data = [
        {"topic": "tea", "day": date(2024, 1, 2), "deep": {"a": [1, None]}},
        {"topic": "later rows change nothing"},
        {"prompt": "q", "topic": float("nan")},
    ]
    found, reasons = fields_of(*data, metadata_columns=("topic", "day", "deep"))
    assert found[0].metadata == {"topic": "tea", "day": "2024-01-02", "deep": {"a": [1, None]}}
    assert reasons == ["metadata can't be written as JSON"]


def test_nested_columns():
    row = {"meta": {"answer": "4", "tags": ["a", "b"]}}
    found, _ = fields_of(row, reference_column="meta.answer", metadata_columns=("meta.tags.1",))
    assert found[0] == PromptRow("p", reference="4", metadata={"meta.tags.1": "b"})


def test_columns_that_nobody_asked_for_are_ignored():
    found, _ = fields_of({"answer": "4", "topic": object()})
    assert found[0] == PromptRow("p")
