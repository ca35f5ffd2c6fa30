"""The scale of rewards: scores of chosen replies, measured in training and used by PPO."""

from __future__ import annotations

import shutil

import pytest
import torch
from pydantic import ValidationError

from rlhf.config import PipelineConfig, PPOConfig
from rlhf.data.rows import PAIRS_TRAIN, Pair, read_rows, write_rows
from rlhf.errors import ConfigError
from rlhf.files import read_json, write_json
from rlhf.modeling.reward import META, Scorer
from rlhf.ppo.train import build_trainer, train_policy
from rlhf.reward import REFERENCE_REPLIES, train_reward_model
from tests.library import toys
from tests.library.toys import DEVICE, within

pytestmark = pytest.mark.device


def test_training_measures_the_scores_of_chosen_replies(data, reward_model):
    pairs = read_rows(data / PAIRS_TRAIN, Pair)
    assert len(pairs) < REFERENCE_REPLIES  # so that all of them count
    scorer = Scorer(reward_model, DEVICE, toys.REWARD.max_length)
    scores = scorer([p.prompt for p in pairs], [p.chosen for p in pairs])
    meta = read_json(reward_model / META)
    assert meta["score_mean"] == pytest.approx(scores.mean().item(), abs=within(1e-5, 1e-3))
    assert meta["score_std"] == pytest.approx(scores.std().item(), abs=within(1e-5, 1e-3))
    assert scores.mean() > scorer([p.prompt for p in pairs], [p.rejected for p in pairs]).mean() + 2


def test_of_many_replies_a_sample_is_scored(data, sft, tmp_path, monkeypatch):
    """Of three replies of two lengths another seed may take others, equal seeds the same."""
    monkeypatch.setattr("rlhf.reward.REFERENCE_REPLIES", 3)

    def scale(name, seed):
        out = tmp_path / name
        out.mkdir()
        # The rate is too small to change weights, so that seeds differ by their replies alone.
        config = toys.changed(toys.REWARD, epochs=1, learning_rate=1e-30)
        train_reward_model(config, data, sft, out, seed=seed, runtime=toys.RUNTIME)
        return read_json(out / META)["score_mean"]

    assert scale("a", 0) == scale("b", 0)
    assert scale("a2", 0) != scale("c", 1)


def test_prompts_that_are_too_long_are_no_reference(data, sft, tmp_path):
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    pairs = read_rows(folder / PAIRS_TRAIN, Pair)
    long = Pair("so long " * 50, "good", "bad")
    write_rows(folder / PAIRS_TRAIN, [*pairs, long])
    out = tmp_path / "out"
    out.mkdir()
    result = train_reward_model(toys.REWARD, folder, sft, out, runtime=toys.RUNTIME)
    assert result.metrics["prompts_too_long"] == 1
    assert read_json(out / META)["score_std"] > 0


def trainer_with(sft, approved, **options):
    return build_trainer(toys.changed(toys.PPO, **options), sft, approved, 0, DEVICE)


def test_rewards_are_in_units_of_the_reference(sft, approved, reward_model):
    from tests.library.test_ppo_options import rollouts_of

    meta = read_json(reward_model / META)
    options = {"kl_coef": 0.0, "gamma": 1.0, "gae_lambda": 1.0, "critic": "head"}
    plain = trainer_with(sft, approved, **options)
    scaled = trainer_with(sft, approved, reward_normalization="reference", **options)
    rollouts = rollouts_of(plain)
    metrics = []
    returns = []
    for trainer in (plain, scaled):
        buffer, found, _ = trainer.prepare_buffer(rollouts)
        returns.append(buffer.returns[:, 0])
        metrics.append(found["reward"])
    # With γ = λ = 1 the return of the first state is the reply's reward.
    expected = (returns[0] - meta["score_mean"]) / meta["score_std"]
    assert torch.allclose(returns[1], expected, atol=1e-4)
    assert not torch.allclose(returns[0], returns[1], atol=1e-2)
    # What is shown stays in the model's own units.
    assert metrics[0] == metrics[1]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"score_mean": None}, "has no scores of reference replies; train it again"),
        ({"score_std": 0.0}, "has one score for all replies; train it again"),
    ],
)
def test_a_reward_model_without_scale(change, reason, data, sft, reward_model, tmp_path):
    folder = tmp_path / "reward"
    shutil.copytree(reward_model, folder)
    meta = {**read_json(folder / META), **change}
    write_json(folder / META, {k: v for k, v in meta.items() if v is not None})
    config = toys.changed(toys.PPO, reward_normalization="reference")
    with pytest.raises(ConfigError, match=rf"^ppo.reward_normalization = 'reference', .* {reason}"):
        train_policy(
            config, data, sft, toys.approve(folder), tmp_path / "out", runtime=toys.RUNTIME
        )


@pytest.mark.parametrize(
    "options",
    [
        {"reward_fn": "length_penalty"},
        {"env_type": "preference_comparison"},
        {
            "env_type": "multi_objective",
            "env_config": {"components": {"reward_model": {"weight": 1.0}, "length": {}}},
        },
    ],
    ids=str,
)
def test_a_reward_that_is_not_the_models_alone(options):
    PPOConfig.model_validate({"reward_normalization": "running", **options})
    with pytest.raises(ValidationError, match="reward is not such a score alone; set it to runn"):
        PPOConfig.model_validate({"reward_normalization": "reference", **options})


def test_a_ready_reward_model_is_refused():
    ppo = {"reward_normalization": "reference", "reward_model_path": "owner/model"}
    with pytest.raises(ValidationError, match=r"is not trained here; set ppo.reward_normalization"):
        PipelineConfig.model_validate({"ppo": ppo})
