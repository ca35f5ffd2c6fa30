"""Evaluation of a policy: whole evaluations of toys, replies, forgetting, samples."""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from rlhf.config import EvaluationConfig
from rlhf.config.lengths import TokenLimits
from rlhf.config.metric_names import certain_names, part_of
from rlhf.data.rows import (
    DEMONSTRATIONS,
    PAIRS_EVAL,
    PROMPTS_EVAL,
    PROMPTS_GATE,
    Demonstration,
    Pair,
    PromptRow,
    read_rows,
    write_rows,
)
from rlhf.environments.stop import StopSequences
from rlhf.errors import DataError
from rlhf.evaluation import answers as answers_module
from rlhf.evaluation import evaluate_policy
from rlhf.evaluation import policy as module
from rlhf.evaluation.answers import Answers, _likelihoods, answer_prompts, gold_of
from rlhf.evaluation.comparison import kinds_of, wins
from rlhf.evaluation.forgetting import MOST, held_out_replies, measure_forgetting, reply_losses
from rlhf.files import read_json, write_json
from rlhf.gates import flat_metrics
from rlhf.judge import JUDGE
from rlhf.modeling.base import load_policy
from rlhf.modeling.generate import generate
from rlhf.modeling.sampling import Sampling
from rlhf.ppo.train import train_policy
from rlhf.world import gold
from tests.library import toys

PLAIN, WORLD = EvaluationConfig(), EvaluationConfig(judge="world")
#: Fields of an estimate without those of one prompt.
PARTS = ("", "_low", "_high", "_size", "_error")


@pytest.fixture(scope="module")
def better(data, sft, approved, tmp_path_factory):
    """A policy that PPO has improved."""
    out = tmp_path_factory.mktemp("better")
    config = toys.changed(toys.PPO, total_episodes=320)
    train_policy(config, data, sft, approved, out, runtime=toys.RUNTIME)
    return out


@pytest.fixture(scope="module")
def judge(reward_model, tmp_path_factory):
    """The reward model as its own judge: both always agree."""
    folder = tmp_path_factory.mktemp("judge") / "judge"
    shutil.copytree(reward_model, folder)
    write_json(folder / JUDGE, {"trained": True, "usable": True, "accuracy": 0.8})
    return folder


@pytest.fixture
def evaluate(data, sft, reward_model, tmp_path):
    def run(policy, config=PLAIN, folder=data, ppo=toys.PPO, **options):
        result = evaluate_policy(
            config, ppo, folder, sft, policy, reward_model, tmp_path,
            runtime=toys.RUNTIME, **options,
        )  # fmt: skip
        return result.metrics, read_json(tmp_path / "evaluation.json")

    return run


@pytest.fixture(scope="module")
def whole(data, sft, better, reward_model, judge, tmp_path_factory):
    """A whole evaluation, with judge and champion: metrics, evaluation, samples, progress."""
    out, seen = tmp_path_factory.mktemp("whole"), []
    result = evaluate_policy(
        PLAIN, toys.PPO, data, sft, better, reward_model, out, judge=judge, champion=sft,
        champion_digest="sha256:c", runtime=toys.RUNTIME, progress=lambda *a: seen.append(a),
    )  # fmt: skip
    return result.metrics, read_json(out / "evaluation.json"), out, seen


# --- whole evaluations ------------------------------------------------------------------------


