"""Bias of PPO's KL under truncated sampling, and the cost of replaying the kept sets.

`python -m benchmarks.truncation` trains flat toy policies (random weights, 300 tokens) with and
without replay, and compares the KL that PPO penalises with that of the distribution that replies
are drawn from. `--cost` times updates of a model with 32,000 tokens instead, CPU time, the two ways
in turn.
"""

from __future__ import annotations

import argparse
import statistics
import string
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from rlhf.config import ArchitectureConfig, PPOConfig
from rlhf.data.rendering import load_renderer
from rlhf.data.rows import PromptRow
from rlhf.environments import Reply, Scored
from rlhf.modeling.base import from_scratch
from rlhf.ppo.models import load_models
from rlhf.ppo.optimisation import optimise
from rlhf.ppo.trainer import PPOTrainer

CPU = torch.device("cpu")
FILTERS: tuple[dict[str, Any], ...] = (
    {"top_k": 50}, {"top_k": 10}, {"top_k": 0, "top_p": 0.9}, {"top_k": 0, "top_p": 0.5},
)  # fmt: skip
PROMPTS = [PromptRow(f"{a} {b}") for a in string.ascii_lowercase[:8] for b in "stuvwxyz"]
PHASES = ("rollout", "scoring", "optimisation")
REWARDED = set("aeiou")


