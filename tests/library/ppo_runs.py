"""Helpers for the tests of PPO: options of a run, comparison of two runs."""

from __future__ import annotations

from pathlib import Path

from rlhf.config import LoraConfig
from tests.library import toys

LORA = LoraConfig(r=4, alpha=16.0)
#: Every option with a state that must be resumed, or with a schedule over the updates.
EVERYTHING = {
    "kl_controller": "adaptive", "kl_target": 0.01, "kl_horizon": 50, "lora": LORA,
    "reward_normalization": "running", "critic": "adapter", "lr_scheduler": "cosine",
    "lr_warmup_updates": 1, "critic_warmup_updates": 1, "target_kl": 0.05, "entropy_coef": 0.01,
    "kl_audit": True, "whiten_rewards": True, "compat": "trl", "multi_objective": True,
    "top_k": 60, "top_p": 0.9,
    "env_config": {
        "components": {
            "reward_model": {"normalize": "zscore"},
            "length": {"points": [[0, 0], [6, 1]], "normalize": "minmax", "weight": 0.1},
        }
    },
}  # fmt: skip


class Stopped(Exception):
    """Simulates the loss of the machine."""


def assert_same_run(a: Path, b: Path) -> None:
    toys.assert_same_weights(a, b)
    for name in ("curve.json", "samples.json"):
        assert (a / name).read_bytes() == (b / name).read_bytes()
