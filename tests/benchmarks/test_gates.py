"""Simulated retrainings, wrongly taught reward models and outcomes of `benchmarks.gates`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from benchmarks.gates import reward_models
from benchmarks.gates.over_optimisation import healthy_summary, outcome, summary
from benchmarks.gates.plots import gains, plot_runs
from benchmarks.gates.retrainings import (
    Challenger,
    mixture,
    rates,
    reward_gate,
    true_win_rate,
    win_rate,
)
from rlhf.config import load_config
from rlhf.data.rows import Pair

CONFIG = load_config(Path("configs/quickstart.yaml"), ()).config


def pool() -> dict[str, np.ndarray]:
    """Scores of policies whose true means are 0, 1, 1 and 2; the judge sees them with noise."""
    rng = np.random.default_rng(0)
    scores: dict[str, np.ndarray] = {"group": np.array([f"g{i % 2}" for i in range(400)])}
    for name, mean in (("sft", 0.0), ("weaker", 1.0), ("champion", 1.0), ("better", 2.0)):
        gold = mean + rng.normal(size=(400, 12))
        scores[f"{name}/gold"] = gold
        for scorer in ("proxy", "judge"):
            scores[f"{name}/{scorer}"] = gold + rng.normal(size=gold.shape) / 2
    # Its training reward says that it is the best, and it is no better than SFT.
    scores["gaming/gold"] = scores["sft/gold"]
    scores["gaming/judge"] = scores["sft/judge"] + 0.1
    scores["gaming/proxy"] = scores["better/proxy"] + 1
    return scores


def test_a_win_rate_counts_all_pairs_of_replies_and_ties_a_half():
    before, after = np.array([[0.0, 1.0]]), np.array([[1.0, 2.0]])
    # 1 > 0, 1 = 1, 2 > 0, 2 > 1.
    assert win_rate(before, after).tolist() == [3.5 / 4]


def test_a_mixture_has_the_true_win_rate_that_is_asked_for():
    scores = pool()
    mixed = mixture(scores, 0.6, "better", "champion")
    assert 0 < mixed.share < 1
    assert true_win_rate(scores, mixed) == pytest.approx(0.6)
    with pytest.raises(ValueError, match=r"less than 0\.9"):
        mixture(scores, 0.9, "better", "champion")


def test_the_gate_promotes_what_is_better_and_hardly_anything_else():
    scores = pool()
    promoted = {
        name: rates(scores, Challenger(name, name, name), CONFIG, 30)
        for name in ("champion", "weaker", "better", "gaming")
    }
    assert promoted["better"]["promoted"] == 1
    assert promoted["champion"]["promoted"] == promoted["gaming"]["promoted"] == 0
    assert promoted["weaker"]["promoted"] <= 1 / 30
    rejected = promoted["gaming"]["rejected_by"]
    assert rejected["champion.judge_win_rate"] == 1
    assert "sampled.win_rate" not in rejected  # the proxy is what it games
    assert promoted["better"]["true_win_rate"] > 0.7


def test_the_reward_gate_rejects_a_coin_and_not_a_good_model():
    # One-sided at 97.5 %: a coin passes in 2.5 % at most, by one rule alone.
    assert reward_gate({}, 0.5, 300, 200) > 0.95
    assert reward_gate({}, 0.7, 300, 200) == 0


def test_wrongly_taught_pairs():
    pairs = [Pair(f"p{i}", "long reply" if i % 2 else "s", "mid r", f"g{i}") for i in range(40)]
    made = {name: change(pairs) for name, change in reward_models.KINDS.items()}
    assert made["healthy"] == pairs
    assert made["flipped"] == [replace(p, chosen=p.rejected, rejected=p.chosen) for p in pairs]
    assert all(len(p.chosen) > len(p.rejected) for p in made["length"])
    assert 10 < sum(a != b for a, b in zip(made["random"], pairs, strict=True)) < 30
    assert sorted(p.prompt for p in made["prompt-blind"]) == sorted(p.prompt for p in pairs)
    assert [p.chosen for p in made["prompt-blind"]] == [p.chosen for p in pairs]


def point(update: int, gold: float, **values: float) -> dict:
    deviations = {"gold": 2.0, "proxy": 0.0, "judge": 1.0}
    return {"update": update, "kl": update, "gold": gold, "proxy": gold, "judge": gold,
            "deviations": deviations, **values}  # fmt: skip


def test_an_outcome_is_measured_by_the_optimum_of_the_whole_run():
    points = [point(0, 1.0), point(4, 3.0), point(8, 2.8), point(12, -1.0)]
    result = outcome(points, 8, {"update": 12})
    # 2.8 is 0.2 below 3, less than a tenth of it; of the gain of 2 it is 1.8.
    assert result["within"]
    assert result["share_of_optimum"] == pytest.approx(2.8 / 3)
    assert result["share_of_gain"] == pytest.approx(0.9)
    assert (result["best_update"], result["delay"]) == (4, 8)
    lost = outcome(points, 12, None)
    assert not lost["within"]
    assert lost["delay"] is None


def test_a_run_that_only_fell_is_within_at_its_start_alone():
    points = [point(0, 1.0), point(4, 0.0)]
    assert outcome(points, 0, None)["within"]
    assert not outcome(points, 4, None)["within"]
    assert outcome(points, 4, None)["share_of_gain"] is None


def test_the_summary_and_the_plot(tmp_path):
    points = [point(0, 1.0), point(4, 3.0), point(8, -1.0)]
    stopped = {"detector": "over_optimisation", "update": 8, "evidence": "e"}
    run = {"points": points, "chosen": 4, "stopped": stopped, "reason": "r",
           **outcome(points, 4, stopped)}  # fmt: skip
    healthy = {**run, "stopped": None}
    result = summary([run])
    assert result["within"] == "1 of 1"
    assert result["runs"][0]["detector"] == "over_optimisation"
    assert healthy_summary([healthy, run])["false_alarms"] == "1 of 2"
    # In deviations of the start: (3 − 1) / 2; a deviation of 0 has no unit.
    assert gains(points, "gold") == [0, 1, -1]
    assert gains(points, "proxy") == [0, 2, -2]
    plot_runs([run, healthy], tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 10_000
