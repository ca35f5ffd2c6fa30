"""Prompts near each other stay on one side, and what is held out stays held out."""

from __future__ import annotations

import random

import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from rlhf.data.chat import loose_key
from rlhf.data.sources import own_test_files
from rlhf.data.split import MAX_CHANCES, find_clusters, held_out_clusters, position
from tests.data.helpers import assistant, sentence, user
from tests.examples import examples

OPENING = "How do I descale a kettle?"
#: Twelve questions that have nothing in common.
SUBJECTS = (
    "kettle", "lamp", "sofa", "violin", "garden", "passport", "bicycle", "mortgage", "vaccine",
    "origami", "glacier", "sonnet",
)  # fmt: skip


def system(content):
    return {"role": "system", "content": content}


def groups(*prompts, threshold=0.8):
    """Numbers of the prompts, together where their clusters are."""
    found = find_clusters(prompts, threshold)
    names: dict[int, list[int]] = {}
    for number, prompt in enumerate(prompts):
        names.setdefault(found.of(prompt), []).append(number)
    return list(names.values())


def openings(found):
    """Openings by cluster."""
    by_cluster: dict[int, set[str]] = {}
    for cluster, opening in zip(found.key_clusters.tolist(), found.openings, strict=True):
        by_cluster.setdefault(cluster, set()).add(opening)
    return by_cluster


def held_out_of(by_cluster, fraction, seed=0, salt=""):
    """Clusters that are held out, of openings by cluster."""
    pairs = [(name, text) for name, texts in by_cluster.items() for text in texts]
    names = np.array([name for name, _ in pairs], dtype=np.int64)
    positions = np.array([position(seed, salt + text) for _, text in pairs])
    return set(held_out_clusters(names, positions, fraction).tolist())


@pytest.mark.parametrize("threshold", [0.8, None])
@pytest.mark.parametrize(
    "prompts",
    [
        ("Say x", " say  X\n", [user("SAY x")], "S\uff41y x"),
        # Turns of one conversation, in any order, also where only a later turn is in the data.
        (OPENING, [user(OPENING), assistant("With acid."), user("Which?")]),
        ([user(OPENING), assistant("With acid."), user("Which?")], OPENING),
        (
            [user(OPENING), assistant("One."), user("And?")],
            [user(OPENING), assistant("Two."), user("And then?")],
        ),
        # Openings may be short where few prompts share them.
        (
            [user("法国的首都是哪里?"), assistant("巴黎。"), user("人口呢?")],
            [user("法国的首都是哪里?"), assistant("是巴黎。"), user("在哪条河边?")],
            "法国的首都是哪里",
        ),
        # One question under several system turns, or none.
        ([system("Be brief."), user(OPENING)], [system("Talk like a pirate."), user(OPENING)]),
        ([system("Be brief."), user("2+2?")], "2+2?", [system("Be kind."), user("2+2 ?")]),
        ([assistant("Hello!"), user(OPENING)], OPENING),
    ],
)
def test_one_cluster(prompts, threshold):
    assert groups(*prompts, threshold=threshold) == [[*range(len(prompts))]]


def test_near_duplicates_are_one_cluster():
    long = "Please tell me in a few words how I should descale an old kettle with household things"
    prompts = (long, f"{long}, thanks", [system("s"), user(f"{long}!!")], "Another thing")
    assert groups(*prompts) == [[0, 1, 2], [3]]
    assert groups(*prompts, threshold=None) == [[0, 2], [1], [3]]
    assert groups(*prompts, threshold=1) == [[0, 2], [1], [3]]


@pytest.mark.parametrize(
    "prompts",
    [
        ("Say x", "Say y"),
        # The question stands in the system turn.
        [[system(f"Answer about the {name}"), user("Go")] for name in SUBJECTS],
        # A greeting begins many conversations, with the same answer, which may be long.
        [
            [user("Hi"), assistant("Hello! How can I help you today?"), user(f"A {name}.")]
            for name in SUBJECTS
        ],
        [
            [user("Good day, I am a customer and need help"), assistant("Ok"), user(name)]
            for name in SUBJECTS
        ],
        [[user(f"Hello, I have got a question on my {name}")] for name in SUBJECTS],
        # A template: what all prompts have is not compared.
        [f"{'Use the handbook. Rule one is to be kind. ' * 9} Q: {name}?" for name in SUBJECTS],
    ],
)
def test_clusters_of_their_own(prompts):
    assert groups(*prompts) == [[i] for i in range(len(prompts))]


def test_questions_behind_a_shared_greeting_or_template_are_still_compared():
    for shared in ([user("Hi"), assistant("Hello!")], [system("You help."), assistant("Yes?")]):
        prompts = [[*shared, user(f"How do I mend a {name}")] for name in SUBJECTS]
        prompts += [[*shared, user(f"How do I mend a {SUBJECTS[3]}??")]]
        assert [3, 12] in groups(*prompts)
    rules = "Use the handbook. Rule one is to be kind. " * 9
    prompts = [f"{rules} Q: {sentence(random.Random(i))}" for i in range(12)]
    prompts += [f"{prompts[3]} now"]
    assert [3, 12] in groups(*prompts)


