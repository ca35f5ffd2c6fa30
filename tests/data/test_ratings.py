"""Replies that are rated one by one, or listed with scores, ranks or in order."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.parts import SAMPLE_ROWS
from rlhf.errors import ConfigError
from tests.data.helpers import assistant, message, user
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
    assert (read, left_out) == (ONE, {"score_a is neither a number nor a thumb": 1})
    pair = {"prompt": Q, "chosen": GOOD, "rejected": BAD, "score_chosen": str(score)}
    _, read, left_out, _ = read_rows(tmp_path, [pair | {"score_rejected": str(score)}])
    assert (read, left_out) == (ONE, {})


#: Scores 4.5 and 2 as texts in each form, and how to write any number in it.
FORMS = {
    "plain": "{}", "comma": "{}", "fraction": "{}/5", "percent": "{}%", "stars": "{} stars",
}  # fmt: skip


def written(form, number):
    text = FORMS[form].format(f"{number:g}")
    return text.replace(".", ",") if form == "comma" else text


def places(form, better, worse):
    """Rows of every layout that reads scores, with GOOD at a better score than BAD."""
    high, low = written(form, better), written(form, worse)
    attributes = {"verbosity": written(form, 1), "coherence": written(form, 1)}
    return {
        "rated": [rated(GOOD, score=high), rated(BAD, score=low)],
        "rated by annotators": [rated(GOOD, score=[high, high]), rated(BAD, score=[low])],
        "attributes": [rated(GOOD, helpfulness=high, **attributes),
                       rated(BAD, helpfulness=low, **attributes)],
        "list": [{"prompt": Q, "responses": [BAD, GOOD], "scores": [low, high]}],
        "list of objects": [{"prompt": Q, "completions": [
            {"response": BAD, "score": low}, {"response": GOOD, "score": high}]}],
        "by name": [{"prompt": Q, "responses": {"x": BAD, "y": GOOD},
                     "scores": {"x": low, "y": high}}],
        "two scores": [{"prompt": Q, "response_a": BAD, "response_b": GOOD, "score_a": low,
                        "score_b": high}],
        "pair": [{"prompt": Q, "chosen": GOOD, "rejected": BAD, "score_chosen": high,
                  "score_rejected": low}],
        "margin": [{"prompt": Q, "chosen": GOOD, "rejected": BAD,
                    "margin": written(form, better - worse)}],
    }  # fmt: skip


@pytest.mark.parametrize("place", places("plain", 2, 1))
@given(st.sampled_from([*FORMS]), st.integers(2, 8), st.integers(1, 7))
def test_numbers_are_read_alike_wherever_a_score_stands(tmp_path_factory, place, form, low, more):
    """Whole and half numbers below 8, in any form that is read anywhere, have one meaning."""
    better, worse = (low + more) / 2, low / 2
    if form == "comma" and better % 1 == worse % 1 == (better - worse) % 1 == 0:
        better += 0.5  # whole numbers show no comma
    rows = places(form, better, worse)[place]
    _, read, left_out, reading = read_rows(tmp_path_factory.mktemp("x"), rows)
    assert (read, left_out) == (ONE, {})
    (pair,) = reading.pairs
    weight = 0.65 if place == "attributes" else 1
    assert pair.pair.margin == pytest.approx(weight * (better - worse))


def scored(i, chosen, rejected):
    return {"prompt": f"{Q} {i}", "chosen": f"{GOOD} {i}", "rejected": f"{BAD} {i}",
            "score_chosen": chosen, "score_rejected": rejected}  # fmt: skip


def test_scores_beside_a_pair_that_contradict_it_do_so_in_any_form(tmp_path):
    rows = [scored(0, "4,5", "2"), scored(1, "2", "4,5"), scored(2, "3", "3,0")]
    _, read, left_out, _ = read_rows(tmp_path, rows)
    assert len(read) == 1
    assert left_out == {
        "the scores contradict the labels": 1,
        "tie: both replies have the same score": 1,
    }


@pytest.mark.parametrize("bad", ["1,000", "4/5", "80%", "fair", [], {"a": 1}, "nan"])
def test_scores_beside_a_pair_that_are_not_read_are_counted(tmp_path, bad):
    rows = [scored(0, 4, 2), scored(1, bad, 1), scored(2, 3, bad), scored(3, None, 1)]
    _, read, left_out, reading = read_rows(tmp_path, rows)
    assert len(read) == 4
    assert left_out == {}
    assert [note for note in reading.notes if note.startswith("in 2 of 4 rows score_chosen or ")]


def test_two_scores_in_two_units_are_not_compared(tmp_path):
    reading = read_rows(tmp_path, [scored(0, "4/5", "80%")])[3]
    assert [note for note in reading.notes if "score_chosen or score_rejected" in note]
    assert reading.pairs[0].pair.margin is None


def on_scale(ratings, column="score"):
    return [
        {"prompt": f"{Q} {i // 2}", "response": f"{GOOD} {i}", column: rating}
        for i, rating in enumerate(ratings)
    ]


EARLY = [[0, 1], [0.2, 0.9, 1.0], ["0,5", "1"], ["0.1", "0.7"]]


@pytest.mark.parametrize(
    ("early", "late"),
    [*((early, [1, 2, 3, 4]) for early in EARLY[:2]), (EARLY[2], ["2,5", "4"]),
     (EARLY[3], ["3", "4"]), ([0, 1], [-1]), ([1, 2, 3, 4, 5], [0.3, 0.9]),
     ([1, 2, 4], [0, 1]), ([1, 5], [80, 20]), ([True, False], [1, 4])],
)  # fmt: skip
def test_a_scale_that_changes_late_stops(tmp_path, early, late):
    ratings = [early[i // 2 % len(early) - i % 2] for i in range(SAMPLE_ROWS)] + late
    text = message(ConfigError, read_rows, tmp_path, on_scale(ratings))
    assert "but in the first rows" in text
    assert any(f"data.jsonl:{SAMPLE_ROWS + i}" in text for i in (1, 2, 3))


@pytest.mark.parametrize(
    ("early", "late", "column"),
    [([0, 1], [1, 0], "score"), ([0.5, 3], [9, 1], "score"), ([-2, 1], [7, 1], "score"),
     ([1, 5], [2.5, 6], "score"), ([0, 1], [2, 3], "rank"), ([1, 2, 9], [40, 3], "score")],
)  # fmt: skip
def test_a_scale_that_stays_or_has_no_bounds_is_read(tmp_path, early, late, column):
    ratings = [early[i % len(early)] for i in range(SAMPLE_ROWS)] + late
    label = {"label_column": column} if column == "rank" else {}
    assert len(read_rows(tmp_path, on_scale(ratings, column), **label)[1]) >= SAMPLE_ROWS / 3


def test_the_cure_for_a_scale_can_be_followed_and_names_all_weights(tmp_path):
    rows = on_scale([0, 1] * (SAMPLE_ROWS // 2) + [3, 4])
    text = message(ConfigError, read_rows, tmp_path, rows)
    assert "data.score_weights='{score: 1}'" in text
    read = read_rows(tmp_path, rows, score_weights={"score": 1})[1]
    assert read[-1] == (f"{Q} {SAMPLE_ROWS // 2}", f"{GOOD} {SAMPLE_ROWS + 1}",
                        f"{GOOD} {SAMPLE_ROWS}")  # fmt: skip
    attributes = [{"helpfulness": row.pop("score"), "verbosity": 2, **row} for row in rows]
    text = message(ConfigError, read_rows, tmp_path, attributes)
    assert "data.score_weights='{helpfulness: 0.65, verbosity: -0.4}'" in text


def test_ranks_of_a_tree_may_be_floats(tmp_path):
    replies = [
        {"text": text, "role": "assistant", "rank": rank, "replies": []}
        for text, rank in ((BAD, 1.0), (GOOD, 0.0))
    ]
    row = {"prompt": {"text": Q, "role": "prompter", "replies": replies}}
    assert read_rows(tmp_path, [row])[:3] == ("open-assistant", CHAT, {})
