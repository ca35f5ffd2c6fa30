"""Drift: by how much one dataset differs from another, beyond what chance explains.

Each figure is a distance between 0 and 1. What two draws of one distribution would differ by on
average is subtracted, and the level that such draws hardly ever reach is given with it. Both come
from a bootstrap over groups of prompts (Efron and Tibshirani 1993, chapter 16: replicates are
centred on the pooled distribution), so that words which stand together in a text are not taken for
independent draws, or, for rates and shares, from the binomial and multinomial distribution.

`compare` is symmetric, and 0 for equal datasets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from rlhf.config.drift import DriftLimits
from rlhf.data.sketch import FALLBACK, REPLY_KINDS, Sketch, TextCounts

#: Measures, in the order they are shown; fields of `DriftLimits`.
MEASURES = ("tokens", "lengths", "shares", "labels")
#: Fewest different prompts in each dataset; below nothing is measured.
MIN_PROMPTS = 100
#: Fewest groups of prompts with texts of a kind, for these to be measured: about 30 prompts.
MIN_GROUPS = 20
#: Fewest pairs of both datasets whose labels are compared.
MIN_COMMON = 50
#: Replicates of the bootstrap, which gives mean and standard deviation within 7 %.
REPLICATES = 200
#: Standard deviations that count as chance: with 3.5, 6 of 300 draws of 50 prompts warned.
SIGMAS = 4.0

#: Divergence of the replies' tokens from which their preferences are not compared.
MAX_TOKENS = 0.05
#: Standard deviations from 0 of a signal that is compared.
MIN_SIGNAL = 5.0

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Shift:
    """One figure of drift."""

    measure: str
    """tokens, lengths, shares or labels."""
    of: str
    """Kind of text, rate, or column that it is measured on."""
    value: float
    """Distance without what chance adds on average, 0 to 1."""
    noise: float
    """What chance alone reaches in fewer than 1 of 1,000 draws."""
    before: float | None = None
    """Median length in characters, or rate, of the champion's data; None for the others."""
    after: float | None = None
    """The same of the new data."""

    def reaches(self, limit: float | None) -> bool:
        """Return whether the figure is at a limit, and chance does not explain it."""
        return limit is not None and self.value >= limit and self.value > self.noise


@dataclass(frozen=True)
class Drift:
    """Differences of two datasets, and why some were not measured."""

    shifts: tuple[Shift, ...]
    notes: tuple[str, ...] = ()
    lengths: dict[str, dict[str, list[float]]] = field(default_factory=dict)
    """By kind of text whose lengths were compared: shares by class of length (`length_class`),
    of the champion's data as `before`, of the new ones as `after`."""

    def reached(self, limits: DriftLimits) -> list[Shift]:
        """Return the shifts that reach a limit, the farthest beyond it first."""
        of = {measure: getattr(limits, measure) for measure in MEASURES}
        found = [shift for shift in self.shifts if shift.reaches(of[shift.measure])]
        return sorted(found, key=lambda s: -s.value / max(of[s.measure], 1e-9))

    def largest(self) -> dict[str, float]:
        """Return the largest value of each measure; a measure without any is missing."""
        largest: dict[str, float] = {}
        for shift in self.shifts:
            largest[shift.measure] = max(shift.value, largest.get(shift.measure, 0.0))
        return largest


def compare(old: Sketch, new: Sketch) -> Drift:
    """Measure the drift between two datasets.

    Args:
        old: Sketch of the champion's data.
        new: Sketch of the data to compare.
    """
    fewest = min(old.prompts, new.prompts)
    if old != new and fewest < MIN_PROMPTS:
        which = "the new data have" if new.prompts == fewest else "the champion's data had"
        return Drift((), (
            f"{which} {fewest} different prompts; drift is measured from {MIN_PROMPTS} on",
        ))  # fmt: skip
    notes: list[str] = []
    shifts = [
        *_text_shifts(old, new),
        *_share_shifts(old, new, notes),
        *_label_shifts(old, new),
    ]
    if signal := _signal_shift(old, new):
        shifts.append(signal)
    order = {measure: place for place, measure in enumerate(MEASURES)}
    lengths = {
        kind: {"before": _length_shares(before), "after": _length_shares(after)}
        for kind, before, after in _compared_texts(old, new)
    }
    return Drift(tuple(sorted(shifts, key=lambda s: order[s.measure])), tuple(notes), lengths)


