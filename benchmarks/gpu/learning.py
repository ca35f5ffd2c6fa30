"""Sections: the quickstart's PPO stage on the device, judged by the gold score.

Data, SFT policy and reward model were made on a CPU and carried here (`benchmarks.gpu.pack`).
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from benchmarks.gpu import quickstart
from benchmarks.gpu.section import Context, Results, SectionFailedError
from rlhf.evaluation import EVALUATION, evaluate_policy, evaluate_reward_model
from rlhf.files import read_json
from rlhf.ppo.train import train_policy

#: Seeds 0, 1 and 2 on a CPU, as benchmarks/RESULTS.md has them.
CPU_SEEDS = {
    "gold_strict_win_rate_sampled": (0.950, 0.903, 0.873),
    "gold_strict_win_rate_greedy": (0.943, 0.993, 0.917),
    "kl_sampled": (5.06, 3.97, 4.03),
}
#: The quickstart's bars: the least acceptable value, for the KL the greatest.
BARS = {
    "gold_strict_win_rate_sampled": 0.80, "gold_strict_win_rate_greedy": 0.90, "kl_sampled": 8.0,
}  # fmt: skip


def learning(context: Context, results: Results) -> None:
    """Train in float32, the quickstart's precision."""
    _learn(context, results, "fp32")


def learning_bf16(context: Context, results: Results) -> None:
    """Train in bfloat16."""
    _learn(context, results, "bf16")


def _learn(context: Context, results: Results, precision: str) -> None:
    """Train and evaluate the quickstart's policy.

    Raises:
        SectionFailedError: A bar of the quickstart is missed.
    """
    config = quickstart.configuration(context.tiny)
    ppo = config.ppo.model_copy(update={"precision": precision})
    data, sft, reward = (quickstart.folder(context, n) for n in ("data", "sft", "reward-model"))
    policy, judged, evaluated = (Path(context.scratch) / n for n in ("policy", "judged", "out"))
    for path in (policy, judged, evaluated):
        path.mkdir()
    started = time.perf_counter()
    evaluate_reward_model(
        config.evaluation, config.data, data, reward, judged,
        limits=config.reward_model.max_length, runtime=context.runtime,
    )  # fmt: skip
    metrics: dict[str, Any] = read_json(judged / EVALUATION)
    results.put(
        precision=precision,
        reward_model_accuracy=metrics["accuracy"],
        seconds_reward_model_evaluation=time.perf_counter() - started,
    )
    rules = () if context.tiny else config.gates.reward_model or ()
    approval = quickstart.approved(reward, metrics, rules)
    started = time.perf_counter()
    train_policy(ppo, data, sft, approval, policy, seed=0, runtime=context.runtime)
    results.put(updates=ppo.updates, seconds_training=time.perf_counter() - started)
    started = time.perf_counter()
    evaluate_policy(
        config.evaluation, ppo, data, sft, policy, reward, evaluated, seed=0,
        runtime=context.runtime,
    )  # fmt: skip
    results.put(seconds_evaluation=time.perf_counter() - started)
    outcome = _outcome(read_json(evaluated / EVALUATION))
    met = {name: _meets(name, outcome[name], bar) for name, bar in BARS.items()}
    results.put(
        **outcome, cpu_seeds={k: list(v) for k, v in CPU_SEEDS.items()}, bars=BARS, bars_met=met,
    )  # fmt: skip
    missed = [name for name in BARS if not met[name]]
    if missed and not context.tiny:
        raise SectionFailedError(
            "the quickstart's bars are missed: "
            + ", ".join(f"{name} {outcome[name]:.3f} (bar {BARS[name]})" for name in missed)
        )


def _meets(name: str, value: float, bar: float) -> bool:
    return value <= bar if name.startswith("kl") else value >= bar


def _outcome(evaluation: dict[str, Any]) -> dict[str, Any]:
    sampled, greedy = evaluation["sampled"], evaluation["greedy"]
    measures = {
        "gold_strict_win_rate_sampled": sampled["gold_strict_win_rate"],
        "gold_strict_win_rate_greedy": greedy["gold_strict_win_rate"],
        "kl_sampled": sampled["kl"],
    }
    within = {
        f"{name}_within_cpu_seeds": min(CPU_SEEDS[name]) <= value <= max(CPU_SEEDS[name])
        for name, value in measures.items()
    }
    return {
        **measures, **within, "gold_before": sampled["gold_before"],
        "gold_after": sampled["gold_after"], "eos_rate": sampled["eos_rate"],
    }  # fmt: skip
