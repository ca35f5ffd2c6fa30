"""Members of a reward model: fits by hand, training, evaluation, and what is refused."""

from __future__ import annotations

import json
import math
import shutil

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.config import DataConfig, EvaluationConfig, LoraConfig, PipelineConfig
from rlhf.config.metric_names import certain_names, part_of
from rlhf.data.rows import PAIRS_TRAIN, Pair, read_rows, write_rows
from rlhf.errors import ConfigError, DataError, TrainingError
from rlhf.evaluation import evaluate_policy, evaluate_reward_model
from rlhf.evaluation.disagreement import DISAGREEMENT, by_disagreement, members_report
from rlhf.files import read_json, write_json
from rlhf.gates import flat_metrics
from rlhf.inference import share_of
from rlhf.judge import judge_section
from rlhf.modeling.base import load_policy
from rlhf.modeling.members import (
    WEIGHTS,
    Members,
    _Fit,
    linear_head,
    member_scores,
    members_of,
    open_scorer,
    read_members,
    resample,
)
from rlhf.modeling.reward import META, Scorer, load_unpublished, reward_meta
from rlhf.modeling.source import ExternalModel
from rlhf.ready_reward_model import publish_ready_reward_model
from rlhf.reward import _encode, train_reward_model
from tasks.external_inputs import judge_settings, reward_settings
from tests.library import toys
from tests.library.encoders import save_encoder

CPU = torch.device("cpu")
COUNT = 3


def trained(data, sft, out, seed=0, **changes):
    """Train the toy's reward model with members."""
    out.mkdir()
    config = toys.changed(toys.REWARD, **{"members": COUNT, **changes})
    result = train_reward_model(config, data, sft, out, seed=seed, runtime=toys.RUNTIME)
    return result.metrics


@pytest.fixture(scope="module")
def ensemble(data, sft, tmp_path_factory):
    """A reward model with members, trained as `reward_model` is."""
    out = tmp_path_factory.mktemp("members") / "out"
    assert trained(data, sft, out)["members"] == COUNT
    return out


@pytest.fixture(scope="module")
def doubtful(data, tmp_path_factory):
    """The toy dataset with every third preference turned round: no head is right throughout."""
    folder = tmp_path_factory.mktemp("doubtful") / "data"
    shutil.copytree(data, folder)
    pairs = [
        Pair(p.prompt, p.chosen, p.rejected) if i % 3 else Pair(p.prompt, p.rejected, p.chosen)
        for i, p in enumerate(read_rows(data / PAIRS_TRAIN, Pair))
    ]
    write_rows(folder / PAIRS_TRAIN, pairs)
    return folder


# --- the fit -------------------------------------------------------------------------------------


def fitted(differences, trained=0.0, weights=None, margin=0.0, anchor=None):
    rows = torch.tensor(differences, dtype=torch.double)
    rows = rows[:, None] if rows.dim() == 1 else rows
    head = torch.as_tensor(trained, dtype=torch.double).expand(rows.shape[1])
    fit = _Fit(rows, np.full(len(rows), margin), head)
    return fit.shift(np.array(weights or [1] * len(rows), dtype=float), anchor).tolist()


def draw(seed, number=1):
    return np.random.default_rng([seed, number])


def test_fits_by_hand():
    # One feature, three pairs of it and one against it, s² = 1. The slope is zero where
    # 3 σ(−w) − σ(w) = 3 − 4 σ(w) = w − w₀. At the odds of the pairs, w = ln 3, σ(w) = 3/4:
    assert fitted([1, 1, 1, -1], math.log(3)) == pytest.approx([0], abs=1e-6)
    # at w = 0 it is 1 = 0 − w₀
    assert fitted([1, 1, 1, -1], -1.0) == pytest.approx([1], abs=1e-6)
    # In another unit, s² = 100: 10 · 3/2 − 10/2 = 100 (0 − w₀). The margins shift by 1 as before.
    assert fitted([10, 10, 10, -10], -0.1) == pytest.approx([0.1], abs=1e-7)
    # With margin m two pairs have 2 σ(m − w) = w − w₀, at w = m that is 1 = m − w₀.
    assert fitted([1, 1], 1.5, margin=2.5) == pytest.approx([1], abs=1e-6)
    # A pair of weight 3 is three pairs, one of weight 0 is none.
    assert fitted([1, -1, -1], -1.0, [3, 1, 0]) == pytest.approx([1], abs=1e-6)
    # A centre that is moved by 2: 3 − 4 σ(w) = w − w₀ − 2, at w = 0 for w₀ = −3.
    assert fitted([1, 1, 1, -1], -3.0, anchor=np.array([2.0])) == pytest.approx([3], abs=1e-6)
    # It is in deviations of the prior, which are 1/s = 0.1 here.
    moved = fitted([10, 10, 10, -10], -0.3, anchor=np.array([2.0]))
    assert moved == pytest.approx([0.3], abs=1e-7)


