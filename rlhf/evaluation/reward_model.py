"""Evaluation of a reward model on held-out pairs: the report that its gate judges."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from rlhf.config import DataConfig, EvaluationConfig, RuntimeConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.fitting import Fitting
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PAIRS_EVAL, Pair, Prompt, read_rows
from rlhf.errors import DataError
from rlhf.evaluation.calibration import calibration
from rlhf.evaluation.common import EVALUATION, groups_of, points
from rlhf.evaluation.disagreement import DISAGREEMENT, members_report
from rlhf.evaluation.probes import make_probes, probe_metrics, prompt_key
from rlhf.evaluation.slices import (
    PROMPTS_OF_THE_WORST,
    accuracy_by_slice,
    slices_of,
    worst_of,
)
from rlhf.evaluation.style import style
from rlhf.files import write_json
from rlhf.inference import share_of
from rlhf.modeling.device import prepare_device
from rlhf.modeling.members import member_scores, members_of, open_scorer
from rlhf.modeling.reward import Scorer
from rlhf.stage import Progress, Scalar, StageResult, silent

#: Scale of the scores, for those who need probabilities: temperature, mean, deviation.
CALIBRATION = "calibration.json"
#: Bins of the histogram of margins.
_MARGIN_BINS = 16


class PairsReport(NamedTuple):
    """Metrics of a reward model on held-out pairs, and values for each pair."""

    metrics: dict[str, Any]
    correct: list[float]
    """Whether each pair is ranked right; a half for a tie."""
    margins: list[float]
    """Score of each pair's chosen reply less that of the rejected one."""
    disagreements: list[dict[str, Any]]
    """The members' disagreement on each pair, see `members_report`; empty without members."""


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
    """Measure a reward model on held-out pairs; docs/trust.md explains the figures.

    Pairs that the model can't be given, or that are equal where it cuts them, are left out. Each
    counts once, whatever its weight in training. Intervals take prompts as independent.

    Writes `evaluation.json`: the report of `pairs_report`, `by_group`, and for a source whose truth
    is known `ceiling` and `share_of_ceiling`; `calibration.json`; and of a model with members
    `disagreement.json`.

    Raises:
        DataError: The data have no held-out pairs, or the model can't be given too many of them.
        TrainingError: A score is not finite.
    """
    pairs = read_rows(data / PAIRS_EVAL, Pair)
    if not pairs:
        raise DataError("no held-out pairs to evaluate on; raise data.eval_fraction")
    scorer = open_scorer(reward_model, prepare_device(runtime or RuntimeConfig()), limits)
    pairs, counts = _fitting_pairs(pairs, scorer.renderer, scorer.limits)
    report = pairs_report(scorer, pairs, progress)
    metrics, correct = report.metrics, report.correct
    ceiling = ceiling_of(config, data_config, pairs)
    if ceiling is not None:
        metrics |= _ceiling_metrics(metrics["accuracy"], ceiling)
    metrics |= counts
    groups = groups_of([pair.group for pair in pairs])
    prompts = [prompt_key(pair.prompt) for pair in pairs]
    by_group = accuracy_by_slice(groups, correct, prompts)
    if ceiling is not None:
        for group, rows in groups.items():
            own = ceiling_of(config, data_config, [pairs[i] for i in rows]) or ceiling
            by_group[group] |= _ceiling_metrics(by_group[group]["accuracy"], own)
    metrics["by_group"] = by_group
    write_json(out_dir / EVALUATION, metrics)
    scale = ("temperature", "n", "score_mean", "score_std")
    write_json(out_dir / CALIBRATION, {name: metrics.get(name) for name in scale})
    if report.disagreements:
        write_json(out_dir / DISAGREEMENT, report.disagreements)
    return StageResult(_flat(metrics))