def test_a_better_policy_wins(whole):
    metrics, written, _, seen = whole
    assert metrics["sampled.win_rate_low"] > 0.5
    assert metrics["sampled.reward_after"] > metrics["sampled.reward_before"]
    assert metrics["sampled.reward_difference"] == pytest.approx(
        metrics["sampled.reward_after"] - metrics["sampled.reward_before"]
    )
    assert metrics["sampled.kl_exact"] > 0.5
    assert (written["n"], written["samples_per_prompt"]) == (20, 4)
    assert written["prompts_from"] == "run"
    assert written["notes"][0].endswith("the rate serves to compare policies")
    # Three policies and two scorers.
    assert [s[:2] for s in seen] == [(i, 5) for i in range(1, 6)]
    assert seen[3][2]["reward"] == pytest.approx(metrics["sampled.reward_after"])
    # the toy's held-out prompts with "tea" are a group of 8, the rest have none
    groups = written["sampled"]["by_group"]
    assert {name: part["n"] for name, part in groups.items()} == {"tea": 8}
    assert set(groups["tea"]) == {*written["sampled"]} - {"by_group"}


def test_what_is_reported(whole):
    _, written, _, _ = whole
    estimates = ["win_rate", "judge_win_rate", "gap", "reward_difference", "judge_difference"]
    likelihoods = {f"{name}{part}" for name in ("kl", "kl_exact") for part in PARTS}
    measures = ["tokens", "repetition", "distinct_1", "distinct_2", "refusal", "reward", "judge"]
    plain = {f"{name}{part}" for name in estimates for part in PARTS}
    plain |= {f"{name}_{side}" for name in measures for side in ("before", "after")}
    plain |= {"n", "by_group", "eos_rate", "eos_rate_before"}
    sampled = plain | likelihoods | {"entropy_before", "entropy_after"}
    assert set(written["sampled"]) == sampled
    assert set(written["greedy"]) == plain | {f"kl{part}" for part in PARTS}
    assert set(written["champion"]) == (sampled - likelihoods) | {"policy", "own"}
    assert written["champion"]["policy"] == "sha256:c"
    own = written["champion"]["own"]
    for name in ("tokens", "reward", "judge", "repetition"):
        assert own[name] == written["champion"][f"{name}_before"]
    assert {"eos_rate", "entropy", "refusal"} < set(own)
    assert written["judge"] == {"trained": True, "usable": True, "reason": None, "accuracy": 0.8}
    assert set(written["forgetting"]) == {
        "n", "nll_before", "nll_after", "perplexity_before", "perplexity_after",
        *(f"nll_difference{part}" for part in PARTS),
    }  # fmt: skip
    assert [row["metric"] for row in written["shifts"]] == [
        "tokens", "eos_rate", "repetition", "distinct_1", "distinct_2", "entropy", "refusal",
    ]  # fmt: skip


def test_a_judge_that_agrees_sees_no_gap(whole):
    _, written, _, _ = whole
    assert written["sampled"]["gap"] == 0
    assert written["sampled"]["judge_win_rate"] == written["sampled"]["win_rate"]
    assert written["over_optimisation"]["state"] == "no"


def test_metrics_of_the_artifact_are_those_of_the_evaluation(whole):
    metrics, written, _, _ = whole
    assert metrics["n"] == 20
    assert metrics["champion.own.tokens"] == written["champion"]["own"]["tokens"]
    assert metrics["judge.accuracy"] == 0.8
    assert metrics["over_optimisation.state"] == "no"
    assert metrics["greedy.win_rate"] == written["greedy"]["win_rate"]
    assert not [name for name in metrics if "by_group" in name or "shifts" in name]


def test_the_champion_that_is_the_start_has_its_replies(whole):
    # Drawn with another seed: what it says is not what the SFT policy said, but from the same
    # distribution, so that the policy beats it as clearly.
    _, written, out, _ = whole
    samples = read_json(out / "samples.json")
    assert [s["champion"] for s in samples] != [s["before"] for s in samples]
    assert written["champion"]["win_rate"] == pytest.approx(written["sampled"]["win_rate"], abs=0.1)