def test_directions_that_no_pair_has_stay_as_trained():
    """Three features and a single pair, along (1, 1, 0): |d|² = 2, and w₀·d = −½."""
    # At w·d = 0: d/2 = 2 (w − w₀), so that the shift is d/4, and the margin ½ more than before.
    got = fitted([[1, 1, 0]], torch.tensor([-0.25, -0.25, 7]))
    assert got == pytest.approx([0.25, 0.25, 0], abs=1e-6)
    # Unless the centre is moved, by 3/√2 there.
    free = torch.tensor([-0.25, -0.25, 7])
    got = fitted([[1, 1, 0]], free, anchor=np.array([0.0, 0.0, 3.0]))
    assert got == pytest.approx([0.25, 0.25, 3 / math.sqrt(2)], abs=1e-6)


def test_a_fit_that_fails_is_told(monkeypatch):
    monkeypatch.setattr("rlhf.modeling.members._STEPS", 1)
    generator = torch.Generator().manual_seed(0)
    with pytest.raises(TrainingError, match=r"^reward_model\.members: a head's fit ended"):
        fitted(torch.randn(50, 9, generator=generator).tolist(), 0.5)


def test_resamples_are_of_prompts():
    prompts = ["a", "b", "a", "c", "b"]
    draws = [resample(prompts, draw(7, i)) for i in range(400)]
    for times in draws:
        assert times[0] == times[2]
        assert times[1] == times[4]
        assert times[0] + times[1] + times[3] == 3
    # Each of three prompts is drawn once in the mean.
    assert np.mean(draws, axis=0) == pytest.approx(np.ones(5), abs=0.12)


def states_of(model, ids, pooling):
    """Pooled states by a plain call of the backbone; the reply begins behind its marker."""
    with torch.no_grad():
        hidden = model.model(torch.tensor([ids])).last_hidden_state[0].double()
    if pooling == "last":
        return hidden[-1]
    start = max(i for i, token in enumerate(ids) if token == model.marker)
    return hidden[start + 1 :].sum(0)


def minimum(differences, times, head, margins, anchor=0.0):
    """Newton's method on the objective of the module's docstring."""
    square = (differences**2).sum(1).mean()
    centre, w = head + anchor / np.sqrt(square), head.copy()
    for _ in range(60):
        p = 1 / (1 + np.exp(differences @ w - margins))
        slope = square * (w - centre) - differences.T @ (times * p)
        curve = square * np.eye(len(w)) + (differences.T * (times * p * (1 - p))) @ differences
        w = w - np.linalg.solve(curve, slope)
    return w


@pytest.mark.parametrize(("pooling", "margin_coef"), [("last", 0), ("sum", 0.5)])
def test_a_member_is_the_head_and_what_a_draw_changes(
    doubtful, sft, tmp_path, pooling, margin_coef
):
    out, folder, seed = tmp_path / "out", tmp_path / "data", 5
    pairs = read_rows(doubtful / PAIRS_TRAIN, Pair)
    weights, margins = np.ones(len(pairs)), np.zeros(len(pairs))
    if margin_coef:
        weights, margins = np.arange(len(pairs)) % 4 + 0.5, np.arange(len(pairs)) % 5 / 2
        pairs = [
            Pair(p.prompt, p.chosen, p.rejected, weight=float(w), margin=float(m))
            for p, w, m in zip(pairs, weights, margins, strict=True)
        ]
    folder.mkdir()
    write_rows(folder / PAIRS_TRAIN, pairs)
    trained(folder, sft, out, seed, pooling=pooling, margin_coef=margin_coef)
    # Weights have the mean 1.
    weights, margins = weights / weights.mean(), margin_coef * margins
    model, renderer = load_unpublished(out)
    rows, _ = _encode(pairs, renderer, 48)
    known = {}
    for ids in (row[f"{side}_ids"] for row in rows for side in ("chosen", "rejected")):
        if tuple(ids) not in known:
            known[tuple(ids)] = states_of(model, ids, pooling)
    differences = np.stack(
        [(known[tuple(r["chosen_ids"])] - known[tuple(r["rejected_ids"])]).numpy() for r in rows]
    )
    head = toys.weights(out)["score.weight"].double().numpy()[0]
    heads = load_file(out / WEIGHTS)["weight"].double().numpy()
    assert heads.shape == (COUNT, 16)
    assert heads[0].tolist() == head.tolist()
    whole = minimum(differences, weights, head, margins)
    for number in (1, 2):
        own = draw(seed, number)
        times = resample([pair.prompt for pair in pairs], own)
        best = minimum(differences, weights * times, head, margins, own.normal(size=16))
        expected = head + best - whole
        change = np.abs(heads[number] - head).max()
        assert heads[number] == pytest.approx(expected, abs=change / 100)