class Vowels:
    """Environment whose score is ten times the share of vowels among a reply's characters."""

    replies_per_prompt = 1
    needs_reference_reply = False
    stop = None

    def __init__(self, renderer: Any) -> None:
        self.renderer = renderer

    def text(self, ids: Sequence[int]) -> str:
        """Return a reply's text."""
        return self.renderer.decode(list(ids))

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        pass

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score each reply."""
        shares = [sum(c in REWARDED for c in r.response) / max(1, len(r.response)) for r in batch]
        scores = 10 * torch.tensor(shares)
        return Scored(scores, {"vowels": scores}, {"vowels": scores})


def make_trainer(folder: Path, **options: Any) -> PPOTrainer:
    """Return a trainer of the toy policy in `folder`."""
    config = PPOConfig(**{"critic": "policy", "learning_rate": 5e-3, "kl_coef": 0.05, **options})
    placeholder = {"env_type": "multi_objective", "env_config": {"components": {"repetition": {}}}}
    built = PPOConfig(**{**config.model_dump(exclude_unset=True), **placeholder})
    models, _, renderer = load_models(built, folder, None, 0, CPU, PROMPTS)
    environment: Any = Vowels(renderer)
    return PPOTrainer(config, models, environment, load_renderer(folder), 0)


def write_toy(folder: Path, **architecture: int) -> None:
    """Write an untrained policy and its tokenizer."""
    text = [string.ascii_lowercase + " " + string.digits] * 4
    model, tokenizer = from_scratch(ArchitectureConfig(**architecture), text, seed=0)
    if (vocabulary := architecture["vocab_size"]) > len(tokenizer):
        model.resize_token_embeddings(vocabulary)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@torch.no_grad()
def measure(trainer: PPOTrainer, rows: Sequence[PromptRow]) -> dict[str, float]:
    """Compare the KLs of replies that the trained, truncated policy draws."""
    trainer.sampling = replace(trainer.sampling, record_kept=True)
    rollouts = trainer.sample(rows, seed=1)
    trainer.score(rollouts)
    result = {"reward": float(rollouts.scores.mean())}
    models, drawn = trainer.models, rollouts.replies
    for name, replies in (("replay", drawn), ("none", replace(drawn, kept=None))):
        ratios = models.log_probs(replies, False)[0] - models.reference_log_probs(replies)
        result[name] = float((ratios * replies.mask).sum(1).mean())
    audit = models.audit(drawn)
    result["exact"] = float(audit["kl_exact"].sum()) / len(rows)
    result["mass"], result["reference"] = (
        float(audit[name].mean()) for name in ("kept_mass", "kept_mass_reference")
    )
    whole = models.audit(replace(drawn, kept=None))["kl_exact"]
    result["whole"] = float(whole.sum()) / len(rows)
    return result


def bias(folder: Path, updates: int) -> None:
    """Print the table of biases."""
    write_toy(folder, hidden_size=32, layers=1, heads=2, intermediate_size=64, vocab_size=300,
              context=64)  # fmt: skip
    print("| sampling | trained with | reward | KL of what is drawn, exact | `replay` penalises | "
          "`none` penalises | KL over the whole vocabulary | mass of the kept set: policy, "
          "reference |\n|---|---|---|---|---|---|---|---|")  # fmt: skip
    for options in FILTERS:
        for truncation in ("replay", "none"):
            trainer = make_trainer(
                folder, **options, truncation=truncation, total_episodes=64 * updates,
                chunk_size=64, mini_batch_size=16, max_new_tokens=12,
            )  # fmt: skip
            for number in range(updates):
                trainer.update(number, PROMPTS)
            m = measure(trainer, PROMPTS * 16)
            name = ", ".join(f"{k} {v}" for k, v in options.items() if v)
            print(
                f"| {name} | {truncation} | {m['reward']:.2f} | {m['exact']:.3f} | "
                f"{m['replay']:.3f} | {m['none']:.3f} | {m['whole']:.3f} | {m['mass']:.2f}, "
                f"{m['reference']:.2f} |",
                flush=True,
            )


def cost(folder: Path, rounds: int) -> None:
    """Print the CPU time of each phase of an update, and the bytes of the kept sets."""
    write_toy(folder, hidden_size=256, layers=4, heads=4, intermediate_size=1024,
              vocab_size=32_000, context=128)  # fmt: skip
    print("| sampling | phase | none, s | replay, s | ratio | bytes a token |")
    print("|---|---|---|---|---|---|")
    for options in ({"top_k": 50}, {"top_k": 0, "top_p": 0.9}):
        shared = {
            **options, "total_episodes": 3200, "chunk_size": 32, "mini_batch_size": 16,
            "num_ppo_epochs": 2, "max_new_tokens": 48, "learning_rate": 1e-6,
        }  # fmt: skip
        ways = {t: make_trainer(folder, truncation=t, **shared) for t in ("none", "replay")}
        times: dict[tuple[str, str], list[float]] = {}
        size = 0.0
        for number in range(rounds + 1):
            for way, trainer in ways.items():
                clock = [time.process_time()]
                rollouts = trainer.sample(PROMPTS[:32], seed=number)
                clock.append(time.process_time())
                trainer.score(rollouts)
                buffer, _, _ = trainer.prepare_buffer(rollouts)
                clock.append(time.process_time())
                trainer.models.set_learning_rates(0)
                optimise(buffer, trainer.models, number)
                clock.append(time.process_time())
                if rollouts.replies.kept is not None:
                    tokens = int(rollouts.replies.mask.sum())
                    size = 4 * len(rollouts.replies.kept.words) / tokens
                if number > 0:  # the first round compiles kernels
                    for phase, (a, b) in zip(PHASES, pairwise(clock), strict=True):
                        times.setdefault((phase, way), []).append(b - a)
                    times.setdefault(("total", way), []).append(clock[-1] - clock[0])
        name = ", ".join(f"{k} {v}" for k, v in options.items() if v)
        for phase in (*PHASES, "total"):
            none, replay = (statistics.median(times[phase, way]) for way in ("none", "replay"))
            print(f"| {name} | {phase} | {none:.2f} | {replay:.2f} | {replay / none:.2f} | "
                  f"{size:.0f} |", flush=True)  # fmt: skip


def main() -> None:
    """Run the chosen measurement."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--updates", type=int, default=30)
    parser.add_argument("--cost", action="store_true")
    parser.add_argument("--rounds", type=int, default=5)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        if arguments.cost:
            cost(Path(folder), arguments.rounds)
        else:
            bias(Path(folder), arguments.updates)


if __name__ == "__main__":
    main()
