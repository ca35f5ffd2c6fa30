"""Rows that are left out, and the reason for each."""

from __future__ import annotations

from datetime import date

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.data.clean import PromptFields, clean
from rlhf.data.rows import Pair, PromptRow
from tests.data.helpers import assistant, pair, user


@pytest.mark.parametrize(
    ("row", "reason"),
    [
        (pair(prompt=""), "prompt is empty or no text"),
        (pair(prompt=" \t\n\u3000"), "prompt is empty or no text"),
        (pair(prompt=None), "prompt is empty or no text"),
        (pair(prompt=5), "prompt is empty or no text"),
        (pair(prompt=float("nan")), "prompt is empty or no text"),
        (pair(prompt="half \ud83d"), "prompt is empty or no text"),
        (pair(prompt=[]), "prompt is empty or no text"),
        (pair(prompt=["text"]), "prompt is empty or no text"),
        (pair(prompt=[user(" ")]), "prompt is empty or no text"),
        (pair(prompt=[user(None)]), "prompt is empty or no text"),
        (pair(prompt=[user("half \ud83d")]), "prompt is empty or no text"),
        (pair(prompt=[{"content": "x"}]), "prompt is empty or no text"),
        (pair(prompt=[{"role": 1, "content": "x"}]), "prompt is empty or no text"),
        (pair(prompt=[{"from": "human", "value": "x"}]), "prompt is empty or no text"),
        (pair(prompt={"role": "user", "content": "x"}), "prompt is empty or no text"),
        (pair(prompt=[user("a"), assistant("b")]), "prompt ends with a reply"),
        ({"chosen": "c", "rejected": "r"}, "prompt is empty or no text"),
        (pair(chosen=""), "a reply is empty or no text"),
        (pair(rejected=" \n"), "a reply is empty or no text"),
        (pair(rejected=None), "a reply is empty or no text"),
        (pair(chosen=3.5), "a reply is empty or no text"),
        (pair(chosen="\udc00"), "a reply is empty or no text"),
        (pair(chosen=[]), "a reply is empty or no text"),
        (pair(chosen=["text"]), "a reply is empty or no text"),
        (pair(chosen=[assistant(" ")]), "a reply is empty or no text"),
        ({"prompt": "p", "chosen": "c"}, "a reply is empty or no text"),
        (pair(chosen=[user("c")]), "a reply is not the assistant's"),
        (pair(chosen=[user("q"), assistant("c")]), "a reply belongs to another prompt"),
        (
            pair(chosen=[user("p"), assistant("a"), user("b"), assistant("c")]),
            "a reply belongs to another prompt",
        ),
        (pair(chosen="same", rejected="same"), "both replies are the same"),
        (pair(chosen="same", rejected=" same\n"), "both replies are the same"),
        (pair(prompt="x" * 101), "prompt too long"),
        (pair(prompt=[user("x" * 51), assistant("y"), user("x" * 50)]), "prompt too long"),
        (pair(chosen="x" * 201), "reply too long"),
        (pair(rejected="x" * 201), "reply too long"),
    ],
)
def test_rows_are_left_out_for_a_reason(row, reason):
    config = DataConfig(max_prompt_chars=100, max_reply_chars=200)
    assert clean([row, pair("good")], config) == ([Pair("good", "c", "r")], {reason: 1})


@pytest.mark.parametrize(
    ("row", "expected"),
    [
        (pair("x" * 100, "y" * 200, "z" * 200), Pair("x" * 100, "y" * 200, "z" * 200)),
        (pair(" p ", " c ", "r\r\n"), Pair(" p ", " c ", "r\r\n")),
        (pair([user("é" * 100)]), Pair([user("é" * 100)], "c", "r")),
        (
            pair([{**user("p"), "name": None}], [assistant("c")], [user("p"), assistant("r")]),
            Pair([user("p")], "c", "r"),
        ),
        (pair("p", [user("p"), assistant("c")], [user(" P"), assistant("r")]), Pair("p", "c", "r")),
        (
            pair([{"role": "system", "content": ""}, user("p")]),
            Pair([{"role": "system", "content": ""}, user("p")], "c", "r"),
        ),
    ],
)
def test_usable_rows(row, expected):
    config = DataConfig(max_prompt_chars=100, max_reply_chars=200)
    assert clean([row], config) == ([expected], {})


