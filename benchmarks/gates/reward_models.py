"""Reward models that have learnt the wrong thing, and whether the shipped gate stops them.

All are trained by the product on changed pairs and judged on the unchanged held-out ones:

- `random`: half of the labels are swapped, so that there is nothing to learn;
- `flipped`: all labels are swapped;
- `length`: the longer reply is the preferred one;
- `prompt-blind`: each pair stands below another pair's prompt, so that prompts say nothing;
- `healthy`: the pairs as they are, which the gate has to approve.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from random import Random
from typing import Any

from benchmarks.gates.pool import make_once
from rlhf.config import PipelineConfig
from rlhf.data.rows import PAIRS_TRAIN, Pair, read_rows, write_rows
from rlhf.evaluation.common import EVALUATION
from rlhf.files import read_json
from rlhf.gates import judge

#: Pairs that each is trained on.
PAIRS = 12_000


def swap(pair: Pair) -> Pair:
    """Return a pair with the other preference."""
    return replace(pair, chosen=pair.rejected, rejected=pair.chosen)


def _random(pairs: list[Pair]) -> list[Pair]:
    rng = Random(0)
    return [swap(pair) if rng.random() < 0.5 else pair for pair in pairs]


def _longer(pairs: list[Pair]) -> list[Pair]:
    differ = [pair for pair in pairs if len(pair.chosen) != len(pair.rejected)]
    return [swap(pair) if len(pair.chosen) < len(pair.rejected) else pair for pair in differ]


def _blind(pairs: list[Pair]) -> list[Pair]:
    prompts = [pair.prompt for pair in pairs]
    Random(0).shuffle(prompts)
    return [replace(pair, prompt=prompt) for pair, prompt in zip(pairs, prompts, strict=True)]


KINDS: dict[str, Callable[[list[Pair]], list[Pair]]] = {
    "healthy": lambda pairs: pairs,
    "random": _random,
    "flipped": lambda pairs: [swap(pair) for pair in pairs],
    "length": _longer,
    "prompt-blind": _blind,
}


def table(config: PipelineConfig, work: Path) -> list[dict[str, Any]]:
    """Train, evaluate and judge all kinds; `work` is the pool's folder."""
    return [_row(name, change, config, work) for name, change in KINDS.items()]


def _row(
    name: str, change: Callable[[list[Pair]], list[Pair]], config: PipelineConfig, work: Path
) -> dict[str, Any]:
    from rlhf.evaluation import evaluate_reward_model
    from rlhf.reward import train_reward_model

    data, model = work / f"{name}-data", work / f"{name}-model"
    evaluation = work / f"{name}-evaluation"
    limit, runtime = config.reward_model.max_length, config.runtime

    def write(out: Path) -> None:
        shutil.copytree(work / "data", out, dirs_exist_ok=True)
        write_rows(out / PAIRS_TRAIN, change(read_rows(out / PAIRS_TRAIN, Pair)[:PAIRS]))

    make_once(data, write)
    make_once(
        model,
        lambda out: train_reward_model(
            config.reward_model, data, work / "sft", out, seed=config.seed, runtime=runtime
        ),
    )
    make_once(
        evaluation,
        lambda out: evaluate_reward_model(
            config.evaluation, config.data, data, model, out, limits=limit, runtime=runtime
        ),
    )
    metrics = read_json(evaluation / EVALUATION)
    verdict = judge("gate-reward-model", name, metrics, config.gates.reward_model)
    return {
        "reward_model": name, "approved": verdict.approved, "reason": verdict.reason,
        "checks": [asdict(check) for check in verdict.checks],
        "probes": {k: v["rises"] for k, v in metrics.get("probes", {}).items()},
    }  # fmt: skip
