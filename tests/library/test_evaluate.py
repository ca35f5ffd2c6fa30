"""Evaluation: metrics of constructed cases, intervals, samples and judges."""

from __future__ import annotations

import shutil

import pytest
import torch

import rlhf.evaluation.reward_model as module
from rlhf.config import DataConfig, EvaluationConfig, WorldConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PAIRS_EVAL, PROMPTS_EVAL, Pair, PromptRow, write_rows
from rlhf.errors import DataError
from rlhf.evaluation import evaluate_policy, evaluate_reward_model
from rlhf.evaluation.common import groups_of
from rlhf.evaluation.policy import Answers, _compare, _kl, judge_of, repetition
from rlhf.evaluation.reward_model import ceiling_of
from rlhf.files import read_json
from rlhf.inference import share_of
from rlhf.modeling.base import load_policy, train_tokenizer
from rlhf.modeling.generate import generate
from rlhf.modeling.reward import Scorer
from rlhf.modeling.sampling import Sampling
from rlhf.ppo.train import train_policy
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


def test_repetition():
    assert repetition("a b c d") == 0
    assert repetition("too short") == 0
    # abc bca cab abc: the last of four was there before
    assert repetition("a b c a B c") == 0.25
    assert repetition("no no no no no") == pytest.approx(2 / 3)


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
    monkeypatch.setattr(module, "Scorer", TableScorer)
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
    monkeypatch.setattr(module, "Scorer", TableScorer)
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
    monkeypatch.setattr(module, "Scorer", TableScorer)
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


# --- policy -----------------------------------------------------------------------------------


def answers(scores, gold=None, kl=None, texts=None):
    n = len(scores)
    return Answers(
        texts or ["a"] * n,
        torch.tensor(scores),
        torch.arange(1.0, n + 1),
        torch.tensor([1.0] * (n - 1) + [0.0]),
        torch.tensor(kl) if kl else None,
        gold,
    )


def test_compare_by_hand():
    before = answers([0.0, 0.0, 0.0, 0.0], gold=[1.0, 2.0, 3.0, 4.0], texts=["no no no no"] * 4)
    after = answers([1.0, 0.0, -1.0, 2.0], gold=[2.0, 2.0, 2.0, 4.0], kl=[1.0, 2.0, 3.0, 6.0])
    got = _compare(before, after, range(4))
    # a win, a tie, a loss, a win
    assert got["win_rate"] == 2.5 / 4
    assert got["win_rate_low"] == share("w", 2, 4)["w_low"]
    assert (got["reward_before"], got["reward_after"]) == (0, 0.5)
    assert got["kl"] == 3
    assert got["eos_rate"] == 0.75
    assert (got["tokens_before"], got["tokens_after"]) == (2.5, 2.5)
    assert (got["repetition_before"], got["repetition_after"]) == (0.5, 0)
    # of gold: a win, a tie, a loss, a tie
    assert got["gold_win_rate"] == 0.5
    assert got["gold_not_worse"] == 0.75
    assert got["gold_strict_win_rate"] == 0.25
    assert (got["gold_before"], got["gold_after"]) == (2.5, 2.5)
    part = _compare(before, after, [0, 3])
    assert (part["n"], part["win_rate"], part["kl"], part["eos_rate"]) == (2, 1, 3.5, 0.5)


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
def test_kl_is_summed_over_the_reply(sft, fresh, renderer, policy, temperature):
    """Of the distributions at the sampling temperature; of a greedy reply at temperature 1."""
    rows = [renderer.encode_prompt(p, 40) for p in ("tea?", "jar or cup?")]
    replies = generate(policy, rows, renderer.tokenizer, Sampling(8), 3)
    other = load_policy(fresh).eval()
    torch.nn.init.constant_(other.model.norm.weight, 2.0)
    got = _kl(policy, other, replies, temperature)
    for i, (prompt, reply) in enumerate(zip(rows, replies.rows(), strict=True)):
        ids = torch.tensor([prompt + reply])
        each = [
            (m(ids).logits[0, len(prompt) - 1 : -1] / (temperature or 1)).log_softmax(-1)[
                range(len(reply)), reply
            ]
            for m in (policy, other)
        ]
        assert got[i].item() == pytest.approx((each[0] - each[1]).sum().item(), abs=1e-4)


@pytest.fixture(scope="module")
def better(data, sft, approved, tmp_path_factory):
    """A policy that PPO has improved."""
    out = tmp_path_factory.mktemp("better")
    config = toys.changed(toys.PPO, total_episodes=320)
    train_policy(config, data, sft, approved, out, runtime=toys.RUNTIME)
    return out


@pytest.fixture
def evaluate(data, sft, reward_model, tmp_path):
    def run(policy, config=PLAIN, folder=data, ppo=toys.PPO, **options):
        result = evaluate_policy(
            config, ppo, folder, sft, policy, reward_model, tmp_path,
            runtime=toys.RUNTIME, **options,
        )  # fmt: skip
        return result.metrics, read_json(tmp_path / "evaluation.json")

    return run


def test_a_policy_against_itself(evaluate, sft):
    metrics, _ = evaluate(sft)
    for mode in ("sampled", "greedy"):
        assert metrics[f"{mode}.win_rate"] == 0.5
        assert metrics[f"{mode}.win_rate_low"] == share("w", 10, 20)["w_low"]
        assert metrics[f"{mode}.kl"] == pytest.approx(0, abs=1e-6)
        assert metrics[f"{mode}.reward_before"] == metrics[f"{mode}.reward_after"]
        assert metrics[f"{mode}.tokens_before"] == metrics[f"{mode}.tokens_after"]


