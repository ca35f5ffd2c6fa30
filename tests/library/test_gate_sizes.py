"""Gates that can't be passed with so few held-out rows, and what the comparison can find."""

from __future__ import annotations

import pytest

from rlhf.config import PipelineConfig
from rlhf.errors import ConfigError
from rlhf.gate_sizes import Sizes, check_gate_sizes, describe_power, spread_of
from rlhf.inference import detectable_share, power_of_share

PLENTY = Sizes(1000, 1000, 300)


def config(**changes: object) -> PipelineConfig:
    return PipelineConfig.model_validate({"evaluation": {"judge": "world"}, **changes})


def own(**changes: object) -> PipelineConfig:
    return PipelineConfig.model_validate({"data": {"source": "a.jsonl", **changes}})


def refusal(used: PipelineConfig, sizes: Sizes, has_champion: bool = False) -> str:
    with pytest.raises(ConfigError) as caught:
        check_gate_sizes(used, sizes, has_champion=has_champion)
    return str(caught.value)


def check(used: PipelineConfig, sizes: Sizes, has_champion: bool = False) -> None:
    check_gate_sizes(used, sizes, has_champion=has_champion)


def test_six_pairs_can_not_show_more_than_a_coin_knows():
    """Wilson with t of 5, 2.571: 5 of 6 give
    (0.8333 + 0.5508 − 2.571 √(0.02315 + 0.04591)) / 2.1015 = 0.337, and all of 6 give
    1/(1 + 2.571²/6) = 0.476. 8 of 9 with t of 8, 2.306, give
    (0.8889 + 0.2954 − 2.306 √(0.01097 + 0.01641)) / 1.5909 = 0.505.
    """
    assert refusal(own(), Sizes(6, 6, 300)) == (
        "gates.reward_model: the 97.5 % lower end of accuracy ≥ 0.5 can't be met with 6 held-out "
        "pairs, unless nearly all are right; 9 are needed; give more data, raise "
        "data.eval_fraction = 0.1, or change the rule in gates.reward_model"
    )
    check(own(), Sizes(9, 9, 300))
    # 9 of 11, rounded down, are fewer than 90 %: t of 10 is 2.228,
    # (0.8182 + 0.2256 − 2.228 √(0.01352 + 0.01026)) / 1.4513 = 0.482.
    assert "with 11 held-out pairs, unless nearly all are right; 12 are" in refusal(
        own(), Sizes(11, 11, 300)
    )
    # Twenty pairs of six prompts may still be independent, but t is that of six prompts.
    check(own(), Sizes(20, 6, 300))
    assert "with 20 held-out pairs" in refusal(own(), Sizes(20, 2, 300))


def test_the_older_form_is_checked_too():
    older = config(gates={"reward_model": [{"metric": "accuracy_low", "min": 0.5}]})
    assert "lower end of accuracy ≥ 0.5" in refusal(older, Sizes(6, 6, 300))
    older = config(gates={"policy": [{"metric": "sampled.win_rate_high", "max": 0.5}]})
    assert "upper end of sampled.win_rate ≤ 0.5" in refusal(older, Sizes(100, 100, 6))


def test_more_samples_of_a_prompt_count():
    rule = {"policy": [{"metric": "sampled.win_rate", "on": "low", "min": 0.5}]}
    used = config(gates=rule)
    assert "6 gate prompts" in refusal(used, Sizes(100, 100, 6))
    # 21 of 24: (0.875 + 0.1377 − 2.571 √(0.004557 + 0.002869)) / 1.2754 = 0.620.
    check(used, Sizes(100, 100, 6, samples=4))
    greedy = config(gates={"policy": [{"metric": "greedy.win_rate", "on": "low", "min": 0.5}]})
    assert "6 gate prompts" in refusal(greedy, Sizes(100, 100, 6, samples=4))