def test_a_conversation_has_one_opening_and_so_one_chance_to_be_held_out():
    turns = [user(OPENING), assistant("a"), user("And then?"), assistant("b"), user("And now?")]
    prompts = [turns[:1], turns[:3], turns, [system("Be brief."), *turns], OPENING]
    for found in (find_clusters(prompts, 0.8), find_clusters(prompts[1:3])):
        assert [len(own) for own in openings(found).values()] == [1]


def test_common_beginnings_are_named():
    found = find_clusters([[user("Hi"), assistant("Yes?"), user(name)] for name in SUBJECTS])
    assert found.common == {"hi": 12}


@st.composite
def growing_data(draw):
    """Prompts, and the same with more: other system turns, later turns, small changes."""
    texts = [sentence(random.Random(i)) for i in range(40)]
    prompts: list = []
    for text in texts:
        forms = [
            text,
            [system("Be brief."), user(text)],
            [user(text), assistant("a"), user("And then?")],
            f"{text} please",
        ]
        prompts += draw(st.lists(st.sampled_from(forms), min_size=1, max_size=3))
    rng = draw(st.randoms(use_true_random=False))
    rng.shuffle(prompts)
    cut = draw(st.integers(20, len(prompts)))
    return prompts[:cut], prompts[cut:]


# Shrinking takes minutes, and an example of forty prompts is read as easily.
@settings(max_examples=examples(40), phases=[Phase.explicit, Phase.reuse, Phase.generate])
@given(growing_data(), st.integers(0, 3), st.floats(0.1, 0.5))
def test_held_out_prompts_stay_held_out_when_data_grow(data, seed, fraction):
    old, new = data
    sides = []
    for prompts in (old, [*new, *old]):
        found = find_clusters(prompts, 0.8)
        held_out = found.held_out(found.numbers, fraction, seed)
        assert {*np.flatnonzero(held_out).tolist()} == held_out_of(openings(found), fraction, seed)
        sides.append((found, held_out))
    (before, held_before), (after, held_after) = sides
    if not 2 < held_before.sum() < len(held_before) - 2:
        return  # only there that both sides have two prompts
    for prompt in old:
        if held_before[before.of(prompt)]:
            assert len(openings(after)[after.of(prompt)]) <= MAX_CHANCES
            assert held_after[after.of(prompt)]


def test_chance_of_a_cluster_to_be_held_out():
    for n in (1, 3, 20):
        share = (
            len(held_out_of({i: [f"{i} {j}" for j in range(n)] for i in range(3000)}, 0.1)) / 3000
        )
        # P(one of n is below 0.1) = 1 - 0.9^n, for three openings at most; ± 3 deviations.
        assert abs(share - (1 - 0.9 ** min(n, 3))) < 0.025


def test_two_prompts_at_least_on_each_side():
    for count, fraction, held_out in ((4, 0.01, 2), (4, 0.99, 2), (3, 0.1, 1), (2, 0.5, 0)):
        assert len(held_out_of({i: [f"{i}"] for i in range(count)}, fraction)) == held_out


def test_salt_makes_an_independent_choice():
    own = {i: [f"{i}"] for i in range(2000)}
    one, two = (held_out_of(own, 0.5, 0, salt) for salt in ("", "judge"))
    assert 400 < len(one & two) < 600


def test_loose_key_ignores_form_and_not_signs():
    assert loose_key("2²") == loose_key("22") == loose_key(" 22")
    assert loose_key("C++") != loose_key("C#")


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
        (["prefs.jsonl", "prefs_test.jsonl"], {"prefs_test.jsonl"}),
        (["prefs.csv.gz", "eval_prefs.csv.gz"], {"eval_prefs.csv.gz"}),
        (["a/prefs.csv", "a/prefs-dev.csv", "b.csv"], {"a/prefs-dev.csv"}),
        (["test/a.csv", "main/a.csv"], {"test/a.csv"}),
        # No part of their own: all of it, or a word among others.
        (["test.jsonl"], set()),
        (["test-1.jsonl", "test-2.jsonl"], set()),
        (["dev.csv", "dev2.csv"], set()),
        (["latest.csv", "contest.csv", "more.csv"], set()),
        (["my-dev-team.csv", "my-ops-team.csv"], set()),
        (["train-test-mix.csv", "train.csv"], set()),
        (["dev-team.jsonl", "sales-team.jsonl"], set()),
        (["dev-team.jsonl", "team.jsonl"], set()),
        (["dev-team.jsonl", "train.jsonl"], set()),
        (["ab_test.jsonl", "survey.jsonl"], set()),
    ],
)  # fmt: skip
def test_the_sources_own_test_part(names, held_out):
    assert own_test_files(names) == held_out
