"""Prompts near each other stay on one side, and what is held out stays held out."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data.sources import own_test_files
from rlhf.data.split import clusters, held_out_clusters, loose_key
from tests.data.helpers import assistant, user

OPENING = "How do I descale a kettle?"


def groups(*prompts):
    """Numbers of the prompts, together where their clusters are."""
    found = clusters(prompts)
    names: dict[str, list[int]] = {}
    for number, prompt in enumerate(prompts):
        names.setdefault(found[loose_key(prompt)], []).append(number)
    return list(names.values())


@pytest.mark.parametrize(
    "prompts",
    [
        ("Say x", " say  X\n", [user("SAY x")], "S\uff41y x"),
        # Turns of one conversation, in any order, also where only a later turn is in the data.
        (OPENING, [user(OPENING), assistant("With acid."), user("Which?")]),
        ([user(OPENING), assistant("With acid."), user("Which?")], OPENING),
        (
            [user("Hi"), assistant("Hello!"), user("A kettle.")],
            [user("Hi"), assistant("Hello!"), user("A lamp.")],
        ),
        (
            [user(OPENING), assistant("One."), user("And?")],
            [user(OPENING), assistant("Two."), user("And then?")],
        ),
    ],
)
def test_one_cluster(prompts):
    assert groups(*prompts) == [[*range(len(prompts))]]


@pytest.mark.parametrize(
    "prompts",
    [
        ("Say x", "Say y"),
        ([{"role": "system", "content": "a"}, user("p")], [user("p")]),
        # A greeting begins many conversations.
        (
            [user("Hi"), assistant("Hello!"), user("A kettle.")],
            [user("Hi"), assistant("Good day."), user("A lamp.")],
            "Hi",
        ),
    ],
)
def test_clusters_of_their_own(prompts):
    assert groups(*prompts) == [[i] for i in range(len(prompts))]


@given(st.integers(8, 200), st.floats(0.05, 0.95), st.integers(0, 5))
def test_held_out_prompts_stay_when_data_grow(count, fraction, seed):
    names = [f"n{i}" for i in range(count)]
    before = held_out_clusters(names, fraction, seed)
    after = held_out_clusters([*names, *(f"new{i}" for i in range(count))], fraction, seed)
    assert 2 <= len(before) <= count - 2
    # Only where a side would be too small, some change sides.
    if 2 < len(before) < count - 2:
        assert before == after & set(names)


def test_about_the_wanted_share_is_held_out():
    share = len(held_out_clusters([f"n{i}" for i in range(5000)], 0.1, 0)) / 5000
    assert 0.08 < share < 0.12


@pytest.mark.parametrize(
    ("names", "held_out"),
    [
        (["train.jsonl", "test.jsonl"], {"test.jsonl"}),
        (["a/train-00000-of-00002.parquet", "a/validation-00000-of-00001.parquet"],
         {"a/validation-00000-of-00001.parquet"}),
        (["helpful/train.jsonl.gz", "helpful/test.jsonl.gz", "x/train.jsonl.gz"],
         {"helpful/test.jsonl.gz"}),
        (["pairs.csv", "test.csv", "eval.csv"], {"test.csv", "eval.csv"}),
        (["train.csv", "held_out.csv"], {"held_out.csv"}),
        (["prefs_train.csv", "prefs_dev.csv"], {"prefs_dev.csv"}),
        (["test/a.csv", "train/a.csv"], {"test/a.csv"}),
        # No part of their own: all of it, or a word among others.
        (["test.jsonl"], set()),
        (["test-1.jsonl", "test-2.jsonl"], set()),
        (["dev.csv", "dev2.csv"], set()),
        (["latest.csv", "contest.csv", "more.csv"], set()),
        (["my-dev-team.csv", "my-ops-team.csv"], set()),
        (["train-test-mix.csv", "train.csv"], set()),
    ],
)  # fmt: skip
def test_the_sources_own_test_part(names, held_out):
    assert own_test_files(names) == held_out