def test_duplicates_are_left_out_and_reasons_counted():
    data = [pair("a"), pair("b"), pair("a"), pair("a"), pair("a", "r", "c"), pair(""), pair(None)]
    pairs, left_out = clean(data, DataConfig())
    assert pairs == [Pair("a", "c", "r"), Pair("b", "c", "r"), Pair("a", "r", "c")]
    assert left_out == {"duplicate": 2, "prompt is empty or no text": 2}


CELLS = st.one_of(
    st.text(max_size=4),
    st.sampled_from(["p", "P ", "q", "r", None, 1, float("nan"), [], {}]),
    st.lists(st.builds(lambda r, c: {"role": r, "content": c}, st.text(max_size=1), st.text())),
)


@given(st.lists(st.fixed_dictionaries(dict.fromkeys(("prompt", "chosen", "rejected"), CELLS))))
@settings(max_examples=100, deadline=None)
def test_every_row_is_kept_or_counted(data):
    pairs, left_out = clean(data, DataConfig())
    assert len(pairs) + sum(left_out.values()) == len(data)
    assert len({repr(p) for p in pairs}) == len(pairs)
    for found in pairs:
        assert found.prompt
        assert found.chosen.strip() != found.rejected.strip() != ""


# --- what a row says of its prompt ------------------------------------------------------------


def known_of(data, **options):
    config = DataConfig(source="x.csv", **options)
    fields = PromptFields(config)
    _, left_out = clean(data, config, fields)
    return [fields.complete(PromptRow(p)) for p in ("p", "q")], left_out


@pytest.mark.parametrize(
    ("cell", "reference"),
    [
        ("four", "four"), (" 4 ", " 4 "), (4, "4"), (0.5, "0.5"),
        (None, None), ("", None), (" \n", None), (float("nan"), None),
    ],
)  # fmt: skip
def test_reference_answers(cell, reference):
    found, left_out = known_of([{**pair(), "answer": cell}], reference_column="answer")
    assert found == [PromptRow("p", reference=reference), PromptRow("q")]
    assert left_out == {}


@pytest.mark.parametrize("cell", [True, ["a"], "half \ud83d"])
def test_a_reference_that_is_no_answer_is_left_out(cell):
    found, left_out = known_of([{**pair(), "answer": cell}], reference_column="answer")
    assert found[0].reference is None
    assert left_out == {"the reference is no text or number": 1}


def test_one_prompt_has_one_reference():
    data = [
        {**pair(), "answer": None},
        {**pair("P ", chosen="d"), "answer": "4"},
        {**pair(chosen="e"), "answer": "5"},
        {**pair("q"), "answer": "5"},
    ]
    found, left_out = known_of(data, reference_column="answer")
    assert [row.reference for row in found] == ["4", "5"]
    assert left_out == {"another reference for the same prompt": 1}


def test_metadata_is_what_json_can_hold():
    data = [
        {**pair(), "topic": "tea", "day": date(2024, 1, 2), "deep": {"a": [1, None]}},
        {**pair(chosen="d"), "topic": "later rows change nothing"},
        {**pair("q"), "topic": float("nan")},
    ]
    found, left_out = known_of(data, metadata_columns=("topic", "day", "deep"))
    assert found[0].metadata == {"topic": "tea", "day": "2024-01-02", "deep": {"a": [1, None]}}
    assert left_out == {"metadata can't be written as JSON": 1}


def test_columns_that_nobody_asked_for_are_ignored():
    found, _ = known_of([{**pair(), "answer": "4", "topic": object()}])
    assert found[0] == PromptRow("p")
