"""Intervals, tests and sample sizes: values by hand, properties, coverage by simulation."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf.inference import (
    Estimate,
    holm,
    mean_bound,
    mean_of,
    mean_p_value,
    power_of_share,
    prompts_needed,
    share_bound,
    share_of,
    stratified_share,
    t_quantile,
    wilson,
)

HALVES = {"a": 0.5, "b": 0.5}

# --- values by hand -------------------------------------------------------------------------


def test_wilson():
    # p = 0.8, n = 10, z = 1.96: z²/n = 0.38416; centre (0.8 + 0.19208)/1.38416 = 0.71674;
    # half 1.96 · √(0.016 + 0.009604)/1.38416 = 0.22658
    assert wilson(0.8, 10, 1.96) == pytest.approx((0.49016, 0.94332), abs=1e-5)
    # p = 0: from 0 to z²/n / (1 + z²/n) = 0.38416/1.38416
    assert wilson(0, 10, 1.96) == (0, pytest.approx(0.27754, abs=1e-5))
    assert wilson(1, 10, 1.96) == (pytest.approx(1 - 0.27754, abs=1e-5), 1)
    assert wilson(0.8, 10, math.inf) == (0, 1)


def test_quantiles():
    # tables of Student's t
    assert t_quantile(0.95, 2) == pytest.approx(12.7062, abs=1e-4)
    assert t_quantile(0.95, 11) == pytest.approx(2.2281, abs=1e-4)
    assert t_quantile(0.95, 10_000) == pytest.approx(1.9602, abs=1e-4)
    assert t_quantile(0.95, 1) == t_quantile(0.95, 0) == math.inf


def test_a_share_of_independent_observations():
    got = share_of([1, 0, 1, 1])
    # u = (1, −3, 1, 1)/16, v = 4/3 · 12/256 = 1/16; size 0.1875 · 16 = 3, that is n − 1
    assert (got.value, got.error, got.clusters) == (0.75, pytest.approx(0.25), 4)
    assert got.size == pytest.approx(3)
    # t(0.975, 3) = 3.1824, z²/n = 3.37605; centre (0.75 + 1.68803)/4.37605 = 0.55713;
    # half 3.1824 · √(0.0625 + 0.28134)/4.37605 = 0.42643
    assert (got.low, got.high) == pytest.approx((0.13070, 0.98356), abs=1e-4)


def test_a_share_by_prompts():
    got = share_of([1, 1, 1, 0], ["a", "a", "b", "c"])
    # sums of u = (x − 0.75)/4 by prompt: 2/16, 1/16, −3/16; v = 3/2 · 14/256 = 0.0820313
    assert got.value == 0.75
    assert got.error == pytest.approx(0.0820313**0.5)
    assert (got.size, got.clusters) == (pytest.approx(0.1875 / 0.0820313), 3)
    assert (got.low, got.high) == wilson(0.75, got.size, t_quantile(0.95, 3))
    # Each prompt twice the same: half of the observations tell nothing.
    twice = share_of([1, 1, 0, 0, 1, 1], [0, 0, 1, 1, 2, 2])
    assert twice == share_of([1, 0, 1])


def test_replies_that_differ_by_chance_are_not_believed():
    """Both prompts have one of two right: that is no sign of a certain 50 %."""
    # Sums by prompt are 0; independent: u = ±1/8, v = 4/3 · 4/64 = 1/12; size 0.25 · 12 = 3
    got = share_of([1, 0, 0, 1], ["a", "a", "b", "b"])
    assert got.error == 0
    assert got.size == pytest.approx(3)
    # The same with sums that are 0 but for rounding.
    thirds = share_of([1, 0, 0, 0, 1, 0], ["a", "a", "a", "b", "b", "b"])
    assert thirds.size == pytest.approx(5)


@pytest.mark.parametrize("value", [0.0, 0.5, 0.9, 1.0])
def test_equal_observations_leave_the_uncertainty_of_their_prompts(value):
    got = share_of([value] * 21, [*range(7)] * 3)
    assert got.value == pytest.approx(value)
    assert (got.size, got.clusters) == (7, 7)
    assert got.error == pytest.approx(0, abs=1e-12)
    assert got.high - got.low > 0.4


def test_one_prompt_has_no_interval():
    share, mean = share_of([1, 1, 0], ["p"] * 3), mean_of([1.0, 5.0], ["p", "p"])
    assert (share.low, share.high, share.clusters) == (0, 1, 1)
    assert (mean.value, mean.low, mean.high) == (3, -math.inf, math.inf)
    # JSON has no infinity
    assert share.metrics("x") == {"x": share.value, "x_low": 0, "x_high": 1, "x_size": 1}
    assert mean.metrics("x") == {"x": 3, "x_size": 1}


def test_strata_count_alike():
    values, strata = [1] * 6 + [0] * 2 + [1, 0], "aaaaaaaabb"
    got = stratified_share(values, range(10), strata, HALVES)
    # 3/4 and 1/2; squares about them 1.5 and 0.5: v = 10/9 · (1.5/8² + 0.5/2²)/2²
    assert got.value == pytest.approx(0.625)
    assert got.error == pytest.approx((10 / 9 * (1.5 / 64 + 0.5 / 4) / 4) ** 0.5)
    long, short = share_of(values[:8]), share_of(values[8:])
    low = math.hypot(long.value - long.low, short.value - short.low) / 2
    high = math.hypot(long.high - long.value, short.high - short.value) / 2
    # the wider side of the two decides, so that the interval holds the other
    assert got.low <= 0.625 - low + 1e-9
    assert got.high >= 0.625 + high - 1e-9
    assert got.low == pytest.approx(0.625 - low) or got.high == pytest.approx(0.625 + high)
    assert (got.low, got.high) == wilson(0.625, got.size, t_quantile(0.95, 10))


def test_a_small_stratum_is_not_certain():
    """Three of three leave room: the mean of 0.75 and 1 may as well be 0.6."""
    values, strata = [1] * 60 + [0] * 20 + [1] * 3, "a" * 80 + "b" * 3
    assert stratified_share(values, range(83), strata, HALVES).low < 0.62
    assert stratified_share([1, 1, 0], range(3), "aab", HALVES).value == 0.5
    whole = stratified_share([1, 0, 1], range(3), "aaa", {"a": 1})
    assert (whole.value, whole.low) == (
        pytest.approx(2 / 3),
        pytest.approx(share_of([1, 0, 1]).low),
    )
    # weights other than halves: 0.9 · 2/3 + 0.1 · 0
    uneven = stratified_share([1, 0, 1, 0], range(4), "aaab", {"a": 0.9, "b": 0.1})
    assert uneven.value == pytest.approx(0.6)
    alone = stratified_share([1, 0], "pp", "ab", HALVES)
    assert (alone.low, alone.high, alone.clusters) == (0, 1, 1)


def test_strata_of_the_same_prompts_depend_on_each_other():
    """Each prompt is right or wrong in both strata: as uncertain as either of them alone."""
    right = [1, 1, 1, 0, 1, 1, 0, 1, 1, 0] * 3
    both = stratified_share(right * 2, [*range(30)] * 2, "a" * 30 + "b" * 30, HALVES)
    one = share_of(right)
    assert (both.low, both.high) == pytest.approx((one.low, one.high), abs=1e-6)
    apart = stratified_share(right * 2, range(60), "a" * 30 + "b" * 30, HALVES)
    assert apart.high - apart.low < 0.75 * (one.high - one.low)


@pytest.mark.parametrize("values", [[], [1.2], [-0.1, 1], [math.nan]])
def test_what_is_no_share(values):
    with pytest.raises(ValueError, match="a share needs observations between 0 and 1"):
        share_of(values)


def test_a_mean():
    got = mean_of([1.0, 2.0, 6.0])
    # s² = (4 + 1 + 9)/2 = 7, error √(7/3) = 1.52753; t(0.975, 2) = 4.30265
    assert (got.value, got.error) == (3, pytest.approx(1.52753, abs=1e-5))
    assert (got.low, got.high) == pytest.approx((3 - 6.57243, 3 + 6.57243), abs=1e-4)
    # prompts of 2 and 1: sums of (x − 3)/3: −1, 1; v = 2 · 2 = 4
    got = mean_of([1.0, 2.0, 6.0], ["a", "a", "b"])
    assert (got.error, got.size, got.clusters) == (pytest.approx(2), 2, 2)
    with pytest.raises(ValueError, match="needs observations"):
        mean_of([])


def test_metrics_of_an_estimate():
    assert Estimate(0.5, 0.4, 0.6, 100, 20, 0.05).metrics("win_rate") == {
        "win_rate": 0.5, "win_rate_low": 0.4, "win_rate_high": 0.6, "win_rate_size": 100,
        "win_rate_error": 0.05,
    }  # fmt: skip


def test_bounds_on_one_side():
    # 97.5 % on one side is the bound of the two-sided 95 %
    got = share_of([1, 1, 0, 1, 0])
    assert share_bound(got.value, got.size, 5, 0.975) == (got.low, got.high)
    got = mean_of([1.0, 2.0, 6.0])
    assert mean_bound(3, got.error, 3, 0.975) == pytest.approx((got.low, got.high))
    # t(0.95, 2) = 2.91999
    assert mean_bound(3, 1.0, 3, 0.95)[0] == pytest.approx(3 - 2.91999, abs=1e-4)
    assert mean_bound(3, 0.0, 1, 0.95) == (-math.inf, math.inf)


def test_holm():
    # of three known: 3 · 0.01; 2 · 0.03; max(0.06, 1 · 0.04)
    got = holm({"a": 0.04, "b": 0.01, "c": math.nan, "d": 0.03})
    assert {k: v for k, v in got.items() if k != "c"} == pytest.approx(
        {"a": 0.06, "b": 0.03, "d": 0.06}
    )
    assert math.isnan(got["c"])
    assert holm({"a": 0.9, "b": 0.8}) == {"a": 1, "b": 1}
    assert holm({}) == {}


def test_the_p_value_of_a_mean():
    # mean 2, error 1/√3, t = 2√3; with 2 degrees of freedom p = 1 − t/√(t² + 2) = 1 − √(12/14)
    assert mean_p_value([1, 2, 3]) == pytest.approx(1 - (12 / 14) ** 0.5)
    assert mean_p_value([-1, -2, -3]) == pytest.approx(1 - (12 / 14) ** 0.5)
    assert mean_p_value([0, 0, 0]) == 1
    # Differences that cancel within each prompt are no effect, also where sums are rounded.
    assert mean_p_value([1, -1, 1, -1], ["a", "a", "b", "b"]) == 1
    assert mean_p_value([0.1, 0.2, -0.3] * 2, ["a"] * 3 + ["b"] * 3) == 1
    assert math.isnan(mean_p_value([1, 2], ["a", "a"]))
    # Three equal differences: the signs are all alike with probability 2 · ½³
    assert mean_p_value([0.7, 0.7, 0.7]) == 0.25


def test_power_by_hand():
    # m = 100, σ₀ = 0.05, σ₁ = √0.0024 = 0.0489898, t(0.975, 99) = 1.98422:
    # (0.1 − 0.0992109)/0.0489898 = 0.016107; Φ = 0.506425
    assert power_of_share(0.6, 0.5, 100, 0.5, 0.975) == pytest.approx(0.506425, abs=1e-5)
    # Half the spread is as good as four times the prompts, but for the quantile.
    assert power_of_share(0.6, 0.5, 100, 0.25, 0.975) == pytest.approx(
        power_of_share(0.6, 0.5, 400, 0.5, 0.975), abs=0.005
    )
    assert power_of_share(0.6, 0.5, 1, 0.5, 0.975) == 0
    assert power_of_share(1.0, 0.5, 1000, 0.5, 0.975) == 1
    for than, spread in ((0, 0.5), (1, 0.5), (0.5, 0)):
        with pytest.raises(ValueError, match="no power"):
            power_of_share(0.6, than, 10, spread, 0.975)


def test_power_is_that_of_the_bound():
    """Of 2,000 evaluations of 120 prompts with a true 62 % as many exceed 50 % as is said."""
    rng, prompts = np.random.default_rng(0), 120
    passed = 0
    for _ in range(2000):
        got = share_of((rng.random(prompts) < 0.62).astype(float).tolist())
        passed += share_bound(got.value, got.size, prompts, 0.975)[0] > 0.5
    expected = power_of_share(0.62, 0.5, prompts, 0.5, 0.975)
    assert 0.7 < expected < 0.8
    assert passed / 2000 == pytest.approx(expected, abs=0.04)


@pytest.mark.parametrize(("true", "spread"), [(0.55, 0.5), (0.6, 0.4), (0.65, 0.5), (0.99, 0.1)])
def test_the_fewest_prompts(true, spread):
    n = prompts_needed(true, 0.5, spread, 0.95)
    assert power_of_share(true, 0.5, n, spread, 0.95) >= 0.8
    assert n == 2 or power_of_share(true, 0.5, n - 1, spread, 0.95) < 0.8


def test_the_textbooks_number_of_prompts():
    # (z₀.₉₇₅ · 0.5 + z₀.₈ · √0.24)²/0.1² = (0.97998 + 0.41231)²/0.01 = 193.8, and t asks for more
    assert 194 <= prompts_needed(0.6, 0.5, 0.5, 0.975) <= 197
    with pytest.raises(ValueError, match="never exceeds"):
        prompts_needed(0.5, 0.5, 0.5, 0.975)


# --- properties -------------------------------------------------------------------------------

observations = st.lists(
    st.tuples(st.sampled_from([0.0, 0.25, 0.5, 1.0]), st.integers(0, 5)), min_size=1, max_size=40
)


@given(observations)
def test_an_interval_holds_its_share(rows):
    values, prompts = zip(*rows, strict=True)
    got = share_of(values, prompts)
    assert 0 <= got.low <= got.value <= got.high <= 1
    mirrored = share_of([1 - v for v in values], prompts)
    assert (mirrored.low, mirrored.high) == pytest.approx((1 - got.high, 1 - got.low), abs=1e-9)


@given(observations, st.randoms(use_true_random=False))
def test_order_and_names_do_not_matter(rows, rng: random.Random):
    values, prompts = zip(*rows, strict=True)
    shuffled = rng.sample(rows, len(rows))
    again = share_of([v for v, _ in shuffled], [f"prompt {p}" for _, p in shuffled])
    got = share_of(values, prompts)
    ours, theirs = ((e.value, e.low, e.high, e.size) for e in (got, again))
    assert ours == pytest.approx(theirs, abs=1e-9)


@given(observations)
def test_prompts_of_one_observation_are_independent(rows):
    values = [v for v, _ in rows]
    assert share_of(values) == share_of(values, range(len(values)))


@given(observations, st.floats(-5, 5))
def test_a_mean_moves_with_its_observations(rows, shift):
    values, prompts = zip(*rows, strict=True)
    one, other = mean_of(values, prompts), mean_of([v + shift for v in values], prompts)
    assert other.value == pytest.approx(one.value + shift, abs=1e-9)
    assert other.error == pytest.approx(one.error, abs=1e-9)


@given(st.dictionaries(st.text(max_size=3), st.floats(0, 1), max_size=12))
def test_adjusted_values_keep_their_order(p_values):
    adjusted = holm(p_values)
    assert adjusted.keys() == p_values.keys()
    for name, p in p_values.items():
        assert p <= adjusted[name] <= min(1, len(p_values) * p) + 1e-12
        assert all(adjusted[name] <= adjusted[o] for o, q in p_values.items() if p < q)


@given(st.floats(0.01, 0.99), st.floats(1, 1e4), st.floats(0.1, 20))
def test_a_bound_is_where_the_score_test_rejects(p, size, z):
    """At Wilson's bounds the distance is z standard errors of the bound itself."""
    for bound in wilson(p, size, z):
        if 1e-3 < bound < 0.999:
            error = math.sqrt(bound * (1 - bound) / size)
            assert abs(p - bound) == pytest.approx(z * error, rel=1e-6)


