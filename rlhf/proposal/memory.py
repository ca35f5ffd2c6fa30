"""Batch sizes that fit into memory, by the estimate of `rlhf preflight`."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rlhf.config import PipelineConfig
from rlhf.estimate import Estimate, Measurement, cures, estimate
from rlhf.proposal.choice import Choice, replaced
from rlhf.proposal.facts import Machine

#: Share of the free memory that is planned for: estimates were within 18 % of what was measured.
PLANNED = 0.8
#: Fewest training pairs for which all weights are trained. On small data sets adapters learn as
#: much (Schulman et al. 2025, "LoRA Without Regret"), and forget less of the base.
FULL_PAIRS = 5_000
_ADAPTER = {"r": 16, "alpha": 32.0}
_SECTIONS = ("sft", "reward_model", "ppo")


@dataclass(frozen=True)
class Fit:
    """Settings with which every stage fits, and their estimates."""

    changes: Mapping[str, Mapping[str, Any]]
    """Values by section that differ from those given."""
    stages: tuple[Estimate, ...]
    misfits: tuple[str, ...]
    """Stages that fit by no setting, each with what else to change."""

    @property
    def peak(self) -> float:
        """Largest peak of a stage, in bytes."""
        return max(stage.peak for stage in self.stages)


def adapters(four_bits: bool) -> dict[str, dict[str, Any]]:
    """Return the values by section of LoRA on one base that all models share."""
    own: dict[str, Any] = {"lora": _ADAPTER}
    if four_bits:
        own["frozen_dtype"] = "nf4"
    return {"sft": own, "reward_model": own, "ppo": {**own, "shared_base": True}}


def choose_method(
    config: PipelineConfig, base: Path, measured: Measurement, machine: Machine, pairs: int
) -> tuple[dict[str, dict[str, Any]], str]:
    """Return the values that make a run train all weights or adapters, and why.

    Args:
        config: Configuration without adapters.
        base: Folder of the base.
        measured: That base at the configuration's length.
        machine: Where it will be trained.
        pairs: Number of pairs to train on.

    Raises:
        ValueError: The family's code does not run with fake tensors.
    """
    full = fit(config, base, measured, machine)
    need = f"all weights would take {full.peak / 1e9:.1f} GB of {machine.memory / 1e9:.1f}"
    if not machine.is_gpu:
        return adapters(False), f"on a CPU adapters on one base: less memory and time; {need}"
    if not full.misfits and pairs >= FULL_PAIRS:
        return {}, f"{pairs:,} pairs are enough to train all weights: {full.peak / 1e9:.1f} GB"
    if not full.misfits:
        return adapters(False), f"{pairs:,} pairs: adapters learn as much, and forget less"
    adapted = fit(_changed(config, adapters(False)), base, measured, machine)
    if adapted.misfits and importlib.util.find_spec("bitsandbytes") is not None:
        return adapters(True), f"adapters on a base in 4 bits; {need}"
    return adapters(False), f"adapters on one base in memory; {need}"


def fit(config: PipelineConfig, base: Path, measured: Measurement, machine: Machine) -> Fit:
    """Make batches smaller until every stage fits into the planned share of memory.

    Raises:
        ValueError: The family's code does not run with fake tensors.
    """
    budget = PLANNED * machine.memory
    changes: dict[str, dict[str, Any]] = {name: {} for name in _SECTIONS}
    while True:
        current = _changed(config, changes)
        stages = estimate(current, base, measured)
        large = [stage for stage in stages if stage.peak > budget]
        smaller = {s.section: values for s in large if (values := _smaller(current, s))}
        if not smaller:
            break
        for name, values in smaller.items():
            changes[name].update(values)
    misfits = tuple(f"{s.section} does not fit: {cures(current, s)}" for s in large)
    return Fit({k: v for k, v in changes.items() if v}, tuple(stages), misfits)


def with_memory(choices: Sequence[Choice], sized: Fit, machine: Machine) -> list[Choice]:
    """Return choices with the batch sizes that fit, and the estimate as their reason."""
    result, free = list(choices), f"{machine.memory / 1e9:.1f} GB free"
    for stage in sized.stages:
        name = stage.section
        old = next(c for c in choices if c.field == f"{name}.micro_batch_size")
        values = {"micro_batch_size": old.value, **sized.changes.get(name, {})}
        reason = f"rows of a forward pass; {stage.peak / 1e9:.1f} GB by the estimate, {free}"
        result = replaced(result, {name: {"micro_batch_size": values["micro_batch_size"]}}, reason)
        rest = {key: value for key, value in values.items() if key != "micro_batch_size"}
        result = replaced(result, {name: rest}, "so that the stage fits into memory")
    return result


def _smaller(config: PipelineConfig, stage: Estimate) -> dict[str, Any]:
    """Return what makes the largest changing part of a stage smaller; empty if nothing does."""
    section: Any = getattr(config, stage.section)
    micro = section.micro_batch_size or section.batch_size
    if stage.section == "ppo":
        rollout = section.rollout_batch_size or section.chunk_size
        if stage.cache > stage.activations and rollout > 8:
            return {"rollout_batch_size": max(8, rollout // 2)}
        if micro == 1 and not section.gradient_checkpointing:
            # The estimate does not know it; it is the last thing that helps.
            return {"gradient_checkpointing": True}
    return {"micro_batch_size": _divisor_below(micro)} if micro > 1 else {}


def _divisor_below(number: int) -> int:
    return next(d for d in range(number - 1, 0, -1) if number % d == 0)


def _changed(config: PipelineConfig, changes: Mapping[str, Mapping[str, Any]]) -> PipelineConfig:
    """Return a configuration with other values, validated anew."""
    tree = config.model_dump(mode="json", exclude_unset=True)
    for name, values in changes.items():
        tree[name] = {**tree.get(name, {}), **values}
    return PipelineConfig.model_validate(tree)
