"""Near duplicates: exact similarity, what LSH finds, and that nothing else decides."""

from __future__ import annotations

import json
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.data import duplicates
from rlhf.data.chat import loose_text
from rlhf.data.duplicates import Shingles, bands, bare_text, duplicate_groups, width
from tests.data.helpers import WORDS, sentence


def changed(rng: random.Random, text: str, count: int) -> str:
    words = text.split()
    for _ in range(count):
        words[rng.randrange(len(words))] = rng.choice(WORDS)
    return " ".join(words)


def near_duplicates(texts, threshold, seed=0):
    """Each text's group, named by its smallest text."""
    ordered = sorted(set(texts))
    groups = duplicate_groups(ordered, np.arange(len(ordered)), threshold, seed)
    return {text: ordered[group] for text, group in zip(ordered, groups.tolist(), strict=True)}


def plain_jaccard(one: str, other: str) -> float:
    """J(A, B) of two ASCII texts, by Python's own sets."""
    a, b = ({t[i : i + 5] for i in range(len(t) - 4)} or {t} for t in (one, other))
    return len(a & b) / len(a | b)


ascii_texts = st.text("abc ", min_size=1, max_size=40)


@given(ascii_texts, ascii_texts)
def test_similarity_is_that_of_sets(one, other):
    one, other = one.ljust(5), other.ljust(5)
    assert Shingles().jaccard(one, other) == plain_jaccard(one, other)
    assert Shingles().is_similar(one, other, 0.5) == (plain_jaccard(one, other) >= 0.5)


@given(st.lists(st.text("abc 法语é🙂", max_size=12), max_size=6))
def test_texts_of_a_batch_do_not_touch(texts):
    texts = [text or "x" for text in texts]
    together, offsets = Shingles().flat(texts)
    for i, text in enumerate(texts):
        alone = Shingles().flat([text])[0]
        assert together[int(offsets[i]) : int(offsets[i + 1])].tolist() == alone.tolist()
        assert len(alone)


def test_a_chinese_character_counts_as_two():
    # 4 characters are 8 of which 4 windows of 5; a changed last one changes the last 2 windows.
    assert Shingles().jaccard("法国首都", "法国首府") == 2 / 6
    assert (width("法国首都"), width("city"), width("éa")) == (8, 4, 2)


@pytest.mark.parametrize(
    ("text", "bare"),
    [
        ("  I'm SORRY,\n I can't! ", "i m sorry i can t"),
        ("Straße — № 5²", "strasse no 52"),
        ("हिन्दी?", "हिन्दी"),
        ("2+2=?", "2 2"),
        ("?!", "?!"),
        (" 🙂\n🙂", "🙂 🙂"),
    ],
)
def test_bare_text(text, bare):
    assert bare_text(text) == bare


@given(st.text(), st.sampled_from([str.upper, str.lower, lambda t: f" {t}\n", lambda t: t]))
def test_texts_that_are_loosely_equal_have_the_same_bare_text(text, change):
    if loose_text(change(text)) == loose_text(text):
        assert bare_text(change(text)) == bare_text(text)


@given(st.lists(st.text("ab ", min_size=1, max_size=14), max_size=12), st.randoms())
def test_only_chains_of_similar_texts_are_joined_in_any_order(texts, rng):
    found = near_duplicates(texts, 0.7)
    shuffled = [*texts, *texts[:2]]
    rng.shuffle(shuffled)
    assert near_duplicates(shuffled, 0.7) == found
    # The transitive closure of exact similarity, with the template of all texts left out.
    shingles = Shingles(sorted(set(texts)))
    closure = {text: {text} for text in texts}
    for _ in texts:
        for one in texts:
            for other in texts:
                if shingles.jaccard(one, other) >= 0.7:
                    closure[one] |= closure[other]
    for text, name in found.items():
        assert name in closure[text]
        assert name <= text


@pytest.mark.parametrize("threshold", [0.5, 0.7, 0.8, 0.9])
@pytest.mark.parametrize("seed", [0, 1])
def test_nearly_all_similar_pairs_are_found(threshold, seed):
    rng = random.Random(seed)
    pairs = []
    for _ in range(250):
        text = sentence(rng)
        pairs.append((text, changed(rng, text, rng.randint(1, 8))))
    found = near_duplicates([text for pair in pairs for text in pair], threshold, seed)
    similar = [pair for pair in pairs if plain_jaccard(*pair) >= threshold]
    others = [pair for pair in pairs if plain_jaccard(*pair) < threshold]
    assert len(similar) > 20
    assert len(others) > 5
    assert sum(found[one] == found[other] for one, other in similar) >= 0.99 * len(similar)
    assert all(found[one] != found[other] for one, other in others)


@pytest.mark.parametrize("threshold", [0.5, 0.6, 0.7, 0.8, 0.9, 1.0])
def test_bands_reach_the_recall_within_the_signature(threshold):
    count, rows = bands(threshold)
    assert count * rows <= duplicates.PERMUTATIONS
    assert 1 - (1 - threshold**rows) ** count >= duplicates.RECALL


def test_a_large_group_is_found_whole():
    rng = random.Random(3)
    text = sentence(rng, 60)
    group = [changed(rng, text, 1) for _ in range(150)]
    others = [sentence(rng, 60) for _ in range(600)]
    found = near_duplicates([*group, *others], 0.7)
    assert len({found[one] for one in group}) == 1
    assert len({found[one] for one in others}) == 600


def test_what_most_texts_share_is_a_template_and_common_words_are_none():
    rng = random.Random(4)
    template = sentence(rng, 150)
    questions = [sentence(rng, 12) for _ in range(50)]
    prompts = [f"{template} {question}" for question in questions]
    assert plain_jaccard(bare_text(prompts[0]), bare_text(prompts[1])) > 0.8
    assert len(set(near_duplicates(prompts, 0.8).values())) == 50
    again = f"{template} {questions[7]} x"
    assert near_duplicates([*prompts, again], 0.8)[again] == min(prompts[7], again)
    # All of a text may be template.
    assert near_duplicates([*prompts, template], 0.8)[template] == template
    long = ["and so on and on and the rest " + sentence(rng, 60) for _ in range(50)]
    assert not len(Shingles(long)._template)


def test_same_groups_in_another_process_with_other_threads():
    rng = random.Random(5)
    texts = [sentence(rng) for _ in range(100)]
    texts += [changed(rng, text, 1) for text in texts]
    script = (
        "import json, sys\n"
        "from tests.data.test_duplicates import near_duplicates\n"
        "print(json.dumps(near_duplicates(json.load(sys.stdin), 0.8)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], input=json.dumps(texts[::-1]), capture_output=True,
        text=True, check=True, env={"PYTHONHASHSEED": "9", "RAYON_NUM_THREADS": "1"},
        cwd=Path(__file__).parents[2],
    )  # fmt: skip
    assert json.loads(done.stdout) == near_duplicates(texts, 0.8)


def test_signatures_do_not_change_unseen():
    """Another algorithm in rensa shall be noticed: it may overlook other duplicates."""
    matrix = duplicates.RMinHash.digest_matrix_from_flat_token_hashes(
        *Shingles().flat(["the quick brown fox"]), 4, 0
    )
    assert matrix.to_rows() == [[227724672, 358707007, 16473136, 153135634]]
