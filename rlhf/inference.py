"""Statistical inference for evaluations: intervals, tests and sample sizes, clustered by prompt.

Several observations of one prompt, such as the replies sampled to it or its pairs, are dependent.
All functions take the prompt of each observation, and treat prompts as independent.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

#: Two-sided confidence of intervals in evaluations.
CONFIDENCE = 0.95


@dataclass(frozen=True)
class Estimate:
    """A mean or a share with its 95 % interval."""

    value: float
    low: float
    high: float
    size: float
    """Effective number of independent observations; of a mean the number of prompts."""
    clusters: int
    """Number of prompts."""
    error: float
    """Standard error."""

    def metrics(self, name: str) -> dict[str, float]:
        """Return it as metrics: `name`, `name_low`, `name_high`, `name_size`, `name_error`."""
        return {
            name: self.value,
            f"{name}_low": self.low,
            f"{name}_high": self.high,
            f"{name}_size": self.size,
            f"{name}_error": self.error,
        }


def share_of(values: Sequence[float], prompts: Sequence[object] | None = None) -> Estimate:
    """Estimate a share from observations in [0, 1], where a tie counts a half.

    The interval is Wilson's at the effective sample size, with a quantile of Student's t. The size
    is p(1 − p)/v with v the variance of the mean over prompts. Unlike a bootstrap this stays valid
    where all observations are equal: the size then is the number of prompts.
    Sources: Wilson 1927; Korn and Graubard 1998 (effective size, t); Dean and Pagano 2015,
    J. Surv. Stat. Methodol. 3, 484–503 (its coverage beside others for clustered data).

    Args:
        values: Observations.
        prompts: Prompt of each; without it every observation is a prompt of its own.

    Raises:
        ValueError: There are no observations, or one is outside of [0, 1].
    """
    array = np.asarray(values, dtype=float)
    if not len(array) or not ((array >= 0) & (array <= 1)).all():
        raise ValueError("a share needs observations between 0 and 1")
    p, error, clusters = _mean(array, prompts)
    variance = p * (1 - p)
    size = float(clusters)
    if error > 0 and clusters > 1:
        size = min(variance / error**2, float(len(array)) * clusters)
    low, high = wilson(p, size, t_quantile(CONFIDENCE, clusters))
    return Estimate(p, low, high, size, clusters, error)


def mean_of(values: Sequence[float], prompts: Sequence[object] | None = None) -> Estimate:
    """Estimate a mean, with Student's t interval on the means of prompts.

    With one prompt there is no interval: it is infinite.

    Raises:
        ValueError: There are no observations.
    """
    array = np.asarray(values, dtype=float)
    if not len(array):
        raise ValueError("a mean needs observations")
    value, error, clusters = _mean(array, prompts)
    half = t_quantile(CONFIDENCE, clusters) * error if clusters > 1 else math.inf
    return Estimate(value, value - half, value + half, float(clusters), clusters, error)


def combined(estimates: Sequence[Estimate], weights: Sequence[float] | None = None) -> Estimate:
    """Estimate a weighted mean of independent estimates, such as those of a suite's subsets.

    Each keeps its own interval's shape: with values θ, bounds l and u and weights w of sum 1, the
    lower bound is Σ wθ − √(Σ w²(θ − l)²), the upper Σ wθ + √(Σ w²(u − θ)²). Unlike a sum of
    variances this stays valid where all observations of a subset are equal. Source: Zou and Donner
    2008, Statist. Med. 27, 1693–1702 (MOVER).

    Args:
        estimates: At least one.
        weights: Of each, above 0 in sum; None gives all the same.
    """
    given = [1.0] * len(estimates) if weights is None else [*weights]
    shares = [weight / math.fsum(given) for weight in given]
    pairs = [*zip(shares, estimates, strict=True)]
    value = math.fsum(w * e.value for w, e in pairs)
    below = math.sqrt(math.fsum((w * (e.value - e.low)) ** 2 for w, e in pairs))
    above = math.sqrt(math.fsum((w * (e.high - e.value)) ** 2 for w, e in pairs))
    error = math.sqrt(math.fsum((w * e.error) ** 2 for w, e in pairs))
    size = math.fsum(e.size for e in estimates)
    return Estimate(
        value, value - below, value + above, size, sum(e.clusters for e in estimates), error
    )


def wilson(p: float, size: float, z: float) -> tuple[float, float]:
    """Return Wilson's interval of a share p of `size` observations at the quantile z.

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n). Source: Wilson 1927.
    """
    if math.isinf(z):
        return 0.0, 1.0
    ratio = z * z / size
    centre = p + ratio / 2
    half = z * math.sqrt(p * (1 - p) / size + ratio / (4 * size))
    low, high = ((centre + sign * half) / (1 + ratio) for sign in (-1, 1))
    return (0.0 if p == 0 else max(low, 0.0)), (1.0 if p == 1 else min(high, 1.0))


def share_bound(p: float, size: float, clusters: int, confidence: float) -> tuple[float, float]:
    """Return the one-sided lower and upper bound of a share at a confidence such as 0.995."""
    return wilson(p, size, t_quantile(2 * confidence - 1, clusters))


def mean_bound(value: float, error: float, clusters: int, confidence: float) -> tuple[float, float]:
    """Return the one-sided lower and upper bound of a mean at a confidence such as 0.995."""
    half = t_quantile(2 * confidence - 1, clusters) * error if clusters > 1 else math.inf
    return value - half, value + half


def t_quantile(confidence: float, clusters: int) -> float:
    """Return the quantile of Student's t for a two-sided interval of means over prompts."""
    from scipy import stats  # takes 1 s to import

    if clusters < 2:
        return math.inf
    return float(stats.t.ppf((1 + confidence) / 2, clusters - 1))


