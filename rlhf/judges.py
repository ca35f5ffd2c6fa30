"""Independent judges of replies, used by the evaluation stages alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from rlhf.config import DataConfig, EvaluationConfig
from rlhf.data.rows import Pair

Judge = Callable[[Any, str], float]


def judge_of(config: EvaluationConfig) -> Judge | None:
    """Return the configured judge: `judge(prompt, reply) -> score`."""
    if config.judge == "none":
        return None
    from rlhf.world import gold

    return gold


def ceiling_of(config: EvaluationConfig, data: DataConfig, pairs: Sequence[Pair]) -> float | None:
    """Return the best accuracy to expect on these noisy labels, if it is known."""
    if config.judge == "none":
        return None
    from rlhf.world import WorldPair, ceiling

    rows = [WorldPair(str(p.prompt), p.chosen, p.rejected) for p in pairs]
    return ceiling(rows, data.world.temperature)
