"""Calibration of a reward model: do its margins tell how often it is right?

By Bradley and Terry a margin d = r(chosen) − r(rejected) says that the chosen reply is preferred
with probability σ(d). All figures are of these probabilities on held-out pairs.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from rlhf.inference import share_of

#: Most bins of the reliability diagram, and the pairs that one needs.
BINS, PAIRS_OF_A_BIN = 10, 20
#: Parts of the data of which each is judged by the temperature of the others.
FOLDS = 5
Margins = NDArray[np.float64]


def calibration(
    margins: Sequence[float], prompts: Sequence[str]
) -> tuple[dict[str, Any], list[str]]:
    """Measure how well margins tell probabilities.

    Args:
        margins: Score of the chosen reply less that of the rejected one, of each pair.
        prompts: Prompt of each pair.

    Returns:
        The metrics `log_loss`, `brier`, `ece`, `ece_chance`, `reliability`, and as far as they can
        be computed `temperature` and `log_loss_calibrated`; and why one can't.
    """
    array = np.asarray(margins, dtype=float)
    bins = reliability(array, prompts)
    errors = [b["n"] * abs(b["accuracy"] - b["confidence"]) for b in bins]
    metrics: dict[str, Any] = {
        "log_loss": log_loss(array),
        # Brier 1950: the mean of (1 − σ(d))², half of his sum over both outcomes
        "brier": float((_sigmoid(-array) ** 2).mean()),
        # Naeini, Cooper and Hauskrecht 2015; bins of equal size: Roelofs et al. 2022
        "ece": math.fsum(errors) / len(array),
        "ece_chance": _chance(bins, array),
        "reliability": bins,
    }
    notes: list[str] = []
    temperature = fit_temperature(array)
    if isinstance(temperature, str):
        notes.append(f"temperature: {temperature}")
    else:
        metrics["temperature"] = temperature
        held_out = _cross_fitted(array, prompts)
        if isinstance(held_out, str):
            notes.append(f"log_loss_calibrated: {held_out}")
        else:
            metrics["log_loss_calibrated"] = held_out
    return metrics, notes


def log_loss(margins: Margins) -> float:
    """Return the mean of −log σ(d), in nats; ln 2 = 0.693 is a coin's."""
    return float(np.logaddexp(0, -margins).mean())


def fit_temperature(margins: Margins) -> float | str:
    """Return the T that maximises Π σ(d/T), or why there is none.

    With β = 1/T the derivative Σ d σ(−βd) falls in β from Σ d/2, and its root is the maximum.
    Source: Guo et al. 2017, section 4.2, for two classes.
    """
    from scipy.optimize import brentq

    scale = float(np.abs(margins).max())
    if margins.sum() <= 1e-12 * scale * len(margins):
        return "the mean margin is not positive, so that no scale of the scores helps"
    if margins.min() >= 0:
        return "no pair is wrong, so that a larger scale of the scores always fits better"
    units = margins / scale

    def slope(beta: float) -> float:
        return float((units * _sigmoid(-beta * units)).sum())

    high = 1.0
    while slope(high) > 0:
        high *= 2
    root: Any = brentq(slope, 0.0, high, xtol=1e-12)
    return scale / float(root)


def reliability(margins: Margins, prompts: Sequence[str]) -> list[dict[str, float]]:
    """Return how often the preferred reply is the chosen one, by the model's confidence σ(|d|).

    Bins hold about equally many pairs; equal confidences share one.
    """
    confidence = _sigmoid(np.abs(margins))
    right = (np.sign(margins) + 1) / 2
    count = max(1, min(BINS, len(margins) // PAIRS_OF_A_BIN))
    inner = np.quantile(confidence, [i / count for i in range(1, count)])
    edges = [0.5, *dict.fromkeys(float(edge) for edge in inner if 0.5 < edge < 1), 1.0]
    place = np.searchsorted(edges[1:-1], confidence, side="right")
    bins: list[dict[str, float]] = []
    for i, (low, high) in enumerate(pairwise(edges)):
        rows = np.flatnonzero(place == i).tolist()
        if not rows:
            continue
        share = share_of(right[rows].tolist(), [prompts[row] for row in rows])
        bins.append(
            {
                "low": low,
                "high": high,
                "confidence": float(confidence[rows].mean()),
                "accuracy": share.value,
                "accuracy_low": share.low,
                "accuracy_high": share.high,
                "n": len(rows),
            }
        )
    return bins


def _chance(bins: Sequence[dict[str, float]], margins: Margins) -> float:
    """Return the ECE to expect of so many pairs if all probabilities were right.

    A bin's accuracy then has the variance Σ c(1 − c)/n², and a normal variable with it the mean
    absolute value √(2/π) σ.
    """
    # The mean confidence stands for those of its bin, which hardly differ.
    spreads = [math.sqrt(b["n"] * b["confidence"] * (1 - b["confidence"])) for b in bins]
    return math.sqrt(2 / math.pi) * math.fsum(spreads) / len(margins)


def _cross_fitted(margins: Margins, prompts: Sequence[str]) -> float | str:
    """Return the log-loss at a temperature that each prompt's own pairs have no part in."""
    fold_of = {prompt: i % FOLDS for i, prompt in enumerate(dict.fromkeys(prompts))}
    folds = np.array([fold_of[prompt] for prompt in prompts])
    losses = 0.0
    for fold in range(FOLDS):
        held_out = folds == fold
        if not held_out.any():
            continue
        if held_out.all():
            return "there is one prompt"
        temperature = fit_temperature(margins[~held_out])
        if isinstance(temperature, str):
            return f"too few pairs to fit a temperature without a fifth of them ({temperature})"
        losses += log_loss(margins[held_out] / temperature) * int(held_out.sum())
    return losses / len(margins)


def _sigmoid(x: Margins) -> Margins:
    from scipy.special import expit

    return expit(x)
