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
#: Differences of equal numbers, relative to these.
_ROUNDING = 1e-12


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
    """Standard error; infinite with one prompt."""

    def metrics(self, name: str) -> dict[str, float]:
        """Return it as metrics: `name`, `name_low`, `name_high`, `name_size`, `name_error`.

        What is infinite, as with one prompt, is left out: JSON has no such numbers.
        """
        values = (self.value, self.low, self.high, self.size, self.error)
        names = (name, *(f"{name}_{part}" for part in ("low", "high", "size", "error")))
        return {n: v for n, v in zip(names, values, strict=True) if math.isfinite(v)}


def share_of(values: Sequence[float], prompts: Sequence[object] | None = None) -> Estimate:
    """Estimate a share from observations in [0, 1], where a tie counts a half.

    The interval is Wilson's at the effective sample size, with a quantile of Student's t. The size
    is p(1 − p)/v with v the variance of the mean over prompts, and not below that of independent
    observations: a correlation that is negative in a few prompts is chance. Unlike a bootstrap this
    stays valid where all observations are equal: the size then is the number of prompts.
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
    p, error, independent, clusters = _mean(array, prompts)
    variance = max(error, independent) ** 2
    size = p * (1 - p) / variance if clusters > 1 and variance > _ROUNDING**2 else float(clusters)
    low, high = wilson(p, size, t_quantile(CONFIDENCE, clusters))
    return Estimate(p, low, high, size, clusters, error)


def stratified_share(
    values: Sequence[float], prompts: Sequence[object], strata: Sequence[str],
    weights: Mapping[str, float],
) -> Estimate:  # fmt: skip
    """Estimate a weighted mean of the shares of strata, which may have prompts in common.

    The interval recovers variances from the strata's own (MOVER): with d_s the distance of a bound
    from stratum s's share times its weight, and R the correlation of the strata's sums by prompt,
    it is p ± √(d′ R d). Linearisation would take a stratum of three, all right, for certain. The
    effective size is that at which Wilson's interval is as wide, on its wider side.
    Sources: Zou 2007, Psychol. Methods 12, 399–413 (with correlation); Newcombe 1998.

    Args:
        values: Observations.
        prompts: Prompt of each.
        strata: Stratum of each.
        weights: Weight of each stratum; their sum is 1.

    Raises:
        ValueError: There are no observations, or one is outside of [0, 1].
    """
    keys = list(dict.fromkeys(prompts))
    place = {key: i for i, key in enumerate(keys)}
    names = list(dict.fromkeys(strata))
    sums = np.zeros((len(keys), len(names)))
    parts: list[Estimate] = []
    for column, name in enumerate(names):
        rows = [i for i, stratum in enumerate(strata) if stratum == name]
        parts.append(share_of([values[i] for i in rows], [prompts[i] for i in rows]))
        for i in rows:
            part = (values[i] - parts[-1].value) / len(rows)
            sums[place[prompts[i]], column] += weights[name] * part
    weight = np.array([weights[name] for name in names])
    share = float(weight @ np.array([part.value for part in parts]))
    scale = np.sqrt((sums**2).sum(0))
    scale[scale < _ROUNDING] = math.inf  # without variance there is no correlation
    correlation = sums.T @ sums / np.outer(scale, scale)
    np.fill_diagonal(correlation, 1.0)
    half = [
        float(np.sqrt(max(distances @ correlation @ distances, 0.0)))
        for distances in (
            weight * np.array([part.value - part.low for part in parts]),
            weight * np.array([part.high - part.value for part in parts]),
        )
    ]
    t = t_quantile(CONFIDENCE, len(keys))
    bounds = (share - half[0], share + half[1])
    # Wilson's bound b has (p − b)² = t² b(1 − b)/size.
    sizes = [t * t * b * (1 - b) / (share - b) ** 2 for b in bounds if 0 < b < 1 and b != share]
    size = min(sizes, default=1.0) if len(keys) > 1 else 1.0
    count = len(keys)
    variance = float((sums.sum(1) ** 2).sum())
    error = math.sqrt(variance * count / (count - 1)) if count > 1 else math.inf
    return Estimate(share, *wilson(share, size, t), size, count, error)


def mean_of(values: Sequence[float], prompts: Sequence[object] | None = None) -> Estimate:
    """Estimate a mean, with Student's t interval on the means of prompts.

    With one prompt there is no interval: it is infinite.

    Raises:
        ValueError: There are no observations.
    """
    array = np.asarray(values, dtype=float)
    if not len(array):
        raise ValueError("a mean needs observations")
    value, error, _, clusters = _mean(array, prompts)
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

    (p + z²/2n ± z √(p(1 − p)/n + z²/4n²)) / (1 + z²/n), without continuity correction.
    Source: Wilson 1927; Brown, Cai and DasGupta 2001, eq. 4. Own code because importing
    scipy.stats takes 1 s.
    """
    if math.isinf(z):
        return 0.0, 1.0
    ratio = z * z / size
    centre = p + ratio / 2
    half = z * math.sqrt(p * (1 - p) / size + ratio / (4 * size))
    low, high = ((centre + sign * half) / (1 + ratio) for sign in (-1, 1))
    # Exact at the ends, where rounding would leave 1e-17.
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

    1 where the mean is zero, otherwise NaN with fewer than two prompts. Where all prompts have the
    same mean, Student's t would be infinite for two of them already; there it is the p-value of the
    sign test, 2 · ½^prompts.
    """
    from scipy import stats

    array = np.asarray(values, dtype=float)
    value, error, _, clusters = _mean(array, prompts)
    rounding = _ROUNDING * float(np.abs(array).max())
    if abs(value) <= rounding:
        return 1.0
    if clusters < 2:
        return math.nan
    if error <= rounding:
        return 2 * 0.5**clusters
    return float(2 * stats.t.sf(abs(value / error), clusters - 1))


def positive_mean_p_value(
    values: Sequence[float], prompts: Sequence[object] | None = None
) -> float:
    """Return the one-sided p-value of a mean of zero or less, by Student's t over prompts.

    1 with fewer than two prompts, where nothing can be shown.
    """
    from scipy import stats

    value, error, _, clusters = _mean(np.asarray(values, dtype=float), prompts)
    if clusters < 2:
        return 1.0
    if error == 0:
        return 0.0 if value > 0 else 1.0
    return float(stats.t.sf(value / error, clusters - 1))


def power_of_share(
    true: float, than: float, prompts: int, spread: float, confidence: float
) -> float:
    """Return the probability that the lower bound of a share will exceed a value.

    Wilson's bound exceeds it where the share exceeds than + t σ₀. With the normal approximation of
    the share this has the probability Φ((true − than − t σ₀)/σ₁), σ₀ = √(than(1 − than)/m), σ₁ =
    √(true(1 − true)/m), m the effective size prompts · than(1 − than)/spread², and t the quantile
    of Student's t that `share_bound` takes.

    Args:
        true: The true share.
        than: Value to exceed, between 0 and 1.
        prompts: Number of prompts.
        spread: Standard deviation of a prompt's mean; 0.5 for one reply without ties.
        confidence: One-sided confidence of the bound.

    Raises:
        ValueError: The value to exceed is not between 0 and 1, or the spread is not positive.
    """
    from scipy import stats

    if not (0 < than < 1 and spread > 0):
        raise ValueError(f"no power for a share above {than} with a spread of {spread}")
    size = prompts * than * (1 - than) / spread**2
    t = t_quantile(2 * confidence - 1, prompts)
    under, other = (math.sqrt(p * (1 - p) / size) for p in (than, true))
    return float(stats.norm.cdf((true - than - t * under) / max(other, 1e-12)))


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


def detectable_share(
    than: float, prompts: int, spread: float, confidence: float, power: float = 0.8
) -> float | None:
    """Return the least true share that exceeds a value with a power; None if even 1 does not."""
    low, high = than, 1.0
    if power_of_share(high, than, prompts, spread, confidence) < power:
        return None
    while high - low > 1e-6:
        middle = (low + high) / 2
        reached = power_of_share(middle, than, prompts, spread, confidence) >= power
        low, high = (low, middle) if reached else (middle, high)
    return high


def _mean(
    array: NDArray[np.float64], prompts: Sequence[object] | None
) -> tuple[float, float, float, int]:
    """Return the mean, its standard errors over prompts and over observations, and the prompts.

    The mean of n observations is a ratio of sums over prompts; its variance is that of Taylor's
    linearisation, G/(G − 1) Σ_g (Σ_i u_gi)² with u_gi = (x_gi − x̄)/n, and n/(n − 1) Σ u² if all
    observations were independent. Source: Cochran 1977, section 6.3.
    """
    value = float(array.mean())
    parts = ((array - value) / len(array)).tolist()
    sums: dict[object, float] = {}
    for i, part in enumerate(parts):
        key = prompts[i] if prompts is not None else i
        sums[key] = sums.get(key, 0.0) + part
    if len(sums) < 2:
        return value, math.inf, math.inf, len(sums)
    errors = []
    for terms in (list(sums.values()), parts):
        squares = math.fsum(term * term for term in terms)
        errors.append(math.sqrt(len(terms) / (len(terms) - 1) * squares))
    return value, errors[0], errors[1], len(sums)
