"""Gates, approvals and errors that travel between processes."""

from __future__ import annotations

import copy
import inspect
import math
import pickle

import pytest

from rlhf import errors
from rlhf.config import GateRule
from rlhf.errors import GateRejected, is_retriable
from rlhf.gates import Approved, Verdict, flat_metrics, judge, require

METRICS = {
    "accuracy": 0.7,
    "baseline": 0.6,
    "nan": math.nan,
    "inf": math.inf,
    "text": "0.9",
    "yes": True,
    "none": None,
    "sampled": {"kl": 3, "by": {"x": 0.5}},
}


def verdict(*rules: GateRule) -> Verdict:
    return judge("gate", "digest", METRICS, rules)


def test_flat_metrics():
    flat = dict(flat_metrics(METRICS))
    assert math.isnan(flat.pop("nan"))
    assert flat == {
        "accuracy": 0.7,
        "baseline": 0.6,
        "inf": math.inf,
        "sampled.kl": 3,
        "sampled.by.x": 0.5,
    }


@pytest.mark.parametrize(
    ("rule", "approved"),
    [
        ({"metric": "accuracy", "min": 0.7}, True),  # bounds are inclusive
        ({"metric": "accuracy", "min": 0.71}, False),
        ({"metric": "accuracy", "max": 0.7}, True),
        ({"metric": "accuracy", "max": 0.69}, False),
        ({"metric": "accuracy", "min": 0.6, "max": 0.8}, True),
        ({"metric": "accuracy", "min": 0.6, "max": 0.65}, False),
        ({"metric": "accuracy", "min": 0.75, "max": 0.8}, False),
        ({"metric": "accuracy", "min": "baseline"}, True),
        ({"metric": "baseline", "min": "accuracy"}, False),
        ({"metric": "baseline", "max": "accuracy"}, True),
        ({"metric": "accuracy", "min": "unknown"}, False),
        ({"metric": "accuracy", "max": "unknown"}, False),
        ({"metric": "accuracy", "min": "nan"}, False),
        ({"metric": "unknown", "min": 0}, False),
        ({"metric": "nan", "min": 0}, False),
        ({"metric": "nan", "max": 0}, False),
        ({"metric": "inf", "min": 0}, False),
        ({"metric": "text", "min": 0}, False),
        ({"metric": "yes", "min": 0}, False),
        ({"metric": "none", "max": 9}, False),
        ({"metric": "sampled.kl", "max": 3}, True),
        ({"metric": "sampled.by.x", "min": 0.6}, False),
    ],
    ids=str,
)
def test_rules(rule, approved):
    assert verdict(GateRule(**rule)).approved is approved


def test_all_rules_have_to_hold():
    good = GateRule(metric="accuracy", min=0)
    bad = GateRule(metric="accuracy", min=1)
    assert verdict(good, good).approved
    assert not verdict(good, bad).approved
    assert not verdict(bad, good).approved
    assert verdict().approved  # no rules, nothing to be wrong


def test_the_reason_names_metric_value_and_bound():
    got = verdict(
        GateRule(metric="accuracy", min=0.9, max="baseline"),
        GateRule(metric="gone", max=1),
        GateRule(metric="sampled.kl", max=20),
        GateRule(metric="nan", min=0),
        GateRule(metric="baseline", min="gone"),
    )
    assert got.reason == (
        "accuracy = 0.7, needs ≥ 0.9 and ≤ baseline (0.6); gone = missing, needs ≤ 1; "
        "nan = missing, needs ≥ 0; baseline = 0.6, needs ≥ gone (nan)"
    )
    assert [c.passed for c in got.checks] == [False, False, True, False, False]
    assert verdict().reason == ""


GOOD = GateRule(metric="accuracy", min=0)


def test_an_approval_is_earned():
    approved = require("model", "digest", verdict(GOOD))
    assert approved.subject == "model"
    assert approved.verdict == verdict(GOOD)
    assert approved.map(len).subject == 5
    assert approved.map(len).verdict is approved.verdict


def test_an_approval_is_not_made():
    for seal in (object(), None, True):
        with pytest.raises(TypeError, match=r"rlhf\.gates\.require"):
            Approved("model", verdict(GOOD), seal)


def test_a_rejection_is_raised_with_its_verdict():
    rejected = verdict(GateRule(metric="accuracy", min=0.9))
    with pytest.raises(GateRejected, match=r"^gate: accuracy = 0.7, needs ≥ 0.9$") as caught:
        require("model", "digest", rejected)
    assert caught.value.verdict is rejected


def test_a_verdict_of_another_model_approves_nothing():
    with pytest.raises(GateRejected, match=r"verdict is of digest, not of other; run the gate"):
        require("model", "other", verdict(GOOD))


# --- errors -----------------------------------------------------------------------------------

CLASSES = [
    c for _, c in inspect.getmembers(errors, inspect.isclass) if c.__module__ == errors.__name__
]


@pytest.mark.parametrize("kind", CLASSES, ids=lambda c: c.__name__)
def test_errors_survive_pickling(kind):
    rejected = verdict(GateRule(metric="accuracy", min=0.9))
    more = {GateRejected: [rejected], errors.PromptUnusable: ["40 tokens", "raise the limit"]}
    error = kind("what went wrong", *more.get(kind, []))
    for again in (pickle.loads(pickle.dumps(error)), copy.copy(error)):
        assert type(again) is kind
        assert again.args == error.args
        assert str(again) == str(error)
        assert "what went wrong" in str(again)
        if kind is GateRejected:
            assert again.verdict == rejected


def test_errors_are_the_standard_ones_too():
    assert len(CLASSES) == 28
    assert all(issubclass(c, errors.RLHFError) for c in CLASSES)
    for ours, standard in [
        (errors.ConfigError, ValueError),
        (errors.DataError, ValueError),
        (errors.StoreError, OSError),
        (errors.TrainingError, ArithmeticError),
    ]:
        assert issubclass(ours, standard)


@pytest.mark.parametrize(
    ("error", "worth"),
    [
        (errors.StoreError("x"), True),
        (errors.StoreConfigError("x"), False),
        (errors.ArtifactMissing("x"), False),
        (errors.ArtifactCorrupt("x"), False),
        (errors.ConfigError("x"), False),
        (errors.DataError("x"), False),
        (errors.TrainingError("x"), False),
        (errors.WorkerDied("x"), True),
        (GateRejected("x"), False),
        (ConnectionResetError(), True),
        (TimeoutError(), True),
        (OSError(28, "no space"), True),
        (MemoryError(), True),
        (ValueError(), False),
        (KeyboardInterrupt(), False),
    ],
    ids=repr,
)
def test_worth_retrying(error, worth):
    assert is_retriable(error) is worth