# --- training ------------------------------------------------------------------------------------


def test_the_model_is_the_same_with_and_without_members(ensemble, reward_model):
    toys.assert_same_weights(ensemble, reward_model)
    names = [{path.name for path in folder.iterdir()} for folder in (ensemble, reward_model)]
    assert names[0] - names[1] == {WEIGHTS}
    assert names[1] - names[0] == set()
    assert reward_meta(ensemble) == {**reward_meta(reward_model), "members": COUNT}
    assert read_members(reward_model) is None
    scorer = open_scorer(reward_model, CPU, 48)
    assert type(scorer) is Scorer
    assert members_of(scorer) is None
    assert member_scores(scorer, ["tea or cup?"], ["good"]).shape == (1, 1)


def test_settings_of_a_single_head_are_those_of_before():
    one, three = (
        PipelineConfig.model_validate({"reward_model": {"members": n}}) for n in (1, COUNT)
    )
    assert "members" not in reward_settings(one)["reward_model"]
    assert reward_settings(three)["reward_model"]["members"] == COUNT
    # A judge is the same whatever members the reward model has.
    assert judge_settings(one) == judge_settings(three)
    assert judge_section(three.reward_model, None).members == 1


def test_scores_of_the_members(ensemble):
    prompts, replies = ["tea or cup?", "jar or pot?"] * 3, ["good", "bad", "good good"] * 2
    scorer = open_scorer(ensemble, CPU, 48)
    table = scorer.of_members(prompts, replies)
    # The first are the model's own, to the last bit, in batches of any size.
    plain = Scorer(ensemble, CPU, 48)(prompts, replies)
    assert table[:, 0].tolist() == plain.tolist() == scorer(prompts, replies).tolist()
    members = read_members(ensemble)
    for row in range(2):
        ids = scorer.renderer.encode(prompts[row], replies[row], 48).ids
        expected = members.weight.double() @ states_of(scorer.model, ids, "sum")
        assert table[row].tolist() == pytest.approx(expected.tolist(), abs=1e-4)
    assert scorer.of_members([], []).shape == (0, COUNT)
    # Their means are those of the reference replies, whose scale is in rlhf.json.
    meta = reward_meta(ensemble)
    assert float(members.mean[0]) == pytest.approx(meta["score_mean"], abs=1e-4)
    assert members.deviation == meta["score_std"]


def test_disagreement_by_hand():
    members = Members(torch.zeros(3, 4), None, torch.tensor([1.0, 2.0, 6.0]), 0.5)
    # Above their means the members say 1, 1, 1: a constant of a member's own is no disagreement.
    # And 0, 1, 2, whose standard deviation is 1, in units of 0.5.
    scores = torch.tensor([[2.0, 3.0, 7.0], [1.0, 3.0, 8.0]])
    assert members.disagreement(scores).tolist() == [0, 2]
    # Margins have no such constant.
    assert members.spread(torch.tensor([[1.0, 2.0, 3.0]])).tolist() == [2]


def test_the_same_twice_and_another_seed(ensemble, data, sft, tmp_path):
    trained(data, sft, tmp_path / "again")
    assert (tmp_path / "again" / WEIGHTS).read_bytes() == (ensemble / WEIGHTS).read_bytes()
    trained(data, sft, tmp_path / "other", seed=1, epochs=1)
    one, other = (load_file(path / WEIGHTS)["weight"] for path in (ensemble, tmp_path / "other"))
    shifts = [heads[1:] - heads[0] for heads in (one, other)]
    assert (shifts[0] - shifts[1]).norm() > 0.5 * shifts[0].norm()


