"""Labels that say which of two replies is better: understood, set, or refused."""

from __future__ import annotations

import contextlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.config import DataConfig
from rlhf.data.formats import detect
from rlhf.data.records import LeftOutError
from rlhf.errors import ConfigError
from tests.data.helpers import message


def decide(rows, suffixes="ab", **options):
    """Preferred reply and margin, "tie", or the reason, of rows with these further columns."""
    replies = {f"response_{suffix}": text for suffix, text in zip(suffixes, "xy", strict=True)}
    table = [{"prompt": "p", **replies, **row} for row in rows]
    layout = detect(list(table[0]), table, DataConfig(source="x.jsonl", **options))
    found = []
    for row in table:
        try:
            (one,) = layout.convert(row).comparisons
            found.append(one.chosen if one.margin is None else (one.chosen, one.margin))
        except LeftOutError as reason:
            found.append(reason.reason.replace("tie: neither reply is preferred", "tie"))
    return found


def winners(*labels, **settings):
    return decide([{"winner": label} for label in labels], labels=settings)


@pytest.mark.parametrize("form", ["{}", "model_{}", "Assistant {}", "ANSWER-{}", "[[{}]]"])
@pytest.mark.parametrize("tie", ["tie", "Both", "neither", "tie (bothbad)", "no_preference", "="])
def test_names_of_the_sides_are_understood_and_others_left_out(form, tie):
    found = "winner has an unknown value" if tie == "=" else "tie"
    assert winners(form.format("a"), form.format("B"), tie) == ["x", "y", found]
    assert winners("left", "Right", "second", "response_a", None) == [*"xyyx", "winner is missing"]


@pytest.mark.parametrize("other", [0, "0", 1, 0.8, "z", -1, True])
def test_ones_and_twos_are_sides_but_what_can_mean_either_is_refused(other):
    assert winners("1", 2, 1.0, "2.0") == [*"xyxy"]
    text = message(ConfigError, winners, other, other, 1)
    shown = f"'{str(other).lower()}' × {2 + (other == 1 and other is not True)}"
    for part in (shown, "data.label_column = 'winner'",
                 "set data.labels.first to the value that prefers response_a"):  # fmt: skip
        assert part in text


@pytest.mark.parametrize(
    ("first", "second", "tie"),
    [(1, 0, -1), ("A>B", "B>A", "A=B"), (">", "<", "="), ("+", "-", "0"), ("👍", "👎", "🤷"),
     ("model a", "Model_B", "no-one"), ("first", "second", "a"), ("b", "a", "c")],
)  # fmt: skip
def test_set_labels_mean_what_they_are_set_to(first, second, tie):
    labels = {"first": first, "second": second, "tie": tie}
    shown = [str(value).upper().replace(" ", "_") for value in labels.values()]
    assert winners(first, second, tie, "?", **labels)[:3] == ["x", "y", "tie"]
    assert winners(*shown, "?", **labels) == ["x", "y", "tie", "winner has an unknown value"]


@pytest.mark.parametrize("labels", [{"second": "1.0"}, {"second": "2", "tie": "2"}])
def test_one_value_is_not_set_to_two_meanings(labels):
    assert "have the same value" in message(ConfigError, winners, 1, 2, first="1", **labels)


BIG = 10**400


def test_signs_scores_and_flags():
    rows = [{"overall_preference": sign} for sign in (-2, 1, 0, "3", "so", True, BIG)]
    fault = "overall_preference is no number"
    assert decide(rows, "12") == [("x", 2), ("y", 1), "tie", ("y", 3), fault, fault, fault]
    rows = [{"score_a": a, "score_b": b} for a, b in ((2, 5), (1.5, 1), (0, 0), (0, BIG))]
    assert decide(rows) == [("y", 3), ("x", 0.5), "tie", "score_b is neither a number nor a thumb"]
    flags = ("winner_model_a", "winner_model_b", "winner_tie")
    rows = [dict(zip(flags, bits, strict=True)) for bits in ("100", "010", "001", "110", "000")]
    fault = "not exactly one of the winner columns is set"
    assert decide(rows) == ["x", "y", "tie", fault, fault]


@pytest.mark.parametrize(
    ("row", "is_read"),
    [({"answer": "x", "score": 2}, False), ({"generations": ["x", "y"], "ratings": [2]}, False),
     ({"chosen": "x", "rejected": "y", "score_chosen": 2, "score_rejected": 1}, True)],
)  # fmt: skip
def test_huge_numbers_are_no_ratings(row, is_read):
    huge = {key: BIG if value == 2 else [BIG, 1] if value == [2] else value
            for key, value in row.items()}  # fmt: skip
    layout = detect(["prompt", *row], [{"prompt": "p", **row}], DataConfig(source="x.jsonl"))
    with contextlib.nullcontext() if is_read else pytest.raises(LeftOutError, match="nor a thumb"):
        assert layout.convert({"prompt": "p", **huge}).comparisons[0].margin is None


VOTES = st.lists(st.sampled_from("ab"), min_size=1, max_size=5)


@given(VOTES, st.sampled_from(["{}", "model_{}", "Response {}"]))
def test_swapping_replies_and_votes_gives_the_same_preference(votes, form):
    lead = votes.count("a") - votes.count("b")
    swapped = [form.format("b" if vote == "a" else "a") for vote in votes]
    row = {"response_a": "y", "response_b": "x", "winner": swapped}
    wins = "x" if lead > 0 else "y"
    found = [(wins, abs(lead) / len(votes))] if lead else ["tie"]
    assert winners([form.format(vote) for vote in votes]) == decide([row]) == found


def test_a_setting_wins_over_the_sign_and_a_tie_alone_is_heard():
    rows = [{"overall_preference": value} for value in (-1, 1)]
    assert decide(rows, "12", labels={"second": "-1"}) == [
        "y",
        "overall_preference has an unknown value",
    ]
    assert winners("a", "skip", "b", tie="skip") == ["x", "tie", "y"]


def test_a_label_of_marks_alone_is_no_reply_of_marks_alone():
    rows = [{"response_b": "!!!", "winner": label} for label in ("a", "b", "b", "?")]
    assert decide(rows)[3] == "winner has an unknown value"


@pytest.mark.parametrize("value", [1, 2, "a"])
def test_a_column_with_one_value_decides_nothing_beside_one_that_varies(value):
    rows = []
    for i in range(12):
        texts = ("GOOD", "BAD") if i % 2 else ("BAD", "GOOD")
        one, other = (f"{text} {i}" for text in texts)
        share = 1.25 if i % 2 else 1.75
        rows.append({"label": value, "instruction": f"q {i}", "output_1": one, "output_2": other,
                     "preference": share})  # fmt: skip
    layout = detect([*rows[0]], rows, DataConfig(source="x"))
    for row in rows:
        (comparison,) = layout.convert(row).comparisons
        assert comparison.chosen.startswith("GOOD")
