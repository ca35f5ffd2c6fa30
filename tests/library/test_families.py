"""Architectures of others go through every stage."""

from __future__ import annotations

import pytest
import torch
from transformers import BloomConfig, BloomForCausalLM, GPT2Config, GPT2LMHeadModel

from rlhf.config import BaseModelConfig, EvaluationConfig
from rlhf.evaluate import evaluate_policy
from rlhf.modeling.base import UNBOUNDED, context_of, load_policy, load_tokenizer
from rlhf.ppo.train import train_policy
from rlhf.reward import train_reward_model
from rlhf.sft import train_sft
from tests.library import toys

FAMILIES = {
    # Relative positions: no bound on what it can read.
    "bloom": lambda n: BloomForCausalLM(
        BloomConfig(vocab_size=n, hidden_size=16, n_layer=1, n_head=2)
    ),
    "gpt2": lambda n: GPT2LMHeadModel(
        GPT2Config(vocab_size=n, n_embd=16, n_layer=1, n_head=2, n_positions=64)
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_stage(family, fresh, data, tmp_path):
    tokenizer = load_tokenizer(fresh)
    torch.manual_seed(0)
    model = FAMILIES[family](len(tokenizer))
    model.save_pretrained(tmp_path / "base")
    tokenizer.save_pretrained(tmp_path / "base")
    assert context_of(model) == {"bloom": UNBOUNDED, "gpt2": 64}[family]
    folders = {n: tmp_path / n for n in ("sft", "reward", "policy", "evaluation")}
    for folder in folders.values():
        folder.mkdir()
    sft, reward, policy, evaluation = folders.values()
    base = BaseModelConfig(path=str(tmp_path / "base"))
    train_sft(toys.SFT, base, data, sft, runtime=toys.RUNTIME)
    train_reward_model(toys.REWARD, data, sft, reward, runtime=toys.RUNTIME)
    approved = toys.approve(reward)
    train_policy(toys.PPO, data, sft, approved, policy, runtime=toys.RUNTIME)
    assert type(load_policy(policy)) is type(model)
    config = EvaluationConfig(prompts=8)
    found = evaluate_policy(
        config, toys.PPO, data, sft, policy, reward, evaluation, runtime=toys.RUNTIME
    )
    assert found.metrics["sampled.reward_after"] > found.metrics["sampled.reward_before"] + 0.1
