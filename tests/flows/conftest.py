"""A pipeline small enough to run in seconds, and Prefect's API for the whole session."""

from __future__ import annotations

import pytest
from prefect.testing.utilities import prefect_test_harness

from rlhf.config import PipelineConfig


@pytest.fixture(scope="session", autouse=True)
def prefect_api():
    with prefect_test_harness(server_startup_timeout=120):
        yield


def tiny_tree(folder) -> dict:
    """Every stage for real, on a world of a few rows and a model of a few thousand weights."""
    return {
        "name": "tiny",
        "store": str(folder / "store"),
        "data": {
            "world": {
                "pairs": 64, "demonstrations": 64, "prompts": 32, "eval_pairs": 30,
                "eval_prompts": 12,
            }
        },
        "base": {
            "architecture": {
                "hidden_size": 16, "layers": 1, "heads": 2, "intermediate_size": 32,
                "vocab_size": 320, "context": 160,
            }
        },
        "sft": {"batch_size": 32, "max_length": 128},
        "reward_model": {"batch_size": 32, "max_length": 128, "pooling": "sum"},
        "ppo": {
            "total_episodes": 32, "chunk_size": 8, "mini_batch_size": 8, "num_ppo_epochs": 1,
            "max_new_tokens": 8, "checkpoint_every": 1,
        },
        "gates": {
            "reward_model": [{"metric": "accuracy", "min": 0.0}],
            "policy": [{"metric": "sampled.kl", "max": 1000.0}],
        },
        "evaluation": {"judge": "world", "samples": 2},
        "retries": {"attempts": 2, "delay_seconds": 0.0},
        "runtime": {"work_dir": str(folder / "work"), "report_dir": str(folder / "reports")},
        "tracking": {"log_dir": str(folder / "logs")},
    }  # fmt: skip


@pytest.fixture
def tiny(tmp_path):
    """A function that makes the tiny configuration, with dotted changes."""

    def make(**changes) -> PipelineConfig:
        tree = tiny_tree(tmp_path)
        for key, value in changes.items():
            *path, last = key.split("__")
            node = tree
            for part in path:
                node = node.setdefault(part, {})
            node[last] = value
        return PipelineConfig.model_validate(tree)

    return make