def holm(p_values: Mapping[str, float]) -> dict[str, float]:
    """Adjust p-values for their number by Holm's method, which holds for dependent tests too.

    Sorted ascending, the adjusted value is max over j ≤ i of min(1, (m − j + 1) p_j), j from 1.
    Source: Holm 1979. A NaN stays NaN and does not count.
    """
    known = sorted((k for k, p in p_values.items() if not math.isnan(p)), key=p_values.__getitem__)
    adjusted: dict[str, float] = dict.fromkeys(p_values, math.nan)
    largest = 0.0
    for i, name in enumerate(known):
        largest = max(largest, min(1.0, (len(known) - i) * p_values[name]))
        adjusted[name] = largest
    return adjusted


def mean_p_value(values: Sequence[float], prompts: Sequence[object] | None = None) -> float:
    """Return the two-sided p-value of a mean of zero, by Student's t over prompts.

    NaN with fewer than two prompts; 1 where all observations are zero.
    """
    from scipy import stats

    array = np.asarray(values, dtype=float)
    if not array.any():
        return 1.0
    value, error, clusters = _mean(array, prompts)
    if clusters < 2:
        return math.nan
    if error == 0:
        return 0.0
    return float(2 * stats.t.sf(abs(value / error), clusters - 1))


def power_of_share(
    true: float, than: float, prompts: int, spread: float, confidence: float
) -> float:
    """Return the probability that the lower bound of a share will exceed a value.

    Normal approximation: Φ((true − than − z σ₀)/σ₁) with σ₀ = √(than(1 − than)/m), σ₁ =
    √(true(1 − true)/m), m the effective size prompts · than(1 − than)/spread².

    Args:
        true: The true share.
        than: Value to exceed.
        prompts: Number of prompts.
        spread: Standard deviation of a prompt's mean; 0.5 for one reply without ties.
        confidence: One-sided confidence of the bound.
    """
    from scipy import stats

    size = prompts * than * (1 - than) / spread**2
    z = float(stats.norm.ppf(confidence))
    under, other = (math.sqrt(p * (1 - p) / size) for p in (than, true))
    return float(stats.norm.cdf((true - than - z * under) / max(other, 1e-12)))


def prompts_needed(
    true: float, than: float, spread: float, confidence: float, power: float = 0.8
) -> int:
    """Return the fewest prompts whose `power_of_share` reaches a power.

    Raises:
        ValueError: The true share does not exceed the value.
    """
    if true <= than:
        raise ValueError(f"a share of {true} never exceeds {than} reliably")
    low, high = 1, 2
    while power_of_share(true, than, high, spread, confidence) < power:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        reached = power_of_share(true, than, middle, spread, confidence) >= power
        low, high = (low, middle) if reached else (middle, high)
    return high


def _mean(array: NDArray[np.float64], prompts: Sequence[object] | None) -> tuple[float, float, int]:
    """Return the mean, its standard error over prompts, and their number.

    The mean of all observations is a ratio of sums over prompts; its variance is that of Taylor's
    linearisation, G/(G − 1) Σ_g (Σ_i (x_gi − x̄))² / N². Source: Cochran 1977, chapter 6.
    """
    value = float(array.mean())
    sums: dict[object, float] = {}
    for i, difference in enumerate(array - value):
        key = prompts[i] if prompts is not None else i
        sums[key] = sums.get(key, 0.0) + float(difference)
    count = len(sums)
    if count < 2:
        return value, 0.0, count
    squares = math.fsum(s * s for s in sums.values())
    return value, math.sqrt(count / (count - 1) * squares) / len(array), count