def test_with_adapters(data, sft, tmp_path):
    """Members are heads on the merged model, which the adapter beside it does not change."""
    out = tmp_path / "out"
    trained(data, sft, out, lora=LoraConfig(r=2, alpha=8.0), epochs=1)
    scorer = open_scorer(out, CPU, 48)
    table = scorer.of_members(["tea or cup?"] * 2, ["good", "bad"])
    assert (
        table[:, 0].tolist() == Scorer(out, CPU, 48)(["tea or cup?"] * 2, ["good", "bad"]).tolist()
    )
    assert (table[0] - table[1]).std() > 0
    assert (out / "adapter").is_dir()


# --- what is refused -----------------------------------------------------------------------------


def test_a_head_that_is_not_linear(data, sft, tmp_path):
    """An encoder's, which is on its first token; before the training."""
    save_encoder("bert", tmp_path / "bert", ready=False)
    with pytest.raises(
        ConfigError, match=r"reward_model\.members = 3 are linear heads on .* set it"
    ):
        trained(data, sft, tmp_path / "out", base=str(tmp_path / "bert"), pooling="last")
    assert [*(tmp_path / "out").iterdir()] == []


def test_a_head_is_linear_if_it_computes_so(reward_model):
    model, _ = load_unpublished(reward_model)
    head = linear_head(model)
    assert head is model.score
    # An activation has no weights and is no part of a linear head; dropout is off where it counts.
    model.score = torch.nn.Sequential(torch.nn.Dropout(0.5), head)
    assert linear_head(model.train()) is head
    model.score = torch.nn.Sequential(head, torch.nn.Tanh())
    assert linear_head(model) is None
    model.score = torch.nn.Sequential(torch.nn.Linear(16, 8), torch.nn.Linear(8, 1))
    assert linear_head(model) is None