def test_samples(whole):
    _, _, out, _ = whole
    samples = read_json(out / "samples.json")
    assert len(samples) == 20
    assert set(samples[0]) == {
        "prompt", "group", "before", "after", "champion", "kinds", "more",
        *(f"{s}_{n}" for s in ("reward", "judge") for n in ("before", "after", "champion")),
        "gold_before", "gold_after",
    }  # fmt: skip
    # All samples of each prompt are there, each with its own scores.
    others = {
        key: samples[0][key] for key in samples[0].keys() - {"prompt", "group", "kinds", "more"}
    }
    assert [len(s["more"]) for s in samples] == [3] * 20
    assert all(each.keys() == others.keys() for s in samples for each in s["more"])
    assert any(each["after"] != s["after"] for s in samples for each in s["more"])
    every = [r["reward_after"] for s in samples for r in (s, *s["more"])]
    assert sum(every) / 80 == pytest.approx(whole[1]["sampled"]["reward_after"])
    assert all(s["gold_after"] is None for s in samples)
    assert all(s["judge_after"] == s["reward_after"] for s in samples)
    kinds = [kind for s in samples for kind in s["kinds"]]
    assert kinds.count("changed") == 6
    assert "disagree" not in kinds
    assert all(s["judge_after"] < s["judge_before"] for s in samples if "lost" in s["kinds"])


def test_the_prompts_are_kept_and_used_again(whole, evaluate, better, tmp_path):
    _, written, out, _ = whole
    rows = read_rows(out / PROMPTS_GATE, PromptRow)
    assert len(rows) == 20
    metrics, again = evaluate(better, prompts=out / PROMPTS_GATE)
    assert again["prompts_from"] == "champion"
    assert again["prompts_sha256"] == written["prompts_sha256"]
    assert again["sampled"]["win_rate"] == written["sampled"]["win_rate"]
    assert "champion" not in again
    assert metrics["judge.usable"] is False
    # They stay whole whatever an evaluation leaves out, so that all challengers have the same.
    evaluate(better, toys.changed(PLAIN, prompts=3), prompts=out / PROMPTS_GATE)
    assert read_rows(tmp_path / PROMPTS_GATE, PromptRow) == rows
    _, fewer = evaluate(better, toys.changed(PLAIN, prompts=3))
    assert fewer["prompts_sha256"] != written["prompts_sha256"]


def test_gate_prompts_that_a_stage_has_seen_are_left_out(
    whole, evaluate, better, data, tmp_path_factory
):
    _, written, out, _ = whole
    rows = read_rows(out / PROMPTS_GATE, PromptRow)
    folder = tmp_path_factory.mktemp("seen") / "data"
    shutil.copytree(data, folder)
    seen = [Demonstration(row.prompt, "good") for row in rows[:2]]
    write_rows(folder / DEMONSTRATIONS, seen)
    _, found = evaluate(better, folder=folder, prompts=out / PROMPTS_GATE)
    assert (found["n"], found["sampled"]["n"]) == (18, 18)
    assert found["notes"][0].startswith("2 of the champion's 20 gate prompts are among the")
    # Of all of them, so that looks at them are counted together.
    assert found["prompts_sha256"] == written["prompts_sha256"]
    write_rows(folder / DEMONSTRATIONS, [Demonstration(row.prompt, "good") for row in rows[:3]])
    with pytest.raises(DataError, match=r"3 of .* which are too many; set another data\.rotation"):
        evaluate(better, folder=folder, prompts=out / PROMPTS_GATE)


def test_rules_may_use_the_metrics_that_are_written_and_no_others(whole):
    names = set(dict(flat_metrics(whole[1])))
    unknown = {name for name in names if part_of(name, "policy") is None}
    assert unknown == set()
    # `own` and `judge` of a stand-in have not all the parts of real ones.
    known = {n for n in certain_names("policy", {"gold", "members"}) if n[:6] != "judge."}
    assert known - names == set()


