"""Evaluation of reward models: metrics of constructed cases, and the ceiling."""

from __future__ import annotations

import pytest
import torch

import rlhf.evaluation.reward_model as module
from rlhf.config import DataConfig, EvaluationConfig, WorldConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PAIRS_EVAL, Pair, write_rows
from rlhf.errors import DataError
from rlhf.evaluation import evaluate_reward_model
from rlhf.evaluation.common import groups_of
from rlhf.evaluation.reward_model import ceiling_of
from rlhf.files import read_json
from rlhf.inference import share_of
from rlhf.modeling.base import train_tokenizer
from rlhf.modeling.reward import Scorer
from rlhf.statistics import share
from rlhf.world import ceiling, gold
from rlhf.world import generate as generate_world
from tests.library import toys

PLAIN, WORLD = EvaluationConfig(), EvaluationConfig(judge="world")


def test_wilson_interval():
    # n = 10, p = 0.8, z = 1.96: centre (0.8 + z²/20) / (1 + z²/10) = 0.7167, half-width 0.2266
    got = share("x", 8, 10)
    assert got["x"] == 0.8
    assert got["x_low"] == pytest.approx(0.4902, abs=1e-4)
    assert got["x_high"] == pytest.approx(0.9433, abs=1e-4)
    assert share("x", 0, 5)["x_low"] == 0
    assert share("x", 2.4, 10) == {**share("x", 2, 10), "x": 0.24}


def testgroups_of():
    assert groups_of(["a", None, "b", "a"]) == {"a": [0, 3], "b": [2]}


# --- reward model -----------------------------------------------------------------------------

SCORES = {"aa": 3.0, "b": 2.0, "ccc": 2.0, "dd": 5.0}


class TableScorer(Scorer):
    """Scores by a table; what is not in it, as probes are, gets 0."""

    def __init__(self, *_: object) -> None:
        self.renderer = Renderer(train_tokenizer(["a"], 300))
        self.limits = TokenLimits.of(9999)

    def __call__(self, prompts, replies):
        return torch.tensor([SCORES.get(r, 0.0) for r in replies])


def evaluate_pairs(pairs, tmp_path, config=PLAIN, **options):
    write_rows(tmp_path / PAIRS_EVAL, pairs)
    result = evaluate_reward_model(
        config, DataConfig(), tmp_path, tmp_path, tmp_path, limits=9,
        runtime=toys.RUNTIME, **options,
    )  # fmt: skip
    return result.metrics, read_json(tmp_path / "evaluation.json")


def test_reward_model_by_hand(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_scorer", TableScorer)
    pairs = [
        Pair("p", "aa", "b", "x"),  # 3 > 2: right; the longer is chosen
        Pair("q", "b", "ccc", "x"),  # 2 = 2: a half; the shorter is chosen
        Pair("q", "b", "aa"),  # 2 < 3: wrong; the shorter is chosen
        Pair("r", "dd", "aa", "y"),  # 5 > 3: right; of one length: a half
    ]
    seen = []
    metrics, written = evaluate_pairs(pairs, tmp_path, progress=lambda *a: seen.append(a[:2]))
    expected = share_of([1, 0.5, 0, 1], ["p", "q", "q", "r"])
    assert metrics["accuracy"] == 2.5 / 4
    assert (metrics["accuracy_low"], metrics["accuracy_high"]) == (expected.low, expected.high)
    assert metrics["baseline_longer"] == 1.5 / 4
    assert (metrics["n"], metrics["prompts"]) == (4, 3)
    assert metrics["margin_mean"] == pytest.approx((1 + 0 - 1 + 2) / 4)
    # 3 2 2 5 and 2 2 3 3: 22 / 8; squares sum to 68, (68 − 8·2.75²) / 7 = 1.0714
    assert metrics["score_mean"] == pytest.approx(2.75)
    assert metrics["score_std"] == pytest.approx(1.0714**0.5, abs=1e-4)
    assert "by_group" not in metrics
    assert "ceiling" not in metrics
    groups = written["by_group"]
    assert {k: v for k, v in metrics.items() if "." not in k} == {
        k: v for k, v in written.items() if not isinstance(v, dict | list)
    }
    assert groups == {
        "x": {**share_of([1, 0.5]).metrics("accuracy"), "n": 2, "prompts": 2},
        "y": {**share_of([1]).metrics("accuracy"), "n": 1, "prompts": 1},
    }
    assert seen[-1][0] == seen[-1][1] > 8


def test_a_model_that_gives_everything_the_same_is_a_coin(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "open_scorer", TableScorer)
    metrics, _ = evaluate_pairs([Pair("p", "b", "ccc")] * 6, tmp_path)
    assert metrics["accuracy"] == 0.5


def test_ceiling_of_the_world(tmp_path, monkeypatch):
    world = generate_world(WorldConfig(eval_pairs=20, pairs=10, demonstrations=10, prompts=10), 0)
    pairs = [
        Pair(p.prompt, p.chosen, p.rejected, f"g{i % 2}") for i, p in enumerate(world.eval_pairs)
    ]
    monkeypatch.setitem(SCORES, "", 0.0)
    for p in pairs:
        monkeypatch.setitem(SCORES, p.chosen, gold(p.prompt, p.chosen))
        monkeypatch.setitem(SCORES, p.rejected, gold(p.prompt, p.rejected))
    monkeypatch.setattr(module, "open_scorer", TableScorer)
    metrics, written = evaluate_pairs(pairs, tmp_path, WORLD)
    top = ceiling(world.eval_pairs, DataConfig().world.temperature)
    assert 0.5 < top < 1
    assert metrics["ceiling"] == pytest.approx(top)
    assert metrics["share_of_ceiling"] == pytest.approx((metrics["accuracy"] - 0.5) / (top - 0.5))
    part = written["by_group"]["g1"]
    own = ceiling(world.eval_pairs[1::2], DataConfig().world.temperature)
    assert part["ceiling"] == pytest.approx(own) != pytest.approx(top)
    assert part["share_of_ceiling"] == pytest.approx((part["accuracy"] - 0.5) / (own - 0.5))


def test_no_held_out_pairs(tmp_path):
    with pytest.raises(DataError, match=r"no held-out pairs.*data\.eval_fraction"):
        evaluate_pairs([], tmp_path)


def test_ceiling_where_nothing_is_known():
    assert ceiling_of(PLAIN, DataConfig(), []) is None
    # equal replies are told apart by nobody
    assert ceiling_of(WORLD, DataConfig(), [Pair("p", "a", "a")]) == pytest.approx(0.5)