def jensen_shannon(p: Floats, q: Floats) -> Floats:
    """Return the Jensen–Shannon divergence of distributions in bits, 0 to 1.

    H((p + q) / 2) − (H(p) + H(q)) / 2 with the entropy H in bits (Lin 1991, eq. 4.1). It is
    symmetric, and needs no smoothing: a token that one side lacks is no division by zero.

    Args:
        p: Distributions in the last axis.
        q: The same.
    """
    divergence = _entropy((p + q) / 2) - (_entropy(p) + _entropy(q)) / 2
    return np.asarray(np.clip(divergence, 0.0, 1.0))


def kolmogorov_smirnov(p: Floats, q: Floats) -> Floats:
    """Return the largest distance of the cumulative distributions of ordered classes, 0 to 1.

    The two-sample statistic D (Smirnov 1939), on lengths in classes a factor √2 apart.

    Args:
        p: Distributions in the last axis.
        q: The same.
    """
    distance = np.abs(np.cumsum(p - q, axis=-1)).max(axis=-1)
    return np.asarray(np.clip(distance, 0.0, 1.0))


def total_variation(p: Floats, q: Floats) -> Floats:
    """Return the share of a distribution that would have to move to make it the other, 0 to 1.

    ½ Σ |pᵢ − qᵢ| (Levin, Peres and Wilmer 2009, proposition 4.2).

    Args:
        p: Distributions in the last axis.
        q: The same.
    """
    return np.asarray(np.clip(np.abs(p - q).sum(axis=-1) / 2, 0.0, 1.0))


def _entropy(p: Floats) -> Floats:
    return np.asarray(-(p * np.log2(np.where(p > 0, p, 1.0))).sum(axis=-1))


def _text_shifts(old: Sketch, new: Sketch) -> Iterator[Shift]:
    for kind, before, after in _compared_texts(old, new):
        value, noise = _corrected(before.tokens, after.tokens, jensen_shannon)
        yield Shift("tokens", kind, value, noise)
        value, noise = _corrected(before.lengths, after.lengths, kolmogorov_smirnov)
        yield Shift("lengths", kind, value, noise, median_length(before), median_length(after))


def _compared_texts(old: Sketch, new: Sketch) -> Iterator[tuple[str, TextCounts, TextCounts]]:
    """Yield each kind of text with both datasets' counts, where there are enough."""
    # A kind that only one side has of its own is compared with what the other uses in its place.
    for kind in dict.fromkeys([*old.texts, *new.texts]):
        before, after = (s.texts.get(kind) or s.texts[FALLBACK[kind]] for s in (old, new))
        # Of texts to a few prompts chance can't be told.
        if min(_spread(before), _spread(after)) >= MIN_GROUPS:
            yield kind, before, after


def _length_shares(counts: TextCounts) -> list[float]:
    total = np.array(counts.lengths, dtype=float).sum(axis=0)
    return [round(float(share), 6) for share in total / total.sum()]


def _spread(counts: TextCounts) -> int:
    """Return the number of groups of prompts that have texts."""
    return sum(number > 0 for number in counts.texts)


def median_length(counts: TextCounts) -> float:
    """Return the median length in characters, as exact as the classes: a fifth off at most."""
    total = np.array(counts.lengths, dtype=float).sum(axis=0)
    middle = int(np.searchsorted(np.cumsum(total), total.sum() / 2))
    return float(round(2 ** (middle / 2) - 1))


def _corrected(
    old: list[list[int]], new: list[list[int]], distance: Callable[[Floats, Floats], Floats]
) -> tuple[float, float]:
    """Return the distance of two tables (groups × classes) without bias, and its noise."""
    width = max(len(old[0]), len(new[0]))
    # In an order that does not depend on which is which, so that the result is symmetric.
    first, second = sorted((_padded(old, width), _padded(new, width)), key=lambda t: t.tobytes())
    p, q = (_normalised(table.sum(axis=0)) for table in (first, second))
    if np.array_equal(first, second):
        return 0.0, 0.0
    pooled = _normalised(first.sum(axis=0) + second.sum(axis=0))
    rng = np.random.default_rng(0)
    null = distance(*(_replicates(table, pooled, rng) for table in (first, second)))
    mean, deviation = float(null.mean()), float(null.std(ddof=1))
    return max(0.0, float(distance(p, q)) - mean), SIGMAS * deviation