def test_a_policy_against_itself(evaluate, sft):
    metrics, written = evaluate(sft)
    assert metrics["greedy.win_rate"] == 0.5
    assert metrics["greedy.reward_before"] == metrics["greedy.reward_after"]
    # Sampled replies are independent of each other, so they are not the same.
    assert metrics["sampled.win_rate_low"] < 0.5 < metrics["sampled.win_rate_high"]
    assert metrics["sampled.tokens_before"] != metrics["sampled.tokens_after"]
    for mode in ("sampled", "greedy"):
        assert metrics[f"{mode}.kl"] == pytest.approx(0, abs=1e-6)
    assert metrics["sampled.kl_exact"] == pytest.approx(0, abs=1e-6)
    assert metrics["forgetting.nll_difference"] == 0
    assert not any(row["significant"] for row in written["shifts"])
    assert written["over_optimisation"] == {
        "state": "unknown", "evidence": "no judge to tell by: no judge was given",
    }  # fmt: skip
    assert "judge_win_rate" not in written["sampled"]


def test_an_unusable_judge_judges_nothing(evaluate, better, judge, tmp_path):
    folder = Path(shutil.copytree(judge, tmp_path / "judge"))
    reason = "its accuracy may be a coin's"
    write_json(folder / JUDGE, {"trained": True, "usable": False, "reason": reason})
    metrics, written = evaluate(better, judge=folder)
    assert written["judge"]["reason"] == reason
    assert not [name for name in metrics if "judge_" in name or name.endswith(".gap")]
    assert reason in written["over_optimisation"]["evidence"]


def test_replies_end_where_those_of_training_ended(evaluate, sft, tmp_path):
    def replies(**options):
        evaluate(sft, PLAIN, ppo=toys.changed(toys.PPO, **options))
        return [s["before"] for s in read_json(tmp_path / "samples.json")]

    whole = replies()
    cut = replies(env_type="text_generation", env_config={"stop_sequences": ["a"]})
    assert any("a" in text for text in whole)
    assert cut == [text.partition("a")[0].strip() for text in whole]


def test_samples_come_in_an_order_of_the_prompts(evaluate, better, sft, tmp_path):
    def order(policy):
        evaluate(policy)
        return [s["prompt"] for s in read_json(tmp_path / "samples.json")]

    first = order(sft)
    assert first == order(better)
    assert first != sorted(first)


def test_seed_temperature_and_numbers(evaluate, better):
    base, _ = evaluate(better)
    assert evaluate(better)[0] == base
    assert evaluate(better, seed=1)[0]["sampled.kl"] != base["sampled.kl"]
    assert evaluate(better, seed=1)[0]["greedy.kl"] == base["greedy.kl"]
    cold, _ = evaluate(better, toys.changed(PLAIN, temperature=0.01))
    assert cold["sampled.reward_after"] == pytest.approx(cold["greedy.reward_after"], abs=1e-4)
    few, written = evaluate(better, toys.changed(PLAIN, prompts=5, samples_per_prompt=1))
    assert few["n"] == few["sampled.n"] == 5
    assert written["samples_per_prompt"] == 1


def test_batches_do_not_touch_greedy_replies(evaluate, better):
    base, _ = evaluate(better)
    small, _ = evaluate(better, toys.changed(PLAIN, batch_size=3))
    for name in ("win_rate", "reward_after", "kl", "tokens_after"):
        assert small[f"greedy.{name}"] == pytest.approx(base[f"greedy.{name}"], abs=1e-4)


def test_gold_scores_every_reply(evaluate, better, tmp_path, monkeypatch):
    seen = []

    def scored(prompt, reply):
        seen.append((prompt, reply))
        return float("good" in reply)

    monkeypatch.setattr(module, "gold_of", lambda config: scored)
    metrics, _ = evaluate(better)
    samples = read_json(tmp_path / "samples.json")
    # Two policies, each with four samples and a greedy reply to 20 prompts.
    assert len(seen) == 2 * 5 * 20
    assert {(s["prompt"], s["after"]) for s in samples} <= set(seen)
    assert all(s["gold_after"] == float("good" in s["after"]) for s in samples)
    # The sampled replies of the policy are scored third, after both of the SFT policy's.
    mean = sum("good" in reply for _, reply in seen[100:180]) / 80
    assert metrics["sampled.gold_after"] == pytest.approx(mean)
    assert metrics["sampled.gold_not_worse"] >= metrics["sampled.gold_win_rate"]