def test_replies_end_where_those_of_training_ended(evaluate, sft, tmp_path):
    def replies(**options):
        evaluate(sft, PLAIN, ppo=toys.changed(toys.PPO, **options))
        return [s["before"] for s in read_json(tmp_path / "samples.json")]

    whole = replies()
    cut = replies(env_type="text_generation", env_config={"stop_sequences": ["a"]})
    assert any("a" in text for text in whole)
    assert cut == [text.partition("a")[0].strip() for text in whole]


def test_a_better_policy_wins(evaluate, better, sft, tmp_path):
    seen = []
    metrics, written = evaluate(better, progress=lambda *a: seen.append(a))
    assert metrics["sampled.win_rate_low"] > 0.5
    assert metrics["sampled.reward_after"] > metrics["sampled.reward_before"]
    assert metrics["sampled.kl"] > 0.5
    assert metrics["n"] == 20
    assert [s[:2] for s in seen] == [(i, 4) for i in range(1, 5)]
    assert seen[1][2]["reward"] == pytest.approx(metrics["sampled.reward_after"])
    # the toy's held-out prompts with "tea" are a group of 8, the rest have none
    groups = written["sampled"].pop("by_group")
    assert {name: part["n"] for name, part in groups.items()} == {"tea": 8}
    written["greedy"].pop("by_group")
    assert metrics == {
        "n": 20,
        **{f"{mode}.{k}": v for mode in ("sampled", "greedy") for k, v in written[mode].items()},
    }
    samples = read_json(tmp_path / "samples.json")
    assert len(samples) == 20
    assert set(samples[0]) == {
        "prompt", "group", "before", "after", "reward_before", "reward_after",
        "gold_before", "gold_after",
    }  # fmt: skip
    mean = sum(s["reward_after"] for s in samples) / 20
    assert mean == pytest.approx(metrics["sampled.reward_after"], abs=1e-5)
    assert all(s["gold_after"] is None for s in samples)


def test_samples_come_in_an_order_of_the_prompts(evaluate, better, sft, tmp_path):
    def order(policy):
        evaluate(policy)
        return [s["prompt"] for s in read_json(tmp_path / "samples.json")]

    first = order(sft)
    assert first == order(better)
    assert first != sorted(first)


def test_seed_temperature_and_number_of_prompts(evaluate, better):
    base, _ = evaluate(better)
    assert evaluate(better)[0] == base
    assert evaluate(better, seed=1)[0]["sampled.kl"] != base["sampled.kl"]
    assert evaluate(better, seed=1)[0]["greedy.kl"] == base["greedy.kl"]
    cold, _ = evaluate(better, toys.changed(PLAIN, temperature=0.01))
    assert cold["sampled.reward_after"] == pytest.approx(cold["greedy.reward_after"], abs=1e-4)
    few, _ = evaluate(better, toys.changed(PLAIN, prompts=5))
    assert few["n"] == few["sampled.n"] == 5


def test_batches_do_not_touch_greedy_replies(evaluate, better):
    base, _ = evaluate(better)
    small, _ = evaluate(better, toys.changed(PLAIN, batch_size=3))
    for name in ("win_rate", "reward_after", "kl", "tokens_after"):
        assert small[f"greedy.{name}"] == pytest.approx(base[f"greedy.{name}"], abs=1e-4)


def test_the_judge_reads_prompt_and_reply(evaluate, better, tmp_path, monkeypatch):
    judged = []

    def judge(prompt, reply):
        judged.append((prompt, reply))
        return float("good" in reply)

    monkeypatch.setattr(module, "judge_of", lambda config: judge)
    metrics, _ = evaluate(better)
    samples = read_json(tmp_path / "samples.json")
    assert len(judged) == 80
    assert {(s["prompt"], s["after"]) for s in samples} <= set(judged)
    assert all(s["gold_after"] == float("good" in s["after"]) for s in samples)
    mean = sum(s["gold_after"] for s in samples) / len(samples)
    assert metrics["sampled.gold_after"] == pytest.approx(mean)


def test_no_held_out_prompts(evaluate, data, sft, tmp_path):
    folder = tmp_path / "empty"
    shutil.copytree(data, folder)
    write_rows(folder / PROMPTS_EVAL, [])
    with pytest.raises(DataError, match=r"no held-out prompts.*data\.eval_fraction"):
        evaluate(sft, folder=folder)


def test_chat_prompts(evaluate, data, sft, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(data, folder)
    chat = [{"role": "system", "content": "be good"}, {"role": "user", "content": "tea?"}]
    write_rows(folder / PROMPTS_EVAL, [PromptRow(chat), PromptRow("tea?")])
    evaluate(sft, folder=folder)
    samples = read_json(tmp_path / "samples.json")
    assert len(samples) == 2
    assert all(s["prompt"] in (chat, "tea?") for s in samples)
    assert samples[0]["prompt"] != samples[1]["prompt"]


# --- judges -----------------------------------------------------------------------------------


def test_judges():
    assert judge_of(PLAIN) is None
    assert judge_of(WORLD) is gold
    assert ceiling_of(PLAIN, DataConfig(), []) is None
    # equal replies are told apart by nobody
    assert ceiling_of(WORLD, DataConfig(), [Pair("p", "a", "a")]) == pytest.approx(0.5)
