"""A toy task for one thread and one second: good replies say "good", bad ones "bad"."""

from __future__ import annotations

import itertools
import os
import random
from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor

from rlhf.config import (
    ArchitectureConfig,
    BaseModelConfig,
    GateRule,
    PPOConfig,
    RewardModelConfig,
    RuntimeConfig,
    SFTConfig,
)
from rlhf.data.rows import (
    DEMONSTRATIONS,
    PAIRS_EVAL,
    PAIRS_TRAIN,
    PROMPTS_EVAL,
    PROMPTS_TRAIN,
    Demonstration,
    Pair,
    PromptRow,
    write_rows,
)
from rlhf.gates import Approved, judge, require

#: Device and threads of the tests of models and PPO.
DEVICE = torch.device(os.environ.get("RLHF_DEVICE") or "cpu")
RUNTIME = RuntimeConfig(device=DEVICE.type, threads=1)
ARCHITECTURE = ArchitectureConfig(
    hidden_size=16, layers=1, heads=2, intermediate_size=32, vocab_size=300, context=64
)
BASE = BaseModelConfig(architecture=ARCHITECTURE)
SFT = SFTConfig(epochs=3, batch_size=16, learning_rate=2e-2, max_length=48)
REWARD = RewardModelConfig(
    epochs=2, batch_size=16, learning_rate=2e-2, max_length=48, pooling="sum"
)
PPO = PPOConfig(
    total_episodes=64,
    chunk_size=16,
    mini_batch_size=8,
    num_ppo_epochs=2,
    learning_rate=5e-3,
    kl_coef=0.05,
    max_new_tokens=6,
    top_k=0,
    checkpoint_every=1,
    watchdog=None,  # its own tests switch it on
)
ASKED = ["tea", "cup", "jar", "pot", "mug"]


def replies(rng: random.Random) -> tuple[str, str]:
    """Return a good and a bad reply of the same length."""
    n = rng.randint(1, 2)
    return " ".join(["good"] * n), " ".join(["bad"] * n)


def write_data(folder: Path, pairs: int = 96, seed: int = 0) -> Path:
    """Write a dataset folder as `prepare_data` does, and return it."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    prompts = [f"{a} or {b}?" for a, b in itertools.permutations(ASKED, 2)]
    demonstrations, train, held_out = [], [], []
    for _ in range(pairs):
        prompt = rng.choice(prompts)
        good, bad = replies(rng)
        demonstrations.append(Demonstration(prompt, rng.choice([good, bad])))
        train.append(Pair(prompt, good, bad))
    for i in range(24):
        held_out.append(Pair(rng.choice(prompts), *replies(rng), group="even" if i % 2 else "odd"))
    write_rows(folder / DEMONSTRATIONS, demonstrations)
    write_rows(folder / PAIRS_TRAIN, train)
    write_rows(folder / PAIRS_EVAL, held_out)
    write_rows(folder / PROMPTS_TRAIN, [PromptRow(p) for p in prompts])
    write_rows(
        folder / PROMPTS_EVAL,
        [PromptRow(f"{p} why", "tea" if "tea" in p else None) for p in prompts],
    )
    return folder


def weights(folder: Path) -> dict[str, Tensor]:
    """Return all weights of a saved model."""
    return load_file(folder / "model.safetensors")


def changed(config: object, **values: object) -> object:
    """Return a copy of a section with other values."""
    return type(config)(**{**config.model_dump(), **values})


def within(cpu: float, elsewhere: float) -> float:
    """Return the tolerance on this device; the order of float32 sums differs by device."""
    return cpu if DEVICE.type == "cpu" else elsewhere


def approve(reward_model: Path) -> Approved[Path]:
    """Approve a reward model by a gate without rules."""
    verdict = judge("toy", "digest", {"accuracy": 1.0}, [GateRule(metric="accuracy", min=0.5)])
    return require(reward_model, "digest", verdict)


def assert_same_weights(a: Path, b: Path) -> None:
    """Check that two models' weights are bit-equal, name by name."""
    first, second = weights(a), weights(b)
    assert first.keys() == second.keys()
    assert [k for k in first if not torch.equal(first[k], second[k])] == []


def distance(a: Path, b: Path) -> float:
    """Return the largest difference between two models' weights."""
    first, second = weights(a), weights(b)
    return max(float((first[k] - second[k]).abs().max()) for k in first)