def test_no_held_out_prompts(evaluate, data, sft, tmp_path):
    folder = tmp_path / "empty"
    shutil.copytree(data, folder)
    write_rows(folder / PROMPTS_EVAL, [])
    with pytest.raises(DataError, match=r"no held-out prompts.*data\.eval_fraction"):
        evaluate(sft, folder=folder)


def test_chat_prompts_and_one_prompt(evaluate, data, sft, tmp_path):
    folder = tmp_path / "chat"
    shutil.copytree(data, folder)
    chat = [{"role": "system", "content": "be good"}, {"role": "user", "content": "tea?"}]
    write_rows(folder / PROMPTS_EVAL, [PromptRow(chat), PromptRow("tea?")])
    evaluate(sft, folder=folder)
    samples = read_json(tmp_path / "samples.json")
    assert len(samples) == 2
    assert all(s["prompt"] in (chat, "tea?") for s in samples)
    assert samples[0]["prompt"] != samples[1]["prompt"]
    write_rows(folder / PROMPTS_EVAL, [PromptRow("tea?")])
    metrics, written = evaluate(sft, folder=folder)
    # Of one prompt nothing is known of others.
    assert (metrics["sampled.win_rate_low"], metrics["sampled.win_rate_high"]) == (0, 1)
    assert "sampled.reward_difference_low" not in metrics
    assert written["shifts"][0]["p"] is written["shifts"][0]["high"] is None


# --- replies ----------------------------------------------------------------------------------


def answered(policy, renderer, prompts=("tea?", "jar or cup?"), **options):
    values = {"replies": 1, "batch_size": 128, "max_prompt": 40, **options}
    return answer_prompts(
        policy, values.pop("reference", None), [PromptRow(p) for p in prompts], renderer,
        StopSequences(renderer), Sampling(8, values.pop("temperature", 1.0)), 3, **values,
    )  # fmt: skip


@pytest.fixture(scope="module")
def other(fresh):
    model = load_policy(fresh).eval().to(toys.DEVICE)
    torch.nn.init.constant_(model.model.norm.weight, 2.0)
    return model


@pytest.mark.parametrize("temperature", [1.0, 0.5, 0.0])
@pytest.mark.parametrize("budget", [10**9, 1])
def test_likelihoods_are_those_of_plain_calls(
    renderer, policy, other, temperature, budget, monkeypatch
):
    """At the sampling temperature, and of a greedy reply at temperature 1; in any portions."""
    monkeypatch.setattr(answers_module, "LOGITS", budget)
    rows = [renderer.encode_prompt(p, 40) for p in ("tea?", "jar or cup?", "a mug")]
    replies = generate(policy, rows, renderer.tokenizer, Sampling(8), 3)
    got = _likelihoods(policy, other, replies, temperature)
    alone = _likelihoods(policy, None, replies, temperature)
    assert set(got) == ({"kl", "kl_exact", "entropy"} if temperature else {"kl"})
    assert set(alone) == ({"entropy"} if temperature else set())
    for i, (prompt, reply) in enumerate(zip(rows, replies.rows(), strict=True)):
        ids = torch.tensor([prompt + reply], device=toys.DEVICE)
        with torch.no_grad():
            ours, theirs = (
                (m(ids).logits[0, len(prompt) - 1 : -1] / (temperature or 1)).log_softmax(-1).cpu()
                for m in (policy, other)
            )
        steps = range(len(reply))
        expected = {
            "kl": (ours[steps, reply] - theirs[steps, reply]).sum(),
            "kl_exact": (ours.exp() * (ours - theirs)).sum(),
            "entropy": -(ours.exp() * ours).sum(-1).mean(),
        }
        for name, values in got.items():
            assert values[i].item() == pytest.approx(expected[name].item(), abs=1e-4)
        for name, values in alone.items():
            assert values[i].item() == pytest.approx(expected[name].item(), abs=1e-4)


