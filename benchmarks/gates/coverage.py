"""Coverage of the 95 % intervals in 1,000 simulated evaluations with clustered prompts.

Three kinds of evaluations, whose true values are known:

- accuracy: each prompt has 1 to 6 pairs (geometric), and a chance of its own that one of them is
  ranked correctly, drawn from a beta distribution (concentration 4: strongly dependent pairs);
- win rate: replies' scores are normal around a mean of their prompt and policy; all k × k pairs of
  replies to a prompt are compared. The true value is Φ(μ / √(2τ² + 2)), τ the deviation of means;
- difference: the same scores, averaged.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np

from rlhf.inference import Estimate, mean_of, share_of

SIMULATIONS = 1000
#: Correlation of pairs of one prompt is 1 / (1 + CONCENTRATION).
CONCENTRATION = 4.0
#: Deviation of the means of prompts, where that of replies to one prompt is 1.
SPREAD = 0.7


@dataclass(frozen=True)
class Case:
    """A kind of evaluation: its name, its true value, and a draw of it."""

    name: str
    true: float
    draw: Callable[[np.random.Generator], Estimate]


def cases() -> Iterator[Case]:
    """Yield all cases; sizes are those of the quickstart and of small gates."""
    from scipy import stats

    for prompts in (50, 150, 300):
        for true in (0.5, 0.65, 0.8, 0.9):
            yield Case(f"accuracy, {prompts} prompts", true, _accuracy(true, prompts))
            for k in (1, 4):
                mean = float(stats.norm.ppf(true)) * np.sqrt(2 * SPREAD**2 + 2)
                yield Case(f"win rate, {prompts} prompts × {k}", true, _wins(mean, prompts, k))
        yield Case(f"difference, {prompts} prompts × 4", 0.3, _difference(0.3, prompts, 4))


def measure(case: Case, simulations: int = SIMULATIONS, seed: int = 0) -> tuple[float, float]:
    """Return the shares of simulated evaluations below and above whose interval the truth lies."""
    rng = np.random.default_rng([seed, *case.name.encode(), int(100 * case.true)])
    above = below = 0
    for _ in range(simulations):
        estimate = case.draw(rng)
        below += case.true < estimate.low
        above += case.true > estimate.high
    return below / simulations, above / simulations


def table(simulations: int = SIMULATIONS) -> list[dict[str, float | str]]:
    """Measure all cases."""
    rows: list[dict[str, float | str]] = []
    for case in cases():
        below, above = measure(case, simulations)
        rows.append(
            {
                "evaluation": case.name, "true": case.true, "coverage": 1 - below - above,
                "too_high": below, "too_low": above,
            }
        )  # fmt: skip
    return rows


def _accuracy(true: float, prompts: int) -> Callable[[np.random.Generator], Estimate]:
    def draw(rng: np.random.Generator) -> Estimate:
        counts = np.minimum(rng.geometric(0.5, prompts), 6)
        chances = rng.beta(CONCENTRATION * true, CONCENTRATION * (1 - true), prompts)
        clusters = np.repeat(np.arange(prompts), counts)
        right = rng.random(len(clusters)) < chances[clusters]
        return share_of(right.astype(float).tolist(), clusters.tolist())

    return draw


def _wins(mean: float, prompts: int, k: int) -> Callable[[np.random.Generator], Estimate]:
    def draw(rng: np.random.Generator) -> Estimate:
        before, after = _scores(rng, 0.0, prompts, k), _scores(rng, mean, prompts, k)
        points = (after[:, :, None] > before[:, None, :]).mean((1, 2))
        return share_of(points.tolist())

    return draw


def _difference(mean: float, prompts: int, k: int) -> Callable[[np.random.Generator], Estimate]:
    def draw(rng: np.random.Generator) -> Estimate:
        before, after = _scores(rng, 0.0, prompts, k), _scores(rng, mean, prompts, k)
        return mean_of((after.mean(1) - before.mean(1)).tolist())

    return draw


def _scores(rng: np.random.Generator, mean: float, prompts: int, k: int) -> np.ndarray:
    return mean + SPREAD * rng.normal(size=(prompts, 1)) + rng.normal(size=(prompts, k))
