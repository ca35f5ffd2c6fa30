"""Comparisons outside of a run: verdicts and metrics that are computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from rlhf.config.lengths import TokenLimits
from rlhf.data.fitting import Fitting
from rlhf.data.rendering import Renderer
from rlhf.data.rows import Pair, PromptRow
from rlhf.errors import DataError
from rlhf.evaluation.answers import Answers
from rlhf.evaluation.compare import (
    _finite,
    _samples,
    compare_reward_models,
    prompts_for_mean,
    verdict_on_policies,
    verdict_on_reward_models,
)
from rlhf.evaluation.replies import fitting_rows
from rlhf.inference import Estimate, mean_of, prompts_needed, share_of
from rlhf.modeling.base import train_tokenizer
from rlhf.modeling.reward import Scorer


@pytest.fixture(scope="module")
def renderer() -> Renderer:
    return Renderer(train_tokenizer(["a"], 300))


def table_scorer(renderer: Renderer, scores: dict[str, float], max_length: int = 999) -> Scorer:
    """A scorer that looks a reply up."""

    class Table(Scorer):
        def __init__(self) -> None:
            self.renderer, self.limits = renderer, TokenLimits.of(max_length)

        def __call__(self, prompts, replies):
            # Probes have other replies.
            return torch.tensor([scores.get(reply, 0.0) for reply in replies])

    return Table()


# --- verdicts ---------------------------------------------------------------------------------


def test_verdicts_on_policies():
    better = verdict_on_policies(Estimate(0.61, 0.57, 0.65, 300, 300, 0.02), "judge_win_rate")
    assert better["verdict"] == "better"
    assert better["sentence"] == "b is better: win rate 0.61 (0.57–0.65) on 300 prompts"
    worse = verdict_on_policies(Estimate(0.39, 0.35, 0.43, 300, 300, 0.02), "win_rate")
    assert worse["verdict"] == "worse"
    assert worse["sentence"].startswith("b is worse: win rate 0.39")
    # The interval holds ½. The spread over prompts is 0.05 · √100 = 0.5.
    open_ = verdict_on_policies(Estimate(0.55, 0.45, 0.64, 100, 100, 0.05), "win_rate")
    assert open_["verdict"] == "undecided"
    assert open_["prompts_needed"] == prompts_needed(0.55, 0.5, 0.5, 0.975, 0.8)
    # (1.963 · 0.5 + 0.8416 · √(0.55 · 0.45))² / 0.05² = 784.2, with t of 784 degrees of freedom.
    assert open_["prompts_needed"] == 785
    assert "785 prompts would find 55% in 80% of cases" in open_["sentence"]


def test_an_interval_that_touches_a_half_decides_nothing():
    assert verdict_on_policies(Estimate(0.6, 0.5, 0.7, 99, 99, 0.05), "x")["verdict"] == "undecided"
    assert verdict_on_policies(Estimate(0.4, 0.3, 0.5, 99, 99, 0.05), "x")["verdict"] == "undecided"
    assert verdict_on_reward_models(Estimate(0.1, 0, 0.2, 9, 9, 0.1))["verdict"] == "undecided"


def test_ties_alone_need_no_number():
    got = verdict_on_policies(share_of([0.5] * 4), "win_rate")
    assert got["verdict"] == "undecided"
    assert got["prompts_needed"] is None


def test_verdicts_on_reward_models():
    assert verdict_on_reward_models(Estimate(0.04, 0.01, 0.07, 90, 90, 0.01))["sentence"] == (
        "b is better: accuracy +0.040 (+0.010 to +0.070) on 90 prompts"
    )
    assert verdict_on_reward_models(Estimate(-0.04, -0.07, -0.01, 9, 9, 0.1))["verdict"] == "worse"
    # The spread is 0.05 · √100 = 0.5, as below.
    got = verdict_on_reward_models(Estimate(0.01, -0.09, 0.11, 100, 100, 0.05))
    assert got["prompts_needed"] == 785
    assert "785 prompts would find 0.05 in 80% of cases" in got["sentence"]


def test_prompts_for_a_mean():
    # z = 1.95996 + 0.84162 = 2.80158; (2.80158 · 0.5/0.05)² = 784.9
    assert prompts_for_mean(0.05, 0.5) == 785
    # (2.80158 · 1/1)² = 7.85
    assert prompts_for_mean(1, 1) == 8
    assert prompts_for_mean(1, 0.01) == 2


# --- policies ---------------------------------------------------------------------------------


def test_samples_begin_with_the_greatest_loss():
    rows = [PromptRow("p"), PromptRow("q", "g")]
    before = Answers([["x", "x"], ["x", "x"]], {}, {"reward": np.zeros((2, 2))})
    after = Answers([["a", "b"], ["c", "d"]], {}, {"reward": np.array([[1.0, 2.0], [0.0, -1.0]])})
    got = _samples(rows, before, after, "reward")
    assert [row["after"] for row in got] == ["d", "c", "a", "b"]
    # By the first replies nothing was lost, and without a KL nothing says what changed.
    assert [row["kinds"] for row in got] == [[]] * 4
    other_way = {"reward": -after.scores["reward"]}
    worse = Answers(after.texts, {"kl_exact": np.array([0.5, 2.0])}, other_way)
    kinds = {row["after"]: row["kinds"] for row in _samples(rows, before, worse, "reward")}
    # Both prompts changed; of the first replies a lost, by −1 against 0, and c did not.
    assert kinds == {"a": ["changed", "lost"], "b": [], "c": ["changed"], "d": []}
    assert got[0] == {
        "prompt": "q", "group": "g", "before": "x", "after": "d", "reward_before": 0,
        "reward_after": -1, "judge_before": None, "judge_after": None, "kinds": [],
    }  # fmt: skip


def test_json_gets_no_infinity():
    found = _finite({"a": math.inf, "b": {"c": math.nan, "d": 1.5}, "e": "text", "f": 0})
    assert found == {"a": None, "b": {"c": None, "d": 1.5}, "e": "text", "f": 0}


# --- reward models ----------------------------------------------------------------------------


def test_reward_models_by_hand(renderer):
    pairs = [
        Pair("p", "a", "b", "g"),  # both right
        Pair("p", "b", "c", "g"),  # a right, b wrong
        Pair("q", "c", "a"),  # a wrong, b tie
        Pair("q", "d", "b"),  # both wrong
    ]  # fmt: skip
    a = table_scorer(renderer, {"a": 3.0, "b": 2.0, "c": 1.0, "d": 0.0})
    b = table_scorer(renderer, {"a": 2.0, "b": 1.0, "c": 2.0, "d": 0.0})
    got, rows = compare_reward_models(a, b, pairs)
    keys = ["p", "p", "q", "q"]
    assert got["accuracy_before"] == 0.5
    assert got["accuracy_after"] == 0.375
    # 0, −1, ½, 0
    expected = mean_of([0, -1, 0.5, 0], keys)
    assert got["accuracy_difference"] == expected.value == -0.125
    assert got["accuracy_difference_low"] == expected.low
    assert got["agreement"] == 0.5
    assert got["both_right"] == got["only_before_right"] == 1
    assert got["only_after_right"] == 0
    assert got["neither_right"] == 2
    assert got["by_group"]["g"]["accuracy_after"] == 0.5
    # The report on each is that of evaluate-reward-model, on the same pairs.
    one, other = got["reports"]["before"], got["reports"]["after"]
    assert (one["accuracy"], other["accuracy"], one["n"]) == (0.5, 0.375, 4)
    assert {"probes", "margins", "by_slice", "ece"} <= one.keys()
    assert got["by_slice"]["group:g"]["accuracy_before"] == 1.0
    assert got["by_slice"]["group:g"]["accuracy_after"] == 0.5
    assert got["pairs_left_out"] == {}
    # Margins of a: 1 1 −2 −2, root mean square √2.5; of b: 1 −1 0 −1, √0.75.
    first, second = rows[0], rows[1]
    assert first["chosen"] == "b"
    assert first["disagreement"] == pytest.approx(-1 / math.sqrt(0.75) - 1 / math.sqrt(2.5))
    assert second["disagreement"] == pytest.approx(2 / math.sqrt(2.5))


def test_pairs_that_a_model_cannot_tell_apart_are_counted(renderer):
    scorer = table_scorer(renderer, {"aaaaaaaaaaaa": 1.0, "aaaaaaaaaaab": 0.0, "a": 1.0, "b": 0.0})
    cut = table_scorer(renderer, {"a": 1.0, "b": 0.0}, max_length=8)
    pairs = [Pair("p", "a", "b"), Pair("q", "aaaaaaaaaaaa", "aaaaaaaaaaab")]
    got, _ = compare_reward_models(scorer, cut, pairs)
    assert got["n"] == 1
    assert got["pairs_left_out"] == {"replies are equal where a model cuts them": 1}
    with pytest.raises(DataError, match="no pair has replies that both models can tell apart"):
        compare_reward_models(scorer, cut, pairs[1:])


def test_prompts_that_do_not_fit(renderer):
    fitting = Fitting(renderer, 40)
    rows = [PromptRow(f"p{i}") for i in range(19)]
    kept, left_out = fitting_rows([*rows, PromptRow("long " * 30)], [fitting])
    assert kept == rows
    assert left_out == {"prompt has too many tokens": 1}
    with pytest.raises(DataError, match="1 of 2 prompts can't be given to the models"):
        fitting_rows([rows[0], PromptRow("long " * 30)], [fitting])
    with pytest.raises(DataError, match="there are none"):
        fitting_rows([], [fitting])