def test_replies_stand_with_their_prompts(policy, renderer):
    one = answered(policy, renderer, replies=3, batch_size=128)
    assert [len(own) for own in one.texts] == [3, 3]
    assert len({*one.texts[0], *one.texts[1]}) == 6
    # Greedy ones are those of the prompt alone, whatever stands beside it.
    alone = [
        answered(policy, renderer, prompts=(p,), temperature=0.0).texts[0] for p in ("tea?", "mug")
    ]
    both = answered(
        policy, renderer, prompts=("tea?", "mug"), temperature=0.0, replies=2, batch_size=3
    )
    assert both.texts == [2 * texts for texts in alone]
    for name, values in one.measures.items():
        assert values.shape == (2,), name


def test_greedy_replies_have_no_entropy(policy, renderer, other):
    greedy = answered(policy, renderer, temperature=0.0, reference=other)
    assert "kl" in greedy.measures
    assert {"entropy", "kl_exact"}.isdisjoint(greedy.measures)


def test_gold():
    assert gold_of(PLAIN) is None
    assert gold_of(WORLD) is gold


# --- forgetting -------------------------------------------------------------------------------


def test_losses_are_those_of_plain_calls(data, policy, renderer, tmp_path):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    texts = ["good", "good good bad", "bad"]
    pairs = [Pair(p, text, "x") for p, text in zip(("a?", "jar or cup?", "b?"), texts, strict=True)]
    write_rows(folder / PAIRS_EVAL, [*pairs, Pair("a?", "another reply", "x")])
    rows = held_out_replies(folder, renderer, TokenLimits(max_length=48))
    assert len(rows.rows) == 3  # one of each prompt
    losses = reply_losses(policy, rows, renderer)
    for pair, loss in zip(pairs, losses, strict=True):
        prompt = renderer.encode_prompt(pair.prompt, 40)
        reply = renderer.encode_reply(pair.chosen)
        ids = torch.tensor([prompt + reply], device=toys.DEVICE)
        with torch.no_grad():
            log_p = policy(ids).logits[0, len(prompt) - 1 : -1].log_softmax(-1).cpu()
        assert loss == pytest.approx(-log_p[range(len(reply)), reply].mean().item(), abs=1e-5)


def test_forgetting_by_hand(data, renderer):
    rows = held_out_replies(data, renderer, TokenLimits(max_length=48))
    rows = type(rows)(rows.rows[:2], rows.prompts[:2])
    got = measure_forgetting(np.array([1.0, 3.0]), np.array([2.0, 3.0]), rows)
    assert (got["nll_before"], got["nll_after"], got["nll_difference"], got["n"]) == (
        2,
        2.5,
        0.5,
        2,
    )
    assert got["perplexity_before"] == pytest.approx(math.exp(2))
    assert got["perplexity_after"] == pytest.approx(math.exp(2.5))
    # Differences 1 and 0: standard deviation √½, error √½/√2 = ½.
    assert got["nll_difference_error"] == pytest.approx(0.5)


def test_no_reply_to_forget(data, policy, renderer, tmp_path):
    folder = Path(shutil.copytree(data, tmp_path / "data"))
    write_rows(folder / PAIRS_EVAL, [Pair("long " * 60, "good", "bad")])
    rows = held_out_replies(folder, renderer, TokenLimits(max_length=48, max_new_tokens=8))
    assert rows.rows == []
    losses = reply_losses(policy, rows, renderer)
    assert measure_forgetting(losses, losses, rows) == {"n": 0}
    write_rows(folder / PAIRS_EVAL, [Pair(f"{i}?", "good", "bad") for i in range(MOST + 5)])
    assert len(held_out_replies(folder, renderer, TokenLimits(max_length=48)).rows) == MOST