def test_pairs_of_one_prompt(data, sft, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    write_rows(folder / PAIRS_TRAIN, [Pair("tea?", "good", "bad")] * 4)
    with pytest.raises(DataError, match=r"members = 3 .* all 4 training pairs have the same one"):
        trained(folder, sft, tmp_path / "out")


@pytest.mark.parametrize(
    ("tree", "words"),
    [
        ({"reward_model": {"members": 0}}, "greater than or equal to 1"),
        ({"reward_model": {"members": 17}}, "less than or equal to 16"),
        (
            {"reward_model": {"members": 2}, "ppo": {"reward_model_path": "m"}},
            "reward_model.members = 2 are heads that a training fits, and ppo.reward_model_path = "
            "'m' is not trained here; set reward_model.members to 1",
        ),
        (
            {"gates": {"reward_model": [{"metric": "members.accuracy", "min": 0.5}]}},
            "reward_model.members = 1 trains a single head",
        ),
        (
            {"gates": {"policy": [{"metric": "sampled.disagreement_difference", "max": 0.5}]}},
            "reward_model.members = 1 trains a single head",
        ),
    ],
)
def test_settings_that_are_refused(tree, words):
    with pytest.raises(ValueError, match=words.replace("(", r"\(")):
        PipelineConfig.model_validate(tree)
    rules = {"gates": tree["gates"], "reward_model": {"members": 2}} if "gates" in tree else None
    assert rules is None or PipelineConfig.model_validate(rules)


def test_a_damaged_file(ensemble, copy_of):
    folder = copy_of(ensemble)
    tensors = load_file(folder / WEIGHTS)
    save_file({**tensors, "weight": tensors["weight"][:2]}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match=r"has 3 members by its rlhf\.json, and .* copy it too"):
        open_scorer(folder, CPU, 48)
    save_file({**tensors, "weight": tensors["weight"][:, :9].contiguous()}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match="are not for its base"):
        open_scorer(folder, CPU, 48)
    # Of another model with as many weights: its first head is not the one that is published.
    save_file({**tensors, "weight": tensors["weight"] + 0.1}, folder / WEIGHTS)
    with pytest.raises(ConfigError, match="are not for its base"):
        open_scorer(folder, CPU, 48)
    (folder / WEIGHTS).unlink()
    with pytest.raises(ConfigError, match=r"does not hold them \(FileNotFoundError\)"):
        open_scorer(folder, CPU, 48)
    write_json(folder / META, {**reward_meta(folder), "members": "many"})
    with pytest.raises(ConfigError, match="has 'many' members"):
        read_members(folder)


def test_a_ready_model_keeps_its_members(ensemble, tmp_path):
    out = tmp_path / "out"
    out.mkdir()
    model = ExternalModel("ppo.reward_model_path", str(ensemble), ready=True)
    publish_ready_reward_model(model, ensemble, out, runtime=toys.RUNTIME)
    assert (out / WEIGHTS).read_bytes() == (ensemble / WEIGHTS).read_bytes()
    assert len(members_of(open_scorer(out, CPU, 48))) == COUNT


# --- evaluation ----------------------------------------------------------------------------------


def test_members_of_pairs_by_hand():
    """Two members, whose margins differ by 0, 2, 4 and 6: deviations 0, √2, 2√2, 3√2."""
    members = Members(torch.zeros(2, 4), None, torch.zeros(2), 2.0)
    pairs = [Pair(f"p{i}", "yes", "no", "g") for i in range(4)]
    chosen = torch.tensor([[1.0, 1.0], [1.0, 3.0], [3.0, -1.0], [-1.0, 5.0]])
    report, rows = members_report(members, chosen, torch.zeros(4, 2), pairs, ["a", "b", "c", "c"])
    # The first is right in three, the second in three; their means 1, 2, 1, 2 are right in all.
    assert report["accuracies"] == [0.75, 0.75]
    expected = share_of([1, 1, 1, 1], ["a", "b", "c", "c"])
    assert (report["accuracy"], report["accuracy_low"]) == (1, expected.low)
    assert (report["heads"], report["n"], report["prompts"]) == (2, 4, 3)
    assert report["disagreement_mean"] == pytest.approx(6 * math.sqrt(2) / 4 / 2)
    assert [row["prompt"] for row in rows] == ["p3", "p2", "p1", "p0"]
    assert rows[0] == {
        "prompt": "p3", "group": "g", "chosen": "yes", "rejected": "no", "margin": -1.0,
        "disagreement": pytest.approx(3 * math.sqrt(2) / 2), "right": 0.0,
    }  # fmt: skip
    assert report["examples"] == rows
    # Too few pairs for parts.
    assert [part["n"] for part in report["by_disagreement"]] == [4]


def test_quarters_by_disagreement():
    right = np.array([1.0] * 30 + [0.0] * 10)
    spread = np.arange(40.0)
    parts = by_disagreement(spread, right, [str(i) for i in range(40)])
    assert [part["n"] for part in parts] == [10] * 4
    assert [part["accuracy"] for part in parts] == [1, 1, 1, 0]
    assert (parts[0]["low"], parts[-1]["high"]) == (0, 39)
    assert parts[3]["accuracy_high"] == share_of([0.0] * 10).high
    # Of 41 the quantiles are 10, 20 and 30, and an edge belongs to the upper part.
    odd = by_disagreement(np.arange(41.0), np.ones(41), [str(i) for i in range(41)])
    assert [part["n"] for part in odd] == [10, 10, 10, 11]
    # Equal ones share a part: 30 of 40 are 0, and no quantile between them divides them.
    few = by_disagreement(np.maximum(spread - 29, 0), right, [str(i) for i in range(40)])
    assert [part["n"] for part in few] == [30, 10]
    assert [part["n"] for part in by_disagreement(0 * spread, right, [*map(str, spread)])] == [40]


@pytest.fixture(scope="module")
def evaluated(ensemble, data, tmp_path_factory):
    """Evaluation of the reward model with members: metrics and folder."""
    out = tmp_path_factory.mktemp("evaluated")
    result = evaluate_reward_model(
        EvaluationConfig(), DataConfig(), data, ensemble, out, limits=48, runtime=toys.RUNTIME
    )
    return result.metrics, out


def test_the_reward_models_evaluation(evaluated, ensemble, reward_model, data, tmp_path):
    metrics, out = evaluated
    written = read_json(out / "evaluation.json")
    part = written["members"]
    assert (part["heads"], part["n"], len(part["accuracies"])) == (COUNT, 24, COUNT)
    assert part["accuracies"][0] == written["accuracy"]
    assert sum(row["n"] for row in part["by_disagreement"]) == 24
    assert metrics["members.disagreement_mean"] == part["disagreement_mean"] > 0
    assert metrics["members.accuracy_low"] == part["accuracy_low"]
    rows = read_json(out / DISAGREEMENT)
    assert len(rows) == 24
    assert [r["disagreement"] for r in rows] == sorted(r["disagreement"] for r in rows)[::-1]
    scorer, row = open_scorer(ensemble, CPU, 48), rows[0]
    chosen, rejected = (
        scorer.of_members([row["prompt"]], [row[side]]) for side in ("chosen", "rejected")
    )
    margins = (chosen - rejected)[0]
    assert row["margin"] == pytest.approx(float(margins[0]), abs=1e-5)
    spread = float(margins.std()) / reward_meta(ensemble)["score_std"]
    assert row["disagreement"] == pytest.approx(spread, abs=1e-5)
    # Nothing else differs from the evaluation of the single head.
    evaluate_reward_model(
        EvaluationConfig(), DataConfig(), data, reward_model, tmp_path, limits=48,
        runtime=toys.RUNTIME,
    )  # fmt: skip
    plain = read_json(tmp_path / "evaluation.json")
    assert {k: v for k, v in written.items() if k != "members"} == plain
    assert not (tmp_path / DISAGREEMENT).exists()


def test_rules_may_use_the_metrics_that_are_written_and_no_others(evaluated):
    written = read_json(evaluated[1] / "evaluation.json")
    names = {n for n in dict(flat_metrics(written)) if n.startswith("members.")}
    assert {name for name in names if part_of(name, "reward_model") is None} == set()
    known = {n for n in certain_names("reward_model", set()) if n.startswith("members.")}
    assert known - names == set()
    assert json.dumps(written, allow_nan=False)


def test_the_policys_evaluation(ensemble, reward_model, sft, data, copy_of, tmp_path):
    """Beside a policy that says something else."""
    model, generator = load_policy(sft), torch.Generator().manual_seed(0)
    for weight in model.parameters():
        weight.data += 0.3 * torch.randn(weight.shape, generator=generator)
    damaged = copy_of(sft)
    model.save_pretrained(damaged)
    results, samples = {}, {}
    for name, folder in (("with", ensemble), ("without", reward_model)):
        out = tmp_path / name
        out.mkdir()
        evaluate_policy(
            toys.changed(EvaluationConfig(), prompts=8), toys.PPO, data, sft, damaged, folder, out,
            champion=sft, champion_digest="sha256:c", runtime=toys.RUNTIME,
        )  # fmt: skip
        results[name] = read_json(out / "evaluation.json")
        samples[name] = read_json(out / "samples.json")
    sampled, greedy = results["with"]["sampled"], results["with"]["greedy"]
    difference = sampled["disagreement_after"] - sampled["disagreement_before"]
    assert difference == pytest.approx(sampled["disagreement_difference"])
    assert sampled["disagreement_before"] > 0.01
    for part in (greedy, results["with"]["champion"], sampled["by_group"]["tea"]):
        assert part["disagreement_after"] > 0
    own = results["with"]["champion"]["own"]["disagreement"]
    assert own == results["with"]["champion"]["disagreement_before"]
    scorer, sample = open_scorer(ensemble, CPU, 48), samples["with"][0]
    table = scorer.of_members([sample["prompt"]], [sample["after"]])
    expected = float(scorer.members.disagreement(table))
    assert sample["disagreement"] == pytest.approx(expected, rel=1e-3)
    # Both ways: what is known is written, and what is written is known.
    names = {n for n in dict(flat_metrics(results["with"])) if "disagreement" in n}
    assert {n for n in names if part_of(n, "policy") is None} == set()
    known = {n for n in certain_names("policy", {"gold"}) if "disagreement" in n}
    assert known - names == set()
    # Without members nothing else is written, and nothing of it.
    assert not [n for n in dict(flat_metrics(results["without"])) if "disagreement" in n]
    assert "disagreement" not in samples["without"][0]
    for row in samples["with"]:
        for one in (row, *row["more"]):
            del one["disagreement"]
    assert samples["with"] == samples["without"]


def test_a_policy_is_trained_by_the_first_member(ensemble, reward_model, train):
    """PPO reads the classifier alone."""
    one = train("one", reward=toys.approve(ensemble), total_episodes=16)
    two = train("two", reward=toys.approve(reward_model), total_episodes=16)
    toys.assert_same_weights(one, two)
    assert load_policy(one)