# --- coverage ---------------------------------------------------------------------------------


def test_intervals_of_strata_cover():
    """A stratum of 12 beside one of 60, of which most are right."""
    rng, hits = np.random.default_rng(2), 0
    strata = "a" * 60 + "b" * 12
    for _ in range(1000):
        values = (rng.random(72) < np.repeat([0.9, 0.8], [60, 12])).astype(float)
        got = stratified_share(values.tolist(), range(72), strata, HALVES)
        hits += got.low <= 0.85 <= got.high
    assert 0.93 - 0.014 <= hits / 1000 <= 0.985


@pytest.mark.parametrize(
    ("prompts", "share", "correlation", "tie"),
    [(40, 0.7, 0.3, 0.0), (150, 0.9, 0.3, 0.0), (150, 0.6, 0.2, 0.5)],
)
def test_intervals_cover(prompts, share, correlation, tie):
    """95 % intervals of correlated pairs cover 93–97 %, give or take two errors of 1,000 draws."""
    rng = np.random.default_rng(1)
    hits = 0
    a, b = (q * (1 - correlation) / correlation for q in (share, 1 - share))
    for _ in range(1000):
        keys = np.repeat(np.arange(prompts), rng.integers(1, 7, prompts))
        right = rng.random(len(keys)) < rng.beta(a, b, prompts)[keys]
        values = np.where(rng.random(len(keys)) < tie, 0.5, right)
        got = share_of(values.tolist(), keys.tolist())
        hits += got.low <= share * (1 - tie) + tie / 2 <= got.high
    assert 0.93 - 0.014 <= hits / 1000 <= 0.97 + 0.014
