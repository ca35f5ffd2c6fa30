"""Statistics: Wilson intervals, n-gram repetition, running mean and variance."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rlhf.inference import wilson

#: Quantile of the standard normal distribution for 95 % intervals.
_Z = 1.959963984540054


def share(name: str, successes: float, n: int) -> dict[str, float]:
    """Return a share with its 95 % Wilson interval: `name`, `name_low`, `name_high`.

    `successes` may be fractional, as ties count a half; the interval is that of the rounded number.
    """
    low, high = wilson_interval(round(successes), n)
    return {
        name: successes / n,
        f"{name}_low": low,
        f"{name}_high": high,
    }


def wilson_interval(successes: float, n: int) -> tuple[float, float]:
    """Return the 95 % Wilson score interval of a share of independent trials."""
    return wilson(successes / n, n, _Z)


def repeated_ngrams(words: Sequence[str], n: int) -> float:
    """Return the share of n-grams that repeat an earlier one; 0 without n-grams."""
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0


class RunningMoments:
    """Running count, mean and sum of squared deviations, in double precision."""

    def __init__(self) -> None:
        self.count, self.mean, self.squares = 0, 0.0, 0.0

    def merge(self, count: int, mean: float, squares: float) -> None:
        """Add a batch, given by its own moments.

        Source: Chan, Golub and LeVeque 1983, eq. 2.1; for one value that is Welford 1962.
        """
        total = self.count + count
        shift = mean - self.mean
        self.squares += squares + shift**2 * self.count * count / total
        self.mean += shift * count / total
        self.count = total

    def state_dict(self) -> dict[str, float]:
        """State for a checkpoint; JSON stores it exactly."""
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a state of `state_dict`."""
        self.count = int(state["count"])
        self.mean, self.squares = float(state["mean"]), float(state["squares"])
