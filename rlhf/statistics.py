"""Confidence intervals of shares."""

from scipy.stats import binomtest


def share(name: str, successes: float, n: int) -> dict[str, float]:
    """A share with its 95 % Wilson interval, as `name`, `name_low` and `name_high`.

    Ties count a half each, so `successes` may be fractional; the interval takes it rounded.
    """
    interval = binomtest(round(successes), n).proportion_ci(0.95, "wilson")
    return {
        name: successes / n,
        f"{name}_low": float(interval.low),
        f"{name}_high": float(interval.high),
    }