@pytest.mark.parametrize(
    "rule",
    [
        {"metric": "accuracy", "min": 0.5},  # the estimate
        {"metric": "accuracy", "on": "low", "min": "baseline_longer"},  # not known yet
        {"metric": "accuracy", "on": "low", "min": 0.5, "slices": True},
        {"metric": "probes.filler.rises", "on": "high", "max": 0.5},
        {"metric": "by_group.a.accuracy", "on": "low", "min": 0.5},
        {"metric": "accuracy", "on": "low", "max": 0.5},
    ],
)
def test_what_is_not_known_before_the_evaluation_is_not_refused(rule):
    check(config(gates={"reward_model": [rule], "policy": None}), Sizes(3, 3, 3))


def test_high_bounds_are_met_half_way_to_perfection():
    """0.95 of 1,000 right are never below 0.92, which a share of 0.9 could not show."""
    rule = {"metric": "accuracy", "on": "low", "min": 0.92}
    check(config(gates={"reward_model": [rule]}), PLENTY)
    assert "with 50 held-out pairs" in refusal(
        config(gates={"reward_model": [rule]}), Sizes(50, 50, 300)
    )
    never = config(gates={"reward_model": [{**rule, "min": 1.0}]})
    assert refusal(never, PLENTY).endswith("no number of them is enough; choose another bound")


def test_the_cure_is_a_setting_that_helps():
    few = Sizes(100, 100, 6)
    assert "raise data.world.eval_pairs = 1000" in refusal(config(), Sizes(6, 6, 300))
    assert "raise data.world.eval_prompts = 300" in refusal(config(), few)
    assert "raise evaluation.prompts = 6" in refusal(config(evaluation={"prompts": 6}), few)
    assert "raise data.eval_fraction" in refusal(own(), few)
    assert "more rows in data.eval_source" in refusal(own(eval_source="b.jsonl"), few)
    frozen = Sizes(100, 100, 6, are_frozen=True)
    assert "set another data.rotation than 0, with more held-out prompts" in refusal(own(), frozen)


def test_a_champion_that_no_policy_could_beat_is_found_before_training():
    """Ten looks take t of 11 at 99.5 %, 3.106: 10 of 12 give
    (0.8333 + 0.4020 − 3.106 √(0.01157 + 0.01675)) / 1.8039 = 0.395."""
    rules = {"reward_model": None, "policy": None}
    twelve = Sizes(100, 100, 12)
    check(config(gates=rules), twelve)
    line = refusal(config(gates=rules), twelve, has_champion=True)
    assert line.startswith("gates.champion: the 99.5 % lower end of champion.win_rate ≥ 0.5 can't")
    assert line.endswith("lower gates.champion.looks, or set gates.champion to none")
    check(config(gates={**rules, "champion": {"looks": 1}}), twelve, has_champion=True)
    check(config(gates={**rules, "champion": None}), twelve, has_champion=True)


def test_spread_of_samples():
    # √(0.08 + 0.17/k).
    assert spread_of(1) == pytest.approx(0.5)
    assert spread_of(4) == pytest.approx(0.35)
    assert spread_of(10**9) == pytest.approx(0.08**0.5)


def test_the_power_is_told():
    text = describe_power(config(), Sizes(1000, 1000, 300, samples=4))
    assert text.startswith("300 gate prompts × 4 replies: a policy that truly wins 5")
    assert (
        "% of its comparisons with the champion is found better in 4 of 5 runs (at 99.5% "
        "confidence, for each of 10 looks)" in text
    )
    assert text.endswith(" prompts")
    single = describe_power(config(), Sizes(1000, 1000, 300))
    assert single.startswith("300 gate prompts: a policy that truly wins ")
    assert "not even a policy that wins every comparison" in describe_power(
        config(), Sizes(9, 9, 3)
    )
    assert describe_power(config(gates={"champion": None}), PLENTY).startswith(
        "gates.champion = none"
    )


def test_the_detectable_share_has_the_power():
    found = detectable_share(0.5, 300, 0.35, 0.995)
    assert found is not None
    assert power_of_share(found, 0.5, 300, 0.35, 0.995) == pytest.approx(0.8, abs=1e-4)
    assert power_of_share(found - 1e-3, 0.5, 300, 0.35, 0.995) < 0.8
    assert detectable_share(0.5, 2, 0.5, 0.995) is None
