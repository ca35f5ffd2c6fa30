"""Independent judges: seen by the final evaluation alone, by no training stage and no gate."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlhf.config import DataConfig, EvaluationConfig
from rlhf.data.rows import Pair

Judge = Callable[[Any, str], float]


def judge_of(config: EvaluationConfig) -> Judge | None:
    """The judge that the configuration names: `judge(prompt, reply) -> score`."""
    if config.judge == "none":
        return None
    from rlhf.world import gold

    return gold


def ceiling_of(config: EvaluationConfig, data: DataConfig, pairs: Sequence[Pair]) -> float | None:
    """The best accuracy that any reward model can expect on these noisy labels, if known."""
    if config.judge == "none":
        return None
    from rlhf.world import WorldPair, ceiling

    rows = [WorldPair(str(p.prompt), p.chosen, p.rejected) for p in pairs]
    return ceiling(rows, data.world.temperature)
