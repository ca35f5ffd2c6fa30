"""Every stage with architectures other than the project's own."""

from __future__ import annotations

import pytest

from rlhf.config import EvaluationConfig
from rlhf.evaluate import evaluate_policy
from rlhf.modeling.base import UNBOUNDED, context_length, load_policy
from rlhf.ppo.train import train_policy
from tests.library import toys
from tests.library.toy_models import FAMILIES

pytestmark = pytest.mark.device


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage(family, toy, data, tmp_path):
    model = load_policy(toy(f"{family}-base"))
    assert context_length(model) == {"bloom": UNBOUNDED, "gpt2": 64}[family]
    sft, reward = toy(f"{family}-sft"), toy(f"{family}-reward")
    policy, evaluation = tmp_path / "policy", tmp_path / "evaluation"
    for folder in (policy, evaluation):
        folder.mkdir()
    approved = toys.approve(reward)
    train_policy(toys.PPO, data, sft, approved, policy, runtime=toys.RUNTIME)
    assert type(load_policy(policy)) is type(model)
    config = EvaluationConfig(prompts=8)
    found = evaluate_policy(
        config, toys.PPO, data, sft, policy, reward, evaluation, runtime=toys.RUNTIME
    )
    assert found.metrics["sampled.reward_after"] > found.metrics["sampled.reward_before"] + 0.1
