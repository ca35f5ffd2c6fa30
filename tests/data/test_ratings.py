"""Replies that are rated one by one, or listed with scores, ranks or in order."""

from __future__ import annotations

import math

import pytest

from tests.data.helpers import assistant, user
from tests.data.test_formats import BAD, CHAT, GOOD, HH, ONE, Q, read_rows


def rated(reply, **columns):
    return {"prompt": Q, "response": reply, **columns}


def test_weights_of_rating_columns_decide(tmp_path):
    rows = [rated(GOOD, tone=1, facts=5), rated(BAD, tone=4, facts=1)]
    weights = {"tone": 0.5, "facts": 1.0}
    found, read, left_out, reading = read_rows(tmp_path, rows, score_weights=weights)
    assert (found, read, left_out) == ("rated", ONE, {})
    assert "compared by +0.5 tone +1 facts" in " ".join(reading.notes)
    weights = {"tone": 1.0, "facts": 0.5}
    assert read_rows(tmp_path, rows, score_weights=weights)[1] == [(Q, BAD, GOOD)]


def test_weights_that_are_set_win_over_a_score_and_over_helpsteers(tmp_path):
    rows = [
        rated(GOOD, score=1, helpfulness=1, verbosity=4),
        rated(BAD, score=5, helpfulness=3, verbosity=1),
    ]
    assert read_rows(tmp_path, rows)[1] == [(Q, BAD, GOOD)]
    assert read_rows(tmp_path, rows, score_weights={"verbosity": 1.0})[1] == ONE


@pytest.mark.parametrize(
    "rows",
    [
        [{"messages": [user(Q), assistant(text)], "label": text == GOOD} for text in (GOOD, BAD)],
        [
            {"conversations": [{"from": "human", "value": Q}, {"from": "gpt", "value": text}],
             "rating": rating}
            for text, rating in ((BAD, 1), (GOOD, 5))
        ],
        [{"conversation": HH.format(Q, text), "score": len(text)} for text in (GOOD, BAD)],
    ],
)  # fmt: skip
def test_the_last_reply_of_a_conversation_is_rated(tmp_path, rows):
    assert read_rows(tmp_path, rows)[:3] == ("rated", CHAT, {})


def test_a_rated_conversation_without_a_prompt_or_a_reply_is_left_out(tmp_path):
    rows = [
        {"messages": messages, "label": label}
        for messages, label in (
            ([user(Q), assistant(GOOD)], True),
            ([user(Q), assistant(BAD)], False),
            ([assistant(BAD)], False),
            ([user(Q)], False),
        )
    ]
    _, read, left_out, _ = read_rows(tmp_path, rows)
    assert read == CHAT
    assert left_out == {
        "reply is a conversation without a prompt": 1,
        "reply does not end with an assistant message": 1,
    }


LISTED = {"prompt": Q, "responses": [BAD, GOOD]}


@pytest.mark.parametrize(
    ("row", "settings"),
    [
        (LISTED | {"marks": [1, 2]}, {"label_column": "marks"}),
        (LISTED | {"my_rank": [2, 1]}, {"label_column": "my_rank"}),
        (LISTED | {"scores": [9, 1], "marks": [1, 2]}, {"label_column": "marks"}),
        ({"prompt": Q, "responses": [GOOD, BAD]}, {"format": "ranking"}),
        ({"prompt": Q, "ranked": [{"text": GOOD}, {"text": BAD}]}, {}),
        ({"prompt": Q, "responses": [{"text": GOOD}, {"text": BAD}]}, {"format": "ranking"}),
    ],
)
def test_replies_of_a_list_in_their_order_or_by_a_column(tmp_path, row, settings):
    assert read_rows(tmp_path, [row], **settings)[:3] == ("ranking", ONE, {})


@pytest.mark.parametrize("score", [math.nan, math.inf])
def test_scores_that_are_no_numbers_decide_nothing(tmp_path, score):
    """They come from Parquet, or from JSON as text; a label beside them stays."""
    row = {"prompt": Q, "response_a": BAD, "response_b": GOOD}
    rows = [
        {**row, "score_a": 1, "score_b": 2},
        {**row, "prompt": f"{Q}?", "score_a": str(score), "score_b": 2},
    ]
    _, read, left_out, _ = read_rows(tmp_path, rows)
    assert (read, left_out) == (ONE, {"score_a is no number": 1})
    pair = {"prompt": Q, "chosen": GOOD, "rejected": BAD, "score_chosen": str(score)}
    _, read, left_out, _ = read_rows(tmp_path, [pair | {"score_rejected": str(score)}])
    assert (read, left_out) == (ONE, {})


def test_ranks_of_a_tree_may_be_floats(tmp_path):
    replies = [
        {"text": text, "role": "assistant", "rank": rank, "replies": []}
        for text, rank in ((BAD, 1.0), (GOOD, 0.0))
    ]
    row = {"prompt": {"text": Q, "role": "prompter", "replies": replies}}
    assert read_rows(tmp_path, [row])[:3] == ("open-assistant", CHAT, {})
