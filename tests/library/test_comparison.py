"""Comparison of replies by hand: win rates, gaps, shifts, over-optimisation, texts."""

from __future__ import annotations

import numpy as np
import pytest

from rlhf.evaluation.answers import Answers
from rlhf.evaluation.comparison import compare, over_optimisation, own_metrics, shifts, wins
from rlhf.evaluation.texts import REFUSALS, distinct, is_refusal, repetition
from rlhf.inference import mean_of, share_of

KEYS = ["p", "q", "r", "s"]


def answers(scores=None, **measures) -> Answers:
    arrays = {name: np.array(values, dtype=float) for name, values in measures.items()}
    return Answers([], arrays, {n: np.array(v, dtype=float) for n, v in (scores or {}).items()})


def test_wins_are_those_of_all_pairs_of_replies():
    # 1 and 3 against 2 and 3: 1 < 2, 1 < 3, 3 > 2, 3 = 3 make 2, of which the tie is a half.
    before, after = np.array([[1.0, 3.0], [0.0, 0.0]]), np.array([[2.0, 3.0], [1.0, 0.0]])
    # Of the second policy: 2 > 1, 2 < 3, 3 > 1, 3 = 3: 2.5 of 4; then 1 > 0 twice, 0 = 0 twice.
    assert wins(before, after).tolist() == [2.5 / 4, 3 / 4]
    assert wins(before[:, :1], after).tolist() == [1, 0.75]
    assert (wins(after, before) + wins(before, after)).tolist() == [1, 1]


def test_compare_by_hand():
    before = answers(
        {"reward": [[0.0]] * 4, "gold": [[1.0], [2.0], [3.0], [4.0]]},
        tokens=[1, 2, 3, 4], eos_rate=[1, 1, 1, 0], repetition=[0.5] * 4,
    )  # fmt: skip
    after = answers(
        {"reward": [[1.0], [0.0], [-1.0], [2.0]], "gold": [[2.0], [2.0], [2.0], [4.0]]},
        tokens=[2, 2, 2, 2], eos_rate=[1, 0.5, 1, 0.5], repetition=[0] * 4, kl=[1, 2, 3, 6],
    )  # fmt: skip
    got = compare(before, after, KEYS)
    # a win, a tie, a loss, a win
    assert got["win_rate"] == 2.5 / 4
    expected = share_of([1, 0.5, 0, 1])
    assert (got["win_rate_low"], got["win_rate_high"]) == (expected.low, expected.high)
    assert (got["reward_before"], got["reward_after"]) == (0, 0.5)
    difference = mean_of([1, 0, -1, 2])
    assert got["reward_difference"] == 0.5
    assert got["reward_difference_error"] == difference.error
    assert (got["kl"], got["kl_low"]) == (3, mean_of([1, 2, 3, 6]).low)
    assert (got["eos_rate"], got["eos_rate_before"]) == (0.75, 0.75)
    assert (got["tokens_before"], got["tokens_after"]) == (2.5, 2)
    assert (got["repetition_before"], got["repetition_after"]) == (0.5, 0)
    # of gold: a win, a tie, a loss, a tie
    assert got["gold_win_rate"] == 0.5
    assert got["gold_not_worse"] == 0.75
    assert got["gold_strict_win_rate"] == 0.25
    assert (got["gold_before"], got["gold_after"]) == (2.5, 2.5)
    assert not {"judge_win_rate", "gap", "entropy_after"} & set(got)
    part = compare(before, after, KEYS, [0, 3])
    assert (part["n"], part["win_rate"], part["kl"], part["eos_rate"]) == (2, 1, 3.5, 0.75)


def test_equal_prompts_are_one():
    before, after = answers({"reward": [[0.0]] * 4}), answers({"reward": [[1.0], [1], [-1], [-1]]})
    apart, together = compare(before, after, KEYS), compare(before, after, ["p", "p", "q", "q"])
    assert apart["win_rate"] == together["win_rate"] == 0.5
    assert together["win_rate_size"] < apart["win_rate_size"]


def test_the_gap_is_paired_by_prompt():
    start = {"reward": [[0.0]] * 4, "judge": [[0.0]] * 4}
    end = {"reward": [[1.0], [1], [-1], [1]], "judge": [[-1.0], [0], [-1], [1]]}
    got = compare(answers(start), answers(end), KEYS)
    # Points of the judge 0 ½ 0 1, of the reward model 1 1 0 1: differences −1 −½ 0 0.
    assert got["gap"] == pytest.approx(-0.375)
    assert got["gap_error"] == pytest.approx(mean_of([-1, -0.5, 0, 0]).error)
    assert got["judge_difference"] == pytest.approx(-0.25)


def test_shifts_by_hand():
    before = answers(tokens=[1, 2, 3, 4], entropy=[1, 1, 1, 1], refusal=[0, 0, 0, 0])
    after = answers(tokens=[3, 4, 5, 5], entropy=[1, 1.2, 0.9, 0.9], refusal=[0, 0, 0, 0])
    tokens, entropy, refusal = shifts(before, after, KEYS)
    # Differences 2 2 2 1: mean 1.75, standard error 0.5/√4 = 0.25, t = 7 with 3 degrees of
    # freedom: p = 0.00599 by tables. The smallest of three: times 3 by Holm.
    assert tokens["metric"] == "tokens"
    assert (tokens["before"], tokens["after"], tokens["difference"]) == (2.5, 4.25, 1.75)
    assert tokens["p"] == pytest.approx(0.00599, abs=1e-5)
    assert tokens["p_adjusted"] == pytest.approx(3 * tokens["p"])
    assert tokens["significant"]
    # t = 3.1824 for 95 %.
    assert tokens["low"] == pytest.approx(1.75 - 3.1824 * 0.25, abs=1e-4)
    assert not entropy["significant"]
    assert (refusal["p"], refusal["p_adjusted"], refusal["significant"]) == (1, 1, False)


