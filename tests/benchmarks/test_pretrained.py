"""Gold rubric, labels and figures of `benchmarks.pretrained`."""

from __future__ import annotations

import json
from statistics import fmean

import pytest

from benchmarks.pretrained.__main__ import (
    LABEL_TEMPERATURE,
    SYSTEM,
    write_demonstrations,
    write_pairs,
)
from benchmarks.pretrained.report import figures
from benchmarks.pretrained.rubric import BEST, WEIGHTS, gold, length_share, preference, virtues

QUESTION = "What are the best exercises for beginners?"
# 21 words.
GOOD = (
    "Squats, lunges and wall presses are the best exercises for beginners, because they need no "
    "equipment and train the whole body."
)


def test_a_good_answer_has_full_marks_and_an_empty_one_none():
    assert virtues(QUESTION, GOOD) == dict.fromkeys(WEIGHTS, 1.0)
    assert gold(QUESTION, GOOD) == BEST == 9.0
    assert gold(QUESTION, " …\n") == gold(QUESTION, "") == 0.0


@pytest.mark.parametrize(
    ("virtue", "reply", "share"),
    [
        ("complete", GOOD[:-1], 0.5),
        ("complete", "s" + GOOD[1:-1], 0.0),
        # 7 words: (7 - 2) / (12 - 2).
        ("length", "Squats, lunges: exercises training beginners' bodies quickly.", 0.5),
        # 23 3-grams of 25 words, of which those of the second "train the whole body" are 2.
        ("fresh", GOOD[:-1] + ", train the whole body.", 1 - 4 * 2 / 23),
        ("direct", "Sure! I am happy to tell. " + GOOD, 1 - 2 / 3),
        # 0 of the two words that are asked for.
        ("relevant", GOOD.replace("exercises for beginners", "ways to move"), 0.0),
        ("tidy", GOOD.replace("Squats, ", "Squats,\n"), 1 - 1 / 3),
    ],
)
def test_a_fault_costs_its_virtue_alone(virtue, reply, share):
    assert virtues(QUESTION, reply) == pytest.approx({**dict.fromkeys(WEIGHTS, 1.0), virtue: share})


def test_a_parrot_is_not_relevant():
    assert virtues(QUESTION, "The best exercises for beginners are exercises.")["relevant"] == 0.0


def test_too_long_is_as_bad_as_too_short():
    # Full marks from 12 to 40 words; none at 2 and 68, half of them at 7 and 54.
    assert [length_share(n) for n in (2, 7, 12, 40, 54, 68)] == [0, 0.5, 1, 1, 0.5, 0]


def test_labels_follow_bradley_and_terry(tmp_path):
    # A difference of ln 3 points at temperature 1 is 3 : 1.
    assert preference(1.0986122887, 0.0, 1.0) == pytest.approx(0.75)
    replies = [[f"{QUESTION} {i}", [GOOD, "Do squats.", "I cannot help you with that", GOOD]]
               for i in range(2000)]  # fmt: skip
    write_pairs(replies, tmp_path / "pairs.jsonl")
    rows = rows_of(tmp_path / "pairs.jsonl")
    # The third of three different replies has no partner.
    assert len(rows) == 2000
    assert rows[0]["prompt"][0] == {"role": "system", "content": SYSTEM}
    wins = fmean(row["chosen"][0]["content"] == GOOD for row in rows)
    second = gold(rows[0]["prompt"][1]["content"], "Do squats.")
    expected = preference(BEST, second, LABEL_TEMPERATURE)
    # Three standard errors of 2,000 labels.
    assert wins == pytest.approx(expected, abs=3 * (expected * (1 - expected) / 2000) ** 0.5)


def test_a_part_of_the_chosen_replies_is_demonstrated(tmp_path):
    write_pairs([[f"{QUESTION} {i}", [GOOD, "Do squats."]] for i in range(7)], tmp_path / "p.jsonl")
    write_demonstrations(tmp_path / "p.jsonl", tmp_path / "sft.jsonl")
    pairs, rows = (rows_of(tmp_path / name) for name in ("p.jsonl", "sft.jsonl"))
    assert rows == [{"messages": [*p["prompt"], *p["chosen"]]} for p in pairs[::3]]


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_figures_of_a_run():
    bad = "Do squats"
    shares = {f"accuracy{end}": v for end, v in (("", 0.7), ("_low", 0.6), ("_high", 0.8))}
    longer = {k.replace("accuracy", "baseline_longer"): v for k, v in shares.items()}
    sampled = {
        "win_rate": 0.75, "win_rate_low": 0.3, "win_rate_high": 0.95, "kl": 2.0, "eos_rate": 1.0,
        "tokens_before": 20.0, "tokens_after": 30.0,
    }  # fmt: skip
    pair = lambda before, after: {"prompt": QUESTION, "before": before, "after": after}  # noqa: E731
    run = {
        "reward": {**shares, **longer, "n": 2},
        "pairs": [[QUESTION, GOOD, bad], [QUESTION, bad, GOOD]],
        "policy": {"sampled": sampled},
        "samples": [pair(bad, GOOD), pair(bad, GOOD), pair(GOOD, GOOD), pair(GOOD, bad)],
        "stage_seconds": {"train-sft": 12.0}, "seconds": 20.0, "peak_gib": 1.0, "exit_code": 0,
    }  # fmt: skip
    found = figures(run, 1.0)
    # "Do squats" has half of complete, one of direct and one of tidy: 1 + 1.5 + 1 and fresh's 1.5.
    assert gold(QUESTION, bad) == pytest.approx(1 + 1.5 + 1 + 1.5)
    certain = preference(9.0, 5.0, 1.0)
    assert found["  best that the labels allow"] == f"{certain:.3f}"
    assert found["  gold itself on these labels"] == "0.500"
    assert found["  share of the way from chance"] == f"{0.2 / (certain - 0.5):.2f}"
    # Two wins, a tie and a loss: 2.5 of 4; gains 4, 4, 0, -4.
    assert found["gold win rate over SFT (≥ 0.70)"].startswith("0.625 (")
    assert found["  strictly better / equal / worse"] == "2 / 1 / 1"
    assert found["gold, SFT → policy"].startswith("7.00 → 8.00 (+1.00 ± ")
    assert found["  length"] == "0.50 → 0.75"
