"""Evaluation of a reward model on held-out pairs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.config import DataConfig, EvaluationConfig, RuntimeConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.fitting import Fitting
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PAIRS_EVAL, Pair, read_rows
from rlhf.errors import DataError
from rlhf.evaluation.common import EVALUATION, groups_of, points
from rlhf.files import write_json
from rlhf.modeling.device import prepare_device
from rlhf.modeling.reward import Scorer
from rlhf.stage import Progress, StageResult, silent
from rlhf.statistics import share


def evaluate_reward_model(
    config: EvaluationConfig,
    data_config: DataConfig,
    data: Path,
    reward_model: Path,
    out_dir: Path,
    *,
    limits: TokenLimits | int,
    runtime: RuntimeConfig | None = None,
    progress: Progress = silent,
) -> StageResult:
    """Measure accuracy on held-out pairs, beside choosing the longer reply.

    Pairs that the model can't be given, or that are equal where it cuts them, are left out.

    Writes `evaluation.json`: accuracy, accuracy_low/high, n, baseline_longer (with interval),
    margin_mean, by_group, and for a source whose truth is known ceiling and share_of_ceiling. Each
    pair counts once, whatever its weight in training: the interval is that of independent trials.

    Raises:
        DataError: The data have no held-out pairs, or the model can't be given too many of them.
    """
    pairs = read_rows(data / PAIRS_EVAL, Pair)
    if not pairs:
        raise DataError("no held-out pairs to evaluate on; raise data.eval_fraction")
    scorer = Scorer(reward_model, prepare_device(runtime or RuntimeConfig()), limits)
    pairs, counts = _fitting_pairs(pairs, scorer.renderer, scorer.limits)
    chosen = _score_in_parts(scorer, pairs, "chosen", progress, 0)
    rejected = _score_in_parts(scorer, pairs, "rejected", progress, len(pairs))
    # A tie counts a half: a model with the same score for everything is no better than a coin.
    correct = (torch.sign(chosen - rejected) + 1) / 2
    longer = [points(len(p.chosen) - len(p.rejected)) for p in pairs]
    metrics: dict[str, Any] = {
        **share("accuracy", float(correct.sum()), len(pairs)),
        **share("baseline_longer", sum(longer), len(pairs)),
        "n": len(pairs),
        "margin_mean": float((chosen - rejected).mean()),
        "score_mean": float(torch.cat([chosen, rejected]).mean()),
        "score_std": float(torch.cat([chosen, rejected]).std()),
    }
    ceiling = ceiling_of(config, data_config, pairs)
    if ceiling is not None:
        metrics |= _ceiling_metrics(metrics["accuracy"], ceiling)
    metrics |= counts
    metrics["by_group"] = {}
    for group, index in groups_of([p.group for p in pairs]).items():
        part = {**share("accuracy", float(correct[index].sum()), len(index)), "n": len(index)}
        if ceiling is not None:
            group_ceiling = ceiling_of(config, data_config, [pairs[i] for i in index]) or ceiling
            part |= _ceiling_metrics(part["accuracy"], group_ceiling)
        metrics["by_group"][group] = part
    write_json(out_dir / EVALUATION, metrics)
    return StageResult({k: v for k, v in metrics.items() if k != "by_group"})


def ceiling_of(config: EvaluationConfig, data: DataConfig, pairs: Sequence[Pair]) -> float | None:
    """Return the best accuracy to expect on these noisy labels, if it is known."""
    if config.judge == "none":
        return None
    from rlhf.world import WorldPair, ceiling

    rows = [WorldPair(str(p.prompt), p.chosen, p.rejected) for p in pairs]
    return ceiling(rows, data.world.temperature)


def _fitting_pairs(
    pairs: list[Pair], renderer: Renderer, limits: TokenLimits
) -> tuple[list[Pair], dict[str, int]]:
    """Return the pairs that a scorer can tell apart, and the counts of the others."""
    fitting = Fitting(renderer, limits)

    def encode(pair: Pair) -> Pair | None:
        one = fitting.encode(pair.prompt, pair.chosen)
        other = fitting.encode(pair.prompt, pair.rejected)
        fitting.count_dropped(one.turns_dropped)
        fitting.counts["pairs_cut"] += one.is_cut or other.is_cut
        fitting.counts["pairs_equal_when_cut"] += one.response == other.response
        return pair if one.response != other.response else None

    kept = [pair for pair in fitting.map(pairs, encode) if pair is not None]
    if not kept:
        raise DataError(
            f"reward_model.max_length = {limits.max_length}: all held-out pairs are equal "
            "within it; raise it"
        )
    return kept, fitting.metrics()


def _score_in_parts(
    scorer: Scorer, pairs: Sequence[Pair], side: str, progress: Progress, done: int
) -> Float[Tensor, " pairs"]:
    scores = []
    size = max(1, len(pairs) // 5)
    for start in range(0, len(pairs), size):
        part = pairs[start : start + size]
        scores.append(scorer([p.prompt for p in part], [getattr(p, side) for p in part]))
        progress(done + start + len(part), 2 * len(pairs), {})
    return torch.cat(scores)


def _ceiling_metrics(accuracy: float, ceiling: float) -> dict[str, float]:
    """Return the ceiling, and the accuracy's share of its gain over chance."""
    share_of = {"share_of_ceiling": (accuracy - 0.5) / (ceiling - 0.5)} if ceiling > 0.5 else {}
    return {"ceiling": ceiling, **share_of}
