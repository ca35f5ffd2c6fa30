"""Rules on ends of intervals, relative to other metrics, by slice, and on what was not measured."""

from __future__ import annotations

import math

import pytest

from rlhf.config import GateRule
from rlhf.errors import GateRejected
from rlhf.gates import Check, Verdict, judge, require
from rlhf.inference import mean_of, share_of

#: 60 of 100 prompts are wins: of a variance with 99 in its place the size is 99, and Wilson's
#: interval with t of 99 at 0.975, 1.984, is
#: (0.6 + 0.01988 ∓ 1.984 √(0.0024242 + 0.0001004)) / 1.03976 = 0.5003 and 0.6921.
WINS = share_of([1.0] * 60 + [0.0] * 40)
#: Mean 2 of the four means 1, 1, 3, 3: s² = 4/3, error √(4/3/4) = 0.57735, t of 3 is 3.182.
KL = mean_of([1.0, 1.0, 3.0, 3.0])
SAMPLED = {
    **WINS.metrics("win_rate"), **KL.metrics("kl"), "n": 100, "eos_rate": 0.9,
    "tokens_before": 10.0, "tokens_after": 12.0,
    "by_group": {
        "a": {**share_of([1.0] * 30 + [0.0] * 10).metrics("win_rate"), "n": 40},
        "b.c": {**share_of([0.0] * 30).metrics("win_rate"), "n": 30},
        "small": {**share_of([0.0] * 29).metrics("win_rate"), "n": 29},
    },
}  # fmt: skip
METRICS = {"n": 100, "sampled": SAMPLED, "broken": {"win_rate": None, "kl": math.nan}}


def verdict(**rule: object) -> Verdict:
    return judge("gate", "digest", METRICS, [GateRule.model_validate(rule)])


@pytest.mark.parametrize(
    ("rule", "approved"),
    [
        ({"on": "low", "min": 0.5}, True),
        ({"on": "low", "min": 0.501}, False),
        ({"on": "high", "max": 0.6925}, True),
        ({"on": "high", "max": 0.691}, False),
        ({"on": "high", "min": 0.69}, True),  # any end with any bound
        # One-sided at 99 %: t of 99 is 2.365,
        # (0.6 + 0.02824 − 2.365 √0.0025668) / 1.05648 = 0.4812.
        ({"on": "low", "min": 0.481, "confidence": 0.99}, True),
        ({"on": "low", "min": 0.483, "confidence": 0.99}, False),
        # One-sided at 97.5 % it is the end of the two-sided interval.
        ({"on": "low", "min": 0.5002, "confidence": 0.975}, True),
    ],
)
def test_ends_of_a_shares_interval(rule, approved):
    assert verdict(metric="sampled.win_rate", **rule).approved is approved


@pytest.mark.parametrize(
    ("rule", "approved"),
    [
        # 2 + 3.182 · 0.57735 = 3.837.
        ({"max": 3.84}, True),
        ({"max": 3.83}, False),
        # At 90 % one-sided t of 3 is 1.638: 2 + 1.638 · 0.57735 = 2.9457. `n` says 100 prompts,
        # of which t is 1.290 and the end 2.745.
        ({"max": 2.75, "confidence": 0.9}, True),
        ({"max": 2.74, "confidence": 0.9}, False),
    ],
)
def test_ends_of_a_means_interval(rule, approved):
    assert verdict(metric="sampled.kl", on="high", **rule).approved is approved


def test_a_bound_that_is_a_metric_may_have_a_margin():
    rule = {"metric": "sampled.tokens_after", "max": "sampled.tokens_before"}
    assert not verdict(**rule).approved
    assert verdict(**rule, margin=2.0).approved
    assert not verdict(**rule, margin=1.9).approved
    (check,) = verdict(**rule, margin=1.5).checks
    assert check.bound == "≤ sampled.tokens_before + 1.5 (11.5)"
    (check,) = verdict(**rule, margin=-1.5).checks
    assert check.bound == "≤ sampled.tokens_before − 1.5 (8.5)"


def test_a_bound_that_is_a_metric_may_have_a_factor():
    # 10 tokens before: 1.2 times as many are the 12 after.
    rule = {"metric": "sampled.tokens_after", "max": "sampled.tokens_before"}
    assert verdict(**rule, factor=1.2).approved
    assert not verdict(**rule, factor=1.19).approved
    (check,) = verdict(**rule, factor=1.1, margin=0.5).checks
    assert check.bound == "≤ 1.1 × sampled.tokens_before + 0.5 (11.5)"