def _replicates(table: Floats, pooled: Floats, rng: np.random.Generator) -> Floats:
    """Draw distributions that vary as a table's do, around the pooled one."""
    table = table[table.sum(axis=1) > 0]
    groups = len(table)
    weights = rng.multinomial(groups, np.full(groups, 1 / groups), size=REPLICATES).astype(float)
    drawn = _normalised(weights @ table)
    # A bootstrap of g groups varies too little by (g − 1) / g.
    scale = math.sqrt(groups / (groups - 1)) if groups > 1 else 1.0
    around = pooled + scale * (drawn - _normalised(table.sum(axis=0)))
    return _normalised(np.maximum(around, 0.0))


def _share_shifts(old: Sketch, new: Sketch, notes: list[str]) -> Iterator[Shift]:
    for name in dict.fromkeys([*old.shares, *new.shares]):
        if name not in old.shares or name not in new.shares:
            which = "the champion's data" if name in old.shares else "the new data"
            notes.append(f"{name}: measured in {which} only, so not compared")
            continue
        values = sorted({*old.shares[name], *new.shares[name]})
        sides = [_share_counts(sketch, name, values) for sketch in (old, new)]
        value, noise = _corrected_shares(*sides)
        yield Shift("shares", name, value, noise)


def _share_counts(sketch: Sketch, name: str, values: list[str]) -> Floats:
    counts = np.array([sketch.shares[name].get(value, 0) for value in values], dtype=float)
    # Pairs of one prompt mostly have one value: they count as one draw.
    return counts * min(1.0, sketch.prompts / counts.sum())


def _corrected_shares(old: Floats, new: Floats) -> tuple[float, float]:
    first, second = sorted((old, new), key=lambda counts: counts.tobytes())
    if np.array_equal(first, second):
        return 0.0, 0.0
    pooled = _normalised(first + second)
    rng = np.random.default_rng(0)
    sizes = [max(1, round(float(side.sum()))) for side in (first, second)]
    draws = [rng.multinomial(n, pooled, size=REPLICATES) / n for n in sizes]
    null = total_variation(draws[0], draws[1])
    mean, deviation = float(null.mean()), float(null.std(ddof=1))
    distance = float(total_variation(_normalised(first), _normalised(second)))
    return max(0.0, distance - mean), SIGMAS * deviation


def _label_shifts(old: Sketch, new: Sketch) -> Iterator[Shift]:
    sides = [np.array(sketch.longer, dtype=float) for sketch in (old, new)]
    if all(side[:, 0].sum() for side in sides):
        rates = [float(side[:, 1].sum() / side[:, 0].sum()) for side in sides]
        variance = sum(
            max(_rate_variance(side), _binomial(rate, float(side[:, 0].sum())))
            for side, rate in zip(sides, rates, strict=True)
        )
        yield _rate_shift("longer reply preferred", rates, variance)
    common = old.preferred.keys() & new.preferred.keys()
    if len(common) >= MIN_COMMON:
        contrary = sum(old.preferred[key] != new.preferred[key] for key in common) / len(common)
        variance = _binomial(contrary, len(common))
        yield _rate_shift("pairs of both labelled the other way", [0.0, contrary], variance)
    for name in old.rates.keys() & new.rates.keys():
        counts = [_effective(sketch, name) for sketch in (old, new)]
        rates = [sketch.rates[name][0] for sketch in (old, new)]
        pooled = float(np.average(rates, weights=counts))
        yield _rate_shift(name, rates, sum(_binomial(pooled, n) for n in counts))


def _rate_shift(name: str, rates: list[float], variance: float) -> Shift:
    value = abs(rates[0] - rates[1])
    return Shift("labels", name, value, SIGMAS * math.sqrt(variance), rates[0], rates[1])