# --- kinds of samples -------------------------------------------------------------------------


def shown(reward, judge=None, kl=None):
    """Answers whose first replies have these scores; the second ones would say the opposite."""
    n = len(reward)
    scores = {"reward": np.array([[r, -9 * r] for r in reward])}
    if judge:
        scores["judge"] = np.array([[j, -9 * j] for j in judge])
    return Answers([["a", "b"]] * n, {"kl_exact": np.array(kl or [0.0] * n)}, scores)


def test_kinds_of_samples_by_hand():
    start = shown([0.0] * 4, [0.0] * 4)
    # Differences of the reward 4 −1 2 1, of the judge −1 2 −3 1; deviations 1.80 and 1.92:
    # contrary are the first three, by 4/1.80 + 1/1.92 = 2.74, 1.60 and 2/1.80 + 3/1.92 = 2.67.
    end = shown([4.0, -1.0, 2.0, 1.0], [-1.0, 2.0, -3.0, 1.0], kl=[1.0, 9.0, 5.0, 2.0])
    kinds = kinds_of(start, end, 2)
    assert kinds == {"changed": [1, 2], "lost": [2, 0], "disagree": [0, 2]}
    without = kinds_of(shown([0.0] * 4), shown([4.0, -1.0, 2.0, 1.0], kl=[1.0, 9.0, 5.0, 2.0]), 2)
    assert without == {"changed": [1, 2], "lost": [1]}
    assert kinds_of(start, end, 0) == {"changed": [], "lost": [], "disagree": []}
    assert wins(start.scores["reward"], end.scores["reward"]).shape == (4,)


# --- the champion's own settings, forgotten rows ------------------------------------------------


def test_the_champion_answers_by_its_own_settings(evaluate, better):
    """A shorter limit or another stop of the challenger must not cut the champion's replies."""
    short = toys.changed(toys.PPO, max_new_tokens=1)
    options = {"champion": better, "champion_digest": "c" * 64}
    cut, written = evaluate(better, ppo=short, **options)
    assert written["champion"]["own"]["tokens"] == 1  # nothing is known of its training
    _, written = evaluate(better, ppo=short, champion_replies=(6, ()), **options)
    whole = written["champion"]
    assert whole["own"]["tokens"] > 1 == whole["tokens_after"]
    assert any("the champion answers by its own settings, at most 6" in n for n in written["notes"])
    assert cut["champion.win_rate"] == pytest.approx(0.5, abs=0.1)  # the same policy, both cut


def test_forgotten_rows_are_no_gate_prompts(evaluate, better, tmp_path):
    rows = [PromptRow(f"what of {name}?", row_ids=(name,)) for name in ("jam", "oil", "rye")]
    path = tmp_path / "given" / PROMPTS_GATE
    path.parent.mkdir()
    write_rows(path, rows)
    _, written = evaluate(better, prompts=path, forgotten=frozenset({"oil"}))
    assert written["n"] == 2
    kept = read_rows(tmp_path / PROMPTS_GATE, PromptRow)
    assert [row.row_ids for row in kept] == [("jam",), ("rye",)]


def test_prompts_of_the_champion_that_are_too_long_are_left_out(evaluate, better, tmp_path):
    """This run's data were checked before training; the champion's gate prompts were not."""
    rows = [PromptRow("jam or oil?"), PromptRow("oil or rye?"), PromptRow("rye " * 60)]
    (tmp_path / "given").mkdir()
    write_rows(tmp_path / "given" / PROMPTS_GATE, rows)
    metrics, written = evaluate(better, prompts=tmp_path / "given" / PROMPTS_GATE)
    assert written["n"] == 2
    assert metrics["prompts_too_long"] == 1
