"""Detectors and the choice of the watchdog, on frontiers made by hand."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from rlhf.config import PPOConfig
from rlhf.config.watchdog import WatchdogConfig
from rlhf.inference import positive_mean_p_value
from rlhf.ppo.frontier import DETECTORS, Frontier, Look, find

CONFIG = WatchdogConfig()
START = Look(0, kl=0.0, entropy=2.0, tokens=20.0, eos_rate=0.9, value_loss=None)


def scores(mean: float, spread: float = 1.0, n: int = 64) -> tuple[float, ...]:
    """Values with a mean, alternately above and below it."""
    return tuple(mean + spread * (-1) ** i for i in range(n))


def judged(update, judge, proxy, kl=1.0, spread=1.0, **values) -> Look:
    """A look whose judge's scores differ from those of others by the mean, and by noise.

    The judge's noise alternates with a period of its own, so that paired differences have it too.
    """
    noise = tuple(judge + spread * (-1) ** (i // (1 + update)) for i in range(64))
    return replace(
        START, update=update, kl=kl, judges=noise, proxies=scores(proxy), **values
    )  # fmt: skip


def run(*looks, config=CONFIG, planned=9) -> Frontier:
    frontier = Frontier()
    for look in looks:
        frontier.add(look, config, planned)
    return frontier


# --- limits ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("detector", "bad", "fine"),
    [
        ("kl_above_budget", {"kl": 30.1}, {"kl": 30.0}),
        ("entropy_collapse", {"entropy": 0.039}, {"entropy": 0.04}),  # 0.02 · 2.0
        ("length_explosion", {"tokens": 80.1}, {"tokens": 80.0}),  # 4 · 20
        ("eos_loss", {"eos_rate": 0.44}, {"eos_rate": 0.45}),  # 0.5 · 0.9
        (
            "value_collapse", {"explained_variance": -1.1, "value_loss": 10.1},
            {"explained_variance": -60.0, "value_loss": 10.0},  # all rewards are nearly equal
        ),
        ("value_collapse", {"explained_variance": -1.1, "value_loss": 10.1},
         {"explained_variance": -1.0, "value_loss": 99.0}),
    ],
)  # fmt: skip
def test_limits(detector, bad, fine):
    first = replace(START, update=4, explained_variance=0.0, value_loss=1.0)
    looks = [START, first]
    for update, values in ((8, bad), (12, bad)):
        looks.append(replace(first, update=update, **values))
    found = find(looks, CONFIG, 9)
    assert found is not None
    assert (found.detector, found.update) == (detector, 12)
    # Once is no reason, nor is twice with a look between; a value at the limit is within it.
    assert find(looks[:3], CONFIG, 9) is None
    assert find([*looks[:3], replace(first, update=12), looks[3]], CONFIG, 9) is None
    fine_looks = [START, first, *(replace(first, update=u, **fine) for u in (8, 12))]
    assert find(fine_looks, CONFIG, 9) is None
    # The last one within the limits goes on.
    frontier = run(*looks)
    assert frontier.stopped == found
    assert frontier.choose(CONFIG)[0] == 4


def test_limits_that_are_off_find_nothing():
    off = WatchdogConfig(
        max_kl=None, min_entropy=0, max_length=None, min_eos=0, min_explained_variance=None
    )
    first = replace(START, update=4, explained_variance=0.0, value_loss=1.0)
    bad = replace(
        first, kl=1e3, entropy=0.0, tokens=1e4, eos_rate=0.0, explained_variance=-9.0,
        value_loss=1e6,
    )  # fmt: skip
    assert [name for name, detect in DETECTORS.items() if detect([START, first, bad], off, 9)] == []


def test_a_critic_that_never_learned_has_not_collapsed():
    start = replace(START, explained_variance=-46.0, proxies=scores(0.0, 0.1))
    bad = [replace(start, update=u, explained_variance=-36.0, value_loss=0.4) for u in (4, 8)]
    assert find([start, *bad], CONFIG, 9) is None  # 0.4 is 80 times 0.1² / 2
    found = find([replace(start, explained_variance=-0.9), *bad], CONFIG, 9)
    assert found is not None
    assert "80 times" in found.evidence


def test_few_replies_that_end_at_the_start_have_nothing_to_lose():
    rarely = replace(START, eos_rate=0.19)
    lost = [replace(rarely, update=u, eos_rate=0.0) for u in (4, 8)]
    assert find([rarely, *lost], CONFIG, 9) is None


# --- over-optimisation ----------------------------------------------------------------------------


def test_a_fall_of_the_judge_while_the_reward_rises():
    frontier = run(
        judged(0, 0.0, 0.0), judged(4, 2.0, 2.0, kl=4), judged(8, 0.5, 3.0, kl=8),
        judged(12, 0.0, 4.0, kl=12),
    )  # fmt: skip
    assert frontier.stopped is not None
    assert frontier.stopped.detector == "over_optimisation"
    assert "below that of update 4" in frontier.stopped.evidence
    assert "rose from 2.000 to 4.000" in frontier.stopped.evidence
    assert frontier.choose(CONFIG)[0] == 4


def test_where_the_reward_falls_too_it_is_not_over_optimised():
    frontier = run(
        judged(0, 0.0, 0.0), judged(4, 2.0, 2.0), judged(8, 0.0, 1.5), judged(12, 0.0, 1.5)
    )
    assert frontier.stopped is None
    assert frontier.choose(CONFIG)[0] == 4  # the judge's best, all the same


def test_the_level_is_shared_by_all_looks():
    """Differences are d ± 2 by halves: error 2/√63, one-sided p of t = d·√63/2 with 63 degrees.

    d = 0.7: t = 2.778, p = 0.0036. With two earlier looks the level is 0.05/(L·2): 0.0125 with
    L = 2, which it is below, and 0.0028 with L = 9, which it is not.
    """
    best, low = (0.7 + 1, 0.7 - 1), (-1, 1)
    looks = [
        replace(START, judges=(-9.0,) * 64, proxies=scores(0)),
        replace(START, update=4, judges=best * 32, proxies=scores(1)),
        replace(START, update=8, judges=low * 32, proxies=scores(2)),
    ]
    once = WatchdogConfig(patience=1)
    fall = [a - b for a, b in zip(looks[1].judges, looks[2].judges, strict=True)]
    assert positive_mean_p_value(fall) == pytest.approx(0.0036, abs=1e-4)
    assert find(looks, once, 2) is not None
    assert find(looks, once, 9) is None


def test_p_values_of_one_side():
    assert positive_mean_p_value([1.0, -1.0]) == 0.5
    assert positive_mean_p_value([1.0, 1.0]) == 0.0
    assert positive_mean_p_value([-1.0, -1.0]) == 1.0
    assert positive_mean_p_value([0.0, 0.0]) == 1.0
    assert positive_mean_p_value([5.0]) == 1.0
    # Mean 1, error √(2·(1/2)²·2)/2... of 0.5, 1.5: deviation 0.707, error 0.5, t = 2 with one
    # degree of freedom (Cauchy): 1/2 − arctan(2)/π = 0.1476.
    assert positive_mean_p_value([0.5, 1.5]) == pytest.approx(0.1476, abs=1e-4)


# --- the choice -----------------------------------------------------------------------------------


def test_a_rising_judge_takes_the_last():
    frontier = run(*(judged(u, u / 4, u / 4, kl=u / 4) for u in range(0, 37, 4)))
    assert frontier.stopped is None
    assert frontier.choose(CONFIG) == (36, "the last update goes on")


def test_within_noise_the_last_goes_on_and_after_a_stop_the_earlier():
    """Gains within noise retain the earlier look."""
    looks = [judged(0, 0.0, 0.0), judged(4, 2.0, 2.0, kl=4), judged(8, 2.01, 3.0, kl=8)]
    frontier = run(*looks)
    assert frontier.retained == 4
    assert frontier.choose(CONFIG)[0] == 8
    stopped = [replace(judged(u, 2.01, 3.0, kl=31.0)) for u in (12, 16)]
    assert run(*looks, *stopped).choose(CONFIG)[0] == 4


@pytest.mark.parametrize(("gain", "retained"), [(0.25, 0), (0.32, 0), (0.36, 4), (1.0, 4)])
def test_a_gain_displaces_beyond_noise(gain, retained):
    """With noise of 1 around paired gains over 64 prompts the error is 1.008 / 8 = 0.126.

    The one-sided 0.5 % point of Student's t with 63 degrees of freedom is 2.656: a gain of 0.335.
    """
    start = replace(START, judges=(0.0,) * 64, proxies=scores(0.0))
    after = replace(start, update=4, kl=4.0, judges=scores(gain))
    assert run(start, after).retained == retained
    # No loss is finite after it: it goes on only if it is better than the start.
    assert run(start, after).has_gained == (retained == 4)


def test_less_kl_for_no_lower_score_displaces():
    frontier = run(judged(0, 0.0, 0.0), judged(4, 2.0, 2.0, kl=6), judged(8, 2.0, 2.0, kl=5))
    assert frontier.retained == 8


def test_a_last_look_beyond_a_limit_does_not_go_on():
    frontier = run(START, replace(START, update=4), replace(START, update=8, kl=31.0))
    assert frontier.stopped is None
    chosen, reason = frontier.choose(CONFIG)
    assert chosen == 4
    assert "31.0 nats" in reason


def test_a_frontier_survives_json():
    frontier = run(judged(0, 0.0, 0.0), judged(4, 2.0, 2.0), replace(START, update=8, kl=40.0))
    assert Frontier.of(json.loads(json.dumps(frontier.state_dict()))) == frontier
    row = frontier.looks[1].row()
    assert row["judge"] == pytest.approx(2.0, abs=0.1)
    assert row["judge_low"] < row["judge"] < row["judge_high"]


def test_a_target_beyond_the_budget_is_refused():
    with pytest.raises(ValueError, match=r"kl_target = 30 .*watchdog\.max_kl = 30.*raise the latt"):
        PPOConfig(kl_controller="adaptive", kl_target=30)
    PPOConfig(kl_controller="adaptive", kl_target=30, watchdog=None)
