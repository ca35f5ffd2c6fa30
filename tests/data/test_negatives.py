"""Negatives: preferred replies made worse."""

from __future__ import annotations

from random import Random

import pytest

from rlhf.data import negatives
from rlhf.data.negatives import make_negatives
from rlhf.data.rows import Pair

#: Sentences of each reply are its own, so that it can be told where one comes from.
PAIRS = [
    Pair(f"ask {i}?", f"a{i} is so. b{i} too!\n\nc{i} at last.", f"bad {i}", f"g{i % 2}", 2.0,
         weight=0.5)
    for i in range(40)
]  # fmt: skip


def words(text: str) -> list[str]:
    return text.replace(".", "").replace("!", "").split()


def test_there_are_as_many_as_asked_for_and_none_is_a_good_reply():
    made = make_negatives(PAIRS, 2.0, seed=3)
    assert len(made) == 80
    by_prompt = {pair.prompt: pair for pair in PAIRS}
    for pair in made:
        own = by_prompt[pair.prompt]
        assert pair.chosen == own.chosen
        assert pair.rejected.strip() not in ("", own.chosen)
        assert (pair.group, pair.margin, pair.weight) == (own.group, 0.0, 0.5)
    # Each pair twice, with different texts.
    assert len({(pair.prompt, pair.rejected) for pair in made}) == 80
    assert {sum(pair.prompt == p.prompt for pair in made) for p in PAIRS} == {2}


def test_the_seed_decides():
    assert make_negatives(PAIRS, 1.0, 3) == make_negatives(PAIRS, 1.0, 3)
    assert make_negatives(PAIRS, 1.0, 3) != make_negatives(PAIRS, 1.0, 4)


def test_a_share_takes_different_pairs():
    made = make_negatives(PAIRS, 0.25, 0)
    assert len(made) == len({pair.prompt for pair in made}) == 10


def test_lengths_go_both_ways():
    # A reward model must not learn from negatives that short or long is bad.
    made = make_negatives(PAIRS, 4.0, 0)
    longer = sum(len(words(p.rejected)) > len(words(p.chosen)) for p in made)
    shorter = sum(len(words(p.rejected)) < len(words(p.chosen)) for p in made)
    assert longer / len(made) < 0.6
    assert shorter / len(made) > 0.15


REPLY = "One is so. Two too!\n\nThree at last."
OTHER = "Four goes. Five goes."


def changed(change: negatives.Change, reply: str = REPLY) -> set[str]:
    rng = Random(0)
    return {change(reply, OTHER, rng) for _ in range(200)} - {""}


def test_a_repeated_sentence_stands_between_whole_ones_with_a_gap_of_its_place():
    texts = changed(negatives._repeated)
    assert "One is so. Two too!\n\nThree at last.\n\nThree at last." in texts
    assert "One is so. One is so. Two too!\n\nThree at last." in texts
    for text in texts:
        # The paragraphs stay, and all sentences are the reply's own.
        assert "\n\n" in text
        assert set(words(text)) == set(words(REPLY))
        assert 1 <= text.count(".") + text.count("!") - 3 <= negatives.MOST_ADDED


def test_inserted_and_replaced_sentences_are_of_another_reply():
    for text in changed(negatives._inserted):
        assert {*words(REPLY)} < {*words(text)} <= {*words(REPLY), "Four", "Five", "goes"}
    assert changed(negatives._replaced) == {
        "Four goes. Two too!\n\nThree at last.", "Five goes. Two too!\n\nThree at last.",
        "One is so. Four goes.\n\nThree at last.", "One is so. Five goes.\n\nThree at last.",
        "One is so. Two too!\n\nFour goes.", "One is so. Two too!\n\nFive goes.",
    }  # fmt: skip
    assert changed(negatives._other_prompt) == {OTHER}


def test_a_cut_ends_no_sentence():
    assert changed(negatives._truncated) == {
        "One", "One is", "One is so. Two", "One is so. Two too!\n\nThree",
        "One is so. Two too!\n\nThree at",
    }  # fmt: skip
    assert changed(negatives._truncated, "是的。") == {"是", "是的"}


def test_a_reply_to_the_same_prompt_fits_it():
    """Prompts that differ in spacing and case alone have good replies in common."""
    pairs = [Pair("How so?", "It is so.", "x"), Pair(" how  SO?", "That way.", "x")]
    for seed in range(50):
        for pair in make_negatives(pairs, 4.0, seed):
            assert not {"That", "way."} & {*pair.rejected.split()} or pair.chosen == "That way."
            assert pair.rejected not in ("It is so.", "That way.")


def test_another_blank_line_makes_no_reply_worse():
    pairs = [Pair("a?", "one\n \ntwo", "x"), Pair("b?", "three\n \nfour", "x")]
    for seed in range(50):
        for pair in make_negatives(pairs, 4.0, seed):
            assert pair.rejected.split() != pair.chosen.split()


def test_a_script_without_blanks_has_sentences():
    assert negatives._split("一。二。三") == (["一。", "二。", "三"], ["", ""])


@pytest.mark.parametrize(
    "pairs",
    [
        [],
        [Pair("a?", " ", "x")],
        # The only change that one letter has is to be said again.
        [Pair("a?", "x", "y"), Pair("a?", "x x", "y"), Pair("a?", "x x x", "y")],
    ],
)
def test_little_gives_few_and_no_error(pairs):
    made = make_negatives(pairs, 1.0, 0)
    assert len(made) <= len(pairs)
    assert all(p.rejected.strip() not in {q.chosen.strip() for q in pairs} for p in made)


def test_another_good_reply_to_the_prompt_is_no_negative():
    # "yes" and "no" are both preferred for the first prompt.
    pairs = [Pair("a?", "yes", "x"), Pair("a?", "no", "x"), Pair("b?", "no", "x")]
    for seed in range(50):
        made = make_negatives(pairs, 4.0, seed)
        assert not {p.rejected for p in made if p.prompt == "a?"} & {"yes", "no"}


def test_chats_have_negatives():
    chat = [{"role": "system", "content": "s"}, {"role": "user", "content": "u"}]
    made = make_negatives([Pair(chat, "One. Two.", "x"), *PAIRS[:3]], 1.0, 0)
    assert any(pair.prompt == chat for pair in made)