def _rate_variance(side: Floats) -> float:
    """Return the variance of a ratio of sums over groups (Cochran 1977, eq. 6.13)."""
    side = side[side[:, 0] > 0]
    groups, total = len(side), side[:, 0].sum()
    if groups < 2:
        return 0.0
    residuals = side[:, 1] - side[:, 1].sum() / total * side[:, 0]
    return float(groups / (groups - 1) * (residuals**2).sum() / total**2)


def _binomial(rate: float, n: float) -> float:
    """Return the variance of a rate of n draws; add-one smoothed, for rates of 0 and 1."""
    rate = (rate * n + 1) / (n + 2)
    return rate * (1 - rate) / n


def _effective(sketch: Sketch, name: str) -> float:
    """Return the number of independent observations: pairs of one prompt count as one."""
    n = sketch.rates[name][1]
    return n * min(1.0, sketch.prompts / max(sketch.pairs, 1))


def _signal_shift(old: Sketch, new: Sketch) -> Shift | None:
    """Return the share of labels to flip until both datasets prefer the same tokens.

    With d, the mean difference of the chosen and the rejected reply's tokens, flipping a share r of
    the labels makes it (1 − 2r)·d. So r = (1 − b) / 2, where b is the product of both datasets' d
    over the larger squared norm. Products are of different groups only, so that the noise of a
    group's d is not counted as its length (a U-statistic, Hoeffding 1948). None where the tokens
    themselves have drifted, or preferences can't be told from noise in either dataset.
    """
    for kind in REPLY_KINDS:
        sides = (old.texts[kind].tokens, new.texts[kind].tokens)
        if _corrected(*sides, jensen_shannon)[0] > MAX_TOKENS:
            return None
    sides = [_differences(sketch) for sketch in (old, new)]
    if min(map(len, sides)) < 3 or np.array_equal(sides[0], sides[1]):
        return None
    spread = np.sqrt(sum((side**2).mean(axis=0) for side in sides) / 2 + 1e-12)
    first, second = (side / spread for side in sides)
    norms = [_squared_norm(side) for side in (first, second)]
    for side, norm in zip((first, second), norms, strict=True):
        if norm > MIN_SIGNAL * _jackknife([_squared_norm(s) for s in _without_one(side)]):
            break
    else:
        return None
    flipped = _flipped(first, second)
    variance = sum(
        _jackknife(values) ** 2
        for values in (
            [_flipped(s, second) for s in _without_one(first)],
            [_flipped(first, s) for s in _without_one(second)],
        )
    )
    name = "labels that would have to be flipped to agree"
    return Shift("labels", name, min(max(flipped, 0.0), 1.0), SIGMAS * math.sqrt(variance))


def _differences(sketch: Sketch) -> Floats:
    """Return the mean difference of the replies' token counts, groups × buckets."""
    chosen, rejected = (sketch.texts[kind] for kind in REPLY_KINDS)
    texts = np.array(chosen.texts, dtype=float)
    table = np.array(chosen.tokens, dtype=float) - np.array(rejected.tokens, dtype=float)
    return table[texts > 0] / texts[texts > 0, None]


def _squared_norm(groups: Floats) -> float:
    """Return the squared norm of the groups' expected value, without bias."""
    n = len(groups)
    return float(((groups.sum(axis=0) ** 2).sum() - (groups**2).sum()) / (n * (n - 1)))


def _flipped(first: Floats, second: Floats) -> float:
    norm = max(_squared_norm(first), _squared_norm(second), 1e-12)
    return (1 - float(first.mean(axis=0) @ second.mean(axis=0)) / norm) / 2


def _without_one(groups: Floats) -> Iterator[Floats]:
    return (np.delete(groups, place, axis=0) for place in range(len(groups)))


def _jackknife(values: list[float]) -> float:
    """Return the standard deviation from estimates without one group each (Efron 1982, 3.6)."""
    n = len(values)
    return float(np.std(values) * math.sqrt(n - 1))


def _padded(table: list[list[int]], width: int) -> Floats:
    array = np.zeros((len(table), width))
    array[:, : len(table[0])] = table
    return array


def _normalised(counts: Floats) -> Floats:
    total = counts.sum(axis=-1, keepdims=True)
    return counts / np.where(total > 0, total, 1.0)