def test_a_check_shows_rule_number_interval_and_size():
    (check,) = verdict(metric="sampled.win_rate", on="low", min=0.55).checks
    assert (check.value, check.n, check.passed) == (0.6, 100, False)
    assert (check.low, check.high) == (
        pytest.approx(0.5003, abs=1e-4),
        pytest.approx(0.6921, abs=1e-4),
    )
    assert verdict(metric="sampled.win_rate", on="low", min=0.55).reason == (
        "sampled.win_rate = 0.6 [0.5, 0.692], needs lower end ≥ 0.55"
    )
    (check,) = verdict(metric="sampled.win_rate", on="low", min=0.5, confidence=0.99).checks
    assert check.bound == "99 % lower end ≥ 0.5"
    assert check.low == pytest.approx(0.4812, abs=1e-4)


def test_slices():
    got = verdict(metric="sampled.win_rate", on="low", min=0.5, slices=True)
    assert [(c.metric, c.passed, c.n) for c in got.checks] == [
        ("sampled.by_group.a.win_rate", True, 40),
        ("sampled.by_group.b.c.win_rate", False, 30),
        ("sampled.by_group.small.win_rate", True, 29),
    ]
    assert got.checks[2].note == "not judged: 29 prompts, and slice_n = 30"
    assert got.reason.startswith("sampled.by_group.b.c.win_rate = 0 [0, ")
    # 0 of 29 with slice_n = 29 are judged.
    more = verdict(metric="sampled.win_rate", on="low", min=0.5, slices=True, slice_n=29)
    assert [c.passed for c in more.checks] == [True, False, False]
    assert verdict(metric="sampled.win_rate", min=0.5, slices=True, slice_n=31).approved


def test_a_rule_on_slices_of_which_none_is_judged():
    rule = {"metric": "sampled.win_rate", "min": 0.5, "slices": True, "slice_n": 41}
    got = verdict(**rule)
    assert not got.approved
    assert got.reason == ("sampled.win_rate = not measured: no slice has 41 prompts, needs ≥ 0.5")
    assert verdict(**rule, if_missing="skip").approved
    nowhere = judge("gate", "d", {"n": 3}, [GateRule(metric="sampled.kl", max=1, slices=True)])
    assert not nowhere.approved


def test_a_slice_counts_once_and_by_slice_has_slices_too():
    part = {**share_of([1.0] * 50).metrics("accuracy"), "n": 80, "prompts": 50}
    metrics = {"by_slice": {"x": part, "y": part}, "by_group": {"x": part, "z": part}}
    rule = GateRule(metric="accuracy", min=0.5, slices=True, slice_n=50)
    names = [check.metric for check in judge("g", "d", metrics, [rule]).checks]
    assert names == ["by_slice.x.accuracy", "by_slice.y.accuracy", "by_group.z.accuracy"]
    # The number of prompts decides, not that of pairs.
    rule = GateRule(metric="accuracy", min=0.5, slices=True, slice_n=51)
    assert not judge("g", "d", metrics, [rule]).approved


def test_what_was_not_measured_may_be_skipped_but_not_what_is_broken():
    gone = {"metric": "sampled.judge_win_rate", "on": "low", "min": 0.5}
    assert not verdict(**gone).approved
    got = verdict(**gone, if_missing="skip")
    assert got.approved
    assert got.checks == (
        Check("sampled.judge_win_rate", None, "lower end ≥ 0.5", True, note="not measured"),
    )
    assert got.approval == "it met every gate (1 not measured)"
    # JSON has null where a number is not finite: it was measured, and is broken.
    for name in ("broken.win_rate", "broken.kl"):
        assert not verdict(metric=name, min=0, if_missing="skip").approved
    # The interval is missing, as with one prompt: the metric was measured, and shows nothing.
    assert not verdict(metric="sampled.eos_rate", on="low", min=0, if_missing="skip").approved
    # A bound that was not measured.
    relative = {"metric": "sampled.kl", "max": "sampled.kl_exact"}
    assert not verdict(**relative).approved
    assert verdict(**relative, if_missing="skip").approved


def test_no_rules_never_say_that_every_gate_was_met():
    for rules in ((), None):
        got = judge("gate", "digest", METRICS, rules)
        assert got.approved
        assert got.approval == "not judged: its gate is none in the configuration"
        assert require("m", "digest", got).subject == "m"
    assert verdict(metric="sampled.kl", max=9).approval == "it met every gate"


def test_an_older_form_has_equal_results():
    for least in (0.5, 0.501):
        older = verdict(metric="sampled.win_rate_low", min=least)
        assert older.approved is verdict(metric="sampled.win_rate", on="low", min=least).approved
    with pytest.raises(GateRejected, match=r"sampled\.win_rate_low = 0\.5\d+, needs ≥ 0\.501$"):
        require("m", "digest", older)
