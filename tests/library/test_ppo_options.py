"""Every parameter of PPO arrives where it acts."""

from __future__ import annotations

import pytest
import torch

from rlhf.stage import read_json
from tests.library import toys
from tests.library.ppo_runs import LORA

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    "change",
    [
        {"kl_coef": 1.0},
        {"clip_range": 0.01},
        {"value_clip_range": 0.01},
        {"value_clip_range": None},
        {"gamma": 0.5},
        {"gae_lambda": 0.1},
        {"value_loss_coef": 0.0},
        {"max_new_tokens": 4},
        {"top_k": 2},
        {"top_p": 0.5},
        {"temperature": 0.5},
        {"missing_eos_penalty": 9.0},
        {"missing_eos_penalty": None},
        {"whiten_rewards": True},
        {"lr_final_fraction": 1.0},
        {"learning_rate": 1e-3},
        {"critic_learning_rate": 1e-5},
        {"critic": "policy"},
        {"num_ppo_epochs": 1},
        {"mini_batch_size": 4},
        {"chunk_size": 8},
        {"adam_beta2": 0.5},
        {"max_grad_norm": 1e-3},
        {"lora": LORA},
        {"seed": 1},
    ],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items())[:30],
)
def test_every_parameter_arrives(train, two_updates, change):
    assert toys.distance(train(total_episodes=32, **change), two_updates) > 1e-4


@pytest.mark.parametrize("micro", [3, 1])
def test_micro_batches_change_nothing(train, two_updates, micro):
    assert toys.distance(train(total_episodes=32, micro_batch_size=micro), two_updates) < 1e-4


def test_whitening_leaves_a_single_score_alone(train):
    # 17 episodes: the last chunk holds one, whose deviation is not a number
    out = train(total_episodes=17, whiten_rewards=True)
    assert len(read_json(out / "curve.json")) == 2
