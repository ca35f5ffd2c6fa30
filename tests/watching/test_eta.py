"""The time that a stage still needs, on recorded and made series of (step, seconds)."""

from __future__ import annotations

import random

import pytest

from tasks.eta import Eta


def series(total, seconds, *, first=1, load=20.0):
    """[(step, time)] of a stage that takes `seconds(step)` for a step, after loading."""
    now, told = load, []
    for step in range(first, total + 1):
        now += seconds(step)
        told.append((step, now))
    return told


def errors(total, told, start=0.1):
    """The estimate's relative errors, from this share of the steps of this try on."""
    eta, end, found = Eta(0.0), told[-1][1], []
    first = told[0][0]
    for step, now in told[:-1]:
        eta.tell(step, total, now)
        if step - first + 1 >= start * (total - first + 1):
            left = eta.left(now)
            assert left is not None
            # Of the whole rest: at the very end a second is a large share of what is left.
            found.append((step, (left - (end - now)) / max(end - now, 0.1 * end)))
    return found


def noisy(share, seed=0):
    spread = random.Random(seed)
    return lambda seconds: seconds * (1 + spread.uniform(-share, share))


NOISE = noisy(0.3)
CASES = {
    "even": (200, lambda step: 2.0, 1),
    "noisy": (200, lambda step: NOISE(2.0), 1),
    "drift: replies grow by a third": (300, lambda step: 2.0 * (1 + step / 900), 1),
    "drift: replies shrink by a third": (300, lambda step: 3.0 * (1 - step / 900), 1),
    "a warm-up step ten times as slow": (100, lambda step: 20.0 if step == 1 else 2.0, 1),
    "two warm-up steps": (100, lambda step: 20.0 if step < 3 else 2.0, 1),
    "resumed at 60 %": (100, lambda step: 2.0, 61),
    "resumed at 60 % with a warm-up": (100, lambda step: 20.0 if step == 61 else 2.0, 61),
    "a pause every tenth step": (200, lambda step: 2.0 + 10.0 * (step % 10 == 0), 1),
    "a pause every 25 steps": (250, lambda step: 2.0 + 9.0 * (step % 25 == 0), 1),
    "ten steps": (10, lambda step: 30.0, 1),
}


@pytest.mark.parametrize("case", CASES)
def test_it_is_right_within_a_fifth_from_a_tenth_on(case):
    total, seconds, first = CASES[case]
    told = series(total, seconds, first=first, load=0.0 if case == "ten steps" else 20.0)
    found = errors(total, told)
    worst = max(found, key=lambda each: abs(each[1]))
    assert abs(worst[1]) <= 0.2, worst


def test_steps_of_an_earlier_try_count_for_nothing():
    eta = Eta(0.0)
    eta.tell(61, 100, 30.0)
    assert eta.left(30.0) is None  # sixty steps were not made in these thirty seconds
    eta.tell(62, 100, 34.0)
    assert eta.left(34.0) == pytest.approx(38 * 4.0)


def test_the_same_step_told_again_changes_nothing_and_time_goes_by():
    eta = Eta(0.0)
    for step, now in ((1, 5.0), (2, 7.0), (2, 8.0), (3, 9.0)):
        eta.tell(step, 10, now)
    assert eta.left(9.0) == pytest.approx(14.0)
    assert eta.left(10.5) == pytest.approx(12.5)
    # The fourth step takes longer than its two seconds: the six after it are still to be made.
    assert eta.left(12.0) == eta.left(90.0) == pytest.approx(12.0)
    eta.tell(10, 10, 91.0)
    assert eta.left(91.0) == 0.0
    assert Eta(0.0).left(3.0) is None
