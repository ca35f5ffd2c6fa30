"""Statistics of evaluations and replies: Wilson intervals and n-gram repetition."""

from __future__ import annotations

from collections.abc import Sequence

from scipy.stats import binomtest


def share(name: str, successes: float, n: int) -> dict[str, float]:
    """Return a share with its 95 % Wilson interval, as `name`, `name_low` and `name_high`.

    Ties count a half each, so `successes` may be fractional; the interval rounds it.
    """
    interval = binomtest(round(successes), n).proportion_ci(0.95, "wilson")
    return {
        name: successes / n,
        f"{name}_low": float(interval.low),
        f"{name}_high": float(interval.high),
    }


def repeated_ngrams(words: Sequence[str], n: int) -> float:
    """Return the share of n-grams that repeat an earlier one; 0 for fewer than `n` words."""
    ngrams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(ngrams)) / len(ngrams) if ngrams else 0.0