def pairs_report(scorer: Scorer, pairs: Sequence[Pair], progress: Progress = silent) -> PairsReport:
    """Score pairs and probes of them, and report on both.

    The metrics hold accuracy, style (`rlhf.evaluation.style`), calibration, `margins`, `by_slice`
    with the worst slice, `probes`, and of a model with members `members`; `notes` say why a figure
    is missing. A tie counts a half: a model with the same score for everything is no better than a
    coin.
    """
    probes = make_probes(pairs, scorer.renderer, scorer.limits)
    rows = [(pair.prompt, pair.chosen) for pair in pairs]
    rows += [(pair.prompt, pair.rejected) for pair in pairs]
    rows += [(probe.prompt, probe.text) for probe in probes]
    table = torch.cat([*_score_in_parts(scorer, rows, progress)])
    scores: list[float] = table[:, 0].tolist()
    n = len(pairs)
    chosen, rejected, probed = scores[:n], scores[n : 2 * n], scores[2 * n :]
    margins = [a - b for a, b in zip(chosen, rejected, strict=True)]
    correct = [points(margin) for margin in margins]
    prompts = [prompt_key(pair.prompt) for pair in pairs]
    accuracy = share_of(correct, prompts)
    deviation = float(np.std(scores[: 2 * n], ddof=1))
    style_metrics, notes = style(pairs, correct, prompts)
    calibrated, more = calibration(margins, prompts)
    notes += more
    metrics: dict[str, Any] = {
        **accuracy.metrics("accuracy"),
        **style_metrics,
        "n": n,
        "prompts": accuracy.clusters,
        "margin_mean": float(np.mean(margins)),
        "score_mean": float(np.mean(scores[: 2 * n])),
        "score_std": deviation,
        **calibrated,
        **_margin_histogram(margins, notes),
    }
    by_slice = accuracy_by_slice(slices_of(pairs), correct, prompts)
    metrics["by_slice"] = by_slice
    worst = worst_of(by_slice)
    if worst is None:
        notes.append(f"worst_slice: no slice has {PROMPTS_OF_THE_WORST} prompts")
    else:
        metrics |= {"worst_slice": worst, "worst": by_slice[worst]}
    before = [chosen[probe.pair] for probe in probes]
    metrics["probes"], more = probe_metrics(probes, before, probed, deviation)
    disagreements: list[dict[str, Any]] = []
    if members := members_of(scorer):
        metrics["members"], disagreements = members_report(
            members, table[:n], table[n : 2 * n], pairs, prompts
        )
    return PairsReport({**metrics, "notes": notes + more}, correct, margins, disagreements)


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
    scorer: Scorer, rows: Sequence[tuple[Prompt, str]], progress: Progress
) -> Iterator[Tensor]:
    """Yield the scores of parts of the rows, as many as there are steps of progress to tell.

    Those of the members are in further columns.
    """
    size = max(1, len(rows) // 10)
    for start in range(0, len(rows), size):
        part = rows[start : start + size]
        yield member_scores(scorer, [prompt for prompt, _ in part], [reply for _, reply in part])
        progress(start + len(part), len(rows), {})


def _margin_histogram(margins: Sequence[float], notes: list[str]) -> dict[str, Any]:
    """Return how many pairs that are right, and that are wrong, have each margin.

    0 is an edge, so that no bin holds both.
    """
    lowest, highest = min(*margins, 0.0), max(*margins, 0.0)
    if lowest == highest:
        notes.append("margins: all of them are 0, the model prefers none of the replies")
        return {}
    width = (highest - lowest) / _MARGIN_BINS
    edges = width * np.arange(math.floor(lowest / width), math.ceil(highest / width) + 1)
    # Rounding must not put the largest ones outside.
    edges[0], edges[-1] = min(edges[0], lowest), max(edges[-1], highest)
    array = np.asarray(margins)
    counts = {
        name: np.histogram(array[np.sign(array) == sign], edges)[0].tolist()
        for name, sign in (("right", 1), ("wrong", -1))
    }
    return {"margins": {"edges": edges.tolist(), **counts}}


def _flat(metrics: Mapping[str, Any]) -> dict[str, Scalar]:
    """Return the numbers and names of a report, of its nested parts the most telling."""
    flat: dict[str, Scalar] = {
        name: value for name, value in metrics.items() if isinstance(value, int | float | str)
    }
    worst = metrics.get("worst", {})
    flat |= {f"worst.{name}": value for name, value in worst.items()}
    members = metrics.get("members", {})
    flat |= {f"members.{k}": v for k, v in members.items() if isinstance(v, int | float)}
    for name, part in metrics["probes"].items():
        flat[f"probes.{name}.rises"] = part["rises"]
    return flat


def _ceiling_metrics(accuracy: float, ceiling: float) -> dict[str, float]:
    """Return the ceiling, and the accuracy's share of its gain over chance."""
    share_of = {"share_of_ceiling": (accuracy - 0.5) / (ceiling - 0.5)} if ceiling > 0.5 else {}
    return {"ceiling": ceiling, **share_of}