def test_a_shift_that_is_significant_alone_may_not_be_among_many():
    before = answers(tokens=[0, 0, 0, 0], repetition=[0] * 4, refusal=[0] * 4)
    # 1 2 3 2: mean 2, deviation √(2/3), error 0.408, t = 4.90: p = 0.0163, adjusted 0.049.
    close = answers(tokens=[1, 2, 3, 2], repetition=[0] * 4, refusal=[0] * 4)
    assert shifts(before, close, KEYS)[0]["significant"]
    # 0 2 3 2: mean 1.75, error 0.629, t = 2.78: p = 0.069.
    # 1 2 4 2: mean 2.25, error 0.629, t = 3.58: p = 0.0374, adjusted 0.11.
    far = answers(tokens=[1, 2, 4, 2], repetition=[0] * 4, refusal=[0] * 4)
    row = shifts(before, far, KEYS)[0]
    assert row["p"] < 0.05 < row["p_adjusted"]
    assert not row["significant"]


def test_own_metrics():
    got = own_metrics(answers({"reward": [[1.0, 3.0]]}, tokens=[4], kl_exact=[1]))
    assert got == {"reward": 2, "tokens": 4}


# --- over-optimisation ------------------------------------------------------------------------


def found(judge, reward, gap) -> str:
    """The state for intervals of the judge's and the reward model's win rate and of the gap."""
    metrics = {"gap_high": gap}
    for name, (low, high) in (("judge_win_rate", judge), ("win_rate", reward)):
        metrics |= {name: (low + high) / 2, f"{name}_low": low, f"{name}_high": high}
    return over_optimisation(metrics)["state"]


def test_over_optimisation():
    better, worse, open_ = (0.6, 0.7), (0.3, 0.4), (0.45, 0.55)
    assert found(better, better, 0.01) == "no"
    assert found(better, (0.9, 0.95), -0.2) == "no"  # a smaller gain is no loss
    assert found(worse, better, -0.2) == "suspected"
    assert found(open_, better, -0.1) == "suspected"
    assert found(open_, better, 0.01) == "no"  # not significantly below
    assert found(worse, open_, -0.05) == "suspected"  # worse than its start, and less than said
    assert found(worse, worse, 0.02) == "no"  # both say that it is worse
    assert found(open_, open_, -0.01) == "no"
    # A lower bound of exactly a half is no evidence.
    assert found((0.5, 0.6), better, -0.1) == "suspected"


def test_evidence_of_over_optimisation():
    said = over_optimisation(
        {"judge_win_rate": 0.35, "judge_win_rate_low": 0.3, "judge_win_rate_high": 0.4,
         "win_rate": 0.8, "win_rate_low": 0.75, "win_rate_high": 0.85, "gap_high": -0.3}
    )  # fmt: skip
    assert said["evidence"] == (
        "the judge prefers the policy to its start in 35.0\u00a0% (30.0–40.0\u00a0%), the reward "
        "model in 80.0\u00a0% (75.0–85.0\u00a0%), significantly more"
    )
    assert over_optimisation({}, "why")["state"] == "unknown"
    assert "why" in over_optimisation({}, "why")["evidence"]
    # One prompt has no interval of the gap.
    one = {f"{n}{p}": v for n in ("judge_win_rate", "win_rate")
           for p, v in (("", 0.5), ("_low", 0.0), ("_high", 1.0))}  # fmt: skip
    assert over_optimisation(one)["state"] == "no"


# --- texts ------------------------------------------------------------------------------------


def test_repetition():
    assert repetition("a b c d") == 0
    assert repetition("too short") == 0
    # abc bca cab abc: the last of four was there before
    assert repetition("a b c a B c") == 0.25
    assert repetition("no no no no no") == pytest.approx(2 / 3)


def test_distinct():
    # a b a B are four words, two of them different; then c: 3 of 5.
    assert distinct(["a b a B"], 1) == 0.5
    assert distinct(["a b a B", "c"], 1) == 0.6
    # ab ba ab, and none across texts: 2 of 3
    assert distinct(["a b a B", "c"], 2) == pytest.approx(2 / 3)
    assert distinct(["", "c"], 2) == 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("I can't help with that.", True),
        ("I can’t help with that.", True),
        ("  \"I'm sorry, but that is not possible.", True),
        ("As an AI language model, I", True),
        ("You can't miss it: I cannot say", False),
        ("I'm sorry to hear that! Here is", False),
        ("", False),
    ],
)
def test_refusals(text, expected):
    assert is_refusal(text) is expected


def test_refusals_are_written_as_they_are_compared():
    assert all(text == text.lower() and "’" not in text for text in REFUSALS)
    assert all(is_refusal(text) for text in REFUSALS)
