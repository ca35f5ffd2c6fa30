"""Rules of the gates in the configuration: their language, and what is refused before any work."""

from __future__ import annotations

import pytest

from rlhf.config import ChampionGateConfig, GateRule, PipelineConfig, load_config
from rlhf.config.metric_names import METRICS, is_share, needs_of, part_of
from rlhf.errors import ConfigError


def config(*words: str) -> PipelineConfig:
    return load_config("configs/quickstart.yaml", [f"--{word}" for word in words]).config


def refusal(*words: str) -> str:
    with pytest.raises(ConfigError) as caught:
        config(*words)
    return str(caught.value)


def test_a_rule_in_yaml_and_on_the_command_line(tmp_path):
    """`on` is a key that YAML 1.1 reads as true."""
    rule = GateRule(metric="accuracy", on="low", min=0.5, confidence=0.99)
    text = "{metric: accuracy, on: low, min: 0.5, confidence: 0.99}"
    preset = tmp_path / "p.yaml"
    preset.write_text(f"gates: {{reward_model: [{text}]}}")
    assert load_config(preset, []).config.gates.reward_model == (rule,)
    assert config(f"gates.reward_model=[{text}]").gates.reward_model == (rule,)
    again = PipelineConfig.model_validate(load_config(preset, []).config.model_dump(mode="json"))
    assert again.gates.reward_model == (rule,)


def test_a_gate_of_none_has_to_be_said(tmp_path):
    for gate in ("reward_model", "policy"):
        assert getattr(config(f"gates.{gate}=none").gates, gate) is None
        line = refusal(f"gates.{gate}=[]")
        assert line.startswith(f"gates.{gate}: is an empty list, and would approve every model; ")
        assert "write none if there shall be no gate (from command line)" in line
        preset = tmp_path / "p.yaml"
        preset.write_text(f"gates:\n  {gate}:\n")
        assert getattr(load_config(preset, []).config.gates, gate) is None
    assert config("gates.champion=none").gates.champion is None
    assert config("gates.champion.looks=5").gates.champion == ChampionGateConfig(looks=5)


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        # Neighbours: the same metric elsewhere first, then the most alike.
        ("{metric: win_rate, min: 0.5}", "did you mean sampled.win_rate or greedy.win_rate"),
        ("{metric: sampled.win_rte, min: 0.5}", "did you mean sampled.win_rate or"),
        ("{metric: sampled.by_group.a.b.win_rat, min: 0}", "mean sampled.by_group.a.b.win_rate or"),
        ("{metric: zzz, min: 0}", "choose one such as "),
        ("{metric: accuracy, min: 0.5}", "did you mean judge.accuracy"),  # of the other gate
        ("{metric: sampled.kl, max: sampled.kll}", "policy.0.max = 'sampled.kll' is no metric"),
        ("{metric: sampled.eos_rate, on: low, min: 0}", "sampled.eos_rate has no interval"),
        ("{metric: sampled.win_rate_low, on: low, min: 0}", "sampled.win_rate_low has no interval"),
        ("{metric: champion.win_rate, min: 0}", "the model line may have no champion; set if_mi"),
        ("{metric: sampled.kl, confidence: 0.9, max: 1}", "confidence = 0.9 is that of an end"),
        ("{metric: sampled.kl, margin: 1, max: 1}", "margin = 1 is added to a bound that is a"),
        ("{metric: sampled.kl, on: low}", "a rule needs min, max or both"),
        ("{metric: forgetting.nll_before, slices: true, max: 1}", "no nll_before of slices"),
        ("{metric: sampled.kl, slices: true, max: greedy.kl}", "no kl of slices beside kl"),
        ("{metric: sampled.kl, max: 1, slice_n: 1}", "slice_n = 1: must be at least 2"),
        (
            "{metric: sampled.win_rate, min: 1.2}",
            "min = 1.2 can't be met: sampled.win_rate is from",
        ),
        ("{metric: sampled.win_rate, on: low, min: 60}", "from 0 to 1; write 0.6 for 60 %"),
        ("{metric: sampled.by_group.a.win_rate, max: -0.1}", "max = -0.1 can't be met"),
        ("{metric: sampled.eos_rate_before, min: 1.01}", "is from 0 to 1"),
        ("{metric: greedy.tokens_after, max: -1}", "greedy.tokens_after is 0 or more; correct it"),
        ("{metric: sampled.kl, min: 0.9, max: 0.1}", "min = 0.9 is above max = 0.1"),
        ("{metric: sampled.kl, max: 1, factor: 2}", "factor = 2 is multiplied with a bound that"),
        ("{metric: sampled.kl, max: '10'}", "write a number without quotes"),
        ("{metric: sampled.kl, max: 1.5*greedy.kl}", "with factor and margin beside it"),
        ("{metric: sampled.kl, max: 1, on: middle}", "on = 'middle': must be 'estimate', 'low'"),
    ],
)
def test_mistakes_are_told_before_any_work(rule, words):
    line = refusal(f"gates.policy=[{rule}]")
    assert line.startswith("gates.policy.0")
    assert words in line
    assert "\n" not in line


def test_metrics_that_this_configuration_does_not_have():
    judge = "gates.policy=[{metric: sampled.judge_win_rate, min: 0.5}]"
    gold = "gates.policy=[{metric: sampled.gold_win_rate, min: 0.5}]"
    assert config(judge).gates.policy
    assert config(gold).gates.policy
    assert "judge.enabled = false trains no judge; set if_missing: skip" in refusal(
        judge, "judge.enabled=false"
    )
    assert "evaluation.judge = none measures no gold score" in refusal(
        gold, "evaluation.judge=none"
    )
    for line, other in ((judge, "judge.enabled=false"), (gold, "evaluation.judge=none")):
        assert config(line.replace("}", ", if_missing: skip}"), other).gates.policy
    # The default rules can do without a judge.
    assert config("judge.enabled=false").gates.policy


def test_the_default_rules_and_those_of_the_presets_are_known():
    for preset in ("preferences", "lora", "quickstart"):
        gates = load_config(f"configs/{preset}.yaml", []).config.gates
        for gate in METRICS:
            rules = getattr(gates, gate)
            assert rules
            assert all(part_of(rule.metric, gate) for rule in rules)
    assert PipelineConfig().gates.champion == ChampionGateConfig(confidence=0.95, looks=10)
    # 1 − 0.05/10.
    assert PipelineConfig().gates.champion.look_confidence == pytest.approx(0.995)


@pytest.mark.parametrize(
    ("name", "gate", "share", "need"),
    [
        ("accuracy", "reward_model", True, ()),
        ("by_group.a.b.accuracy", "reward_model", True, ()),
        ("by_slice.language: de.accuracy_low", "reward_model", False, ()),
        ("probes.filler.rises", "reward_model", True, ()),
        ("share_of_ceiling", "reward_model", False, ("gold",)),
        ("sampled.win_rate", "policy", True, ()),
        ("sampled.judge_win_rate", "policy", True, ("judge",)),
        ("sampled.gap", "policy", False, ("judge",)),
        ("judge.accuracy", "policy", True, ("judge",)),
        ("greedy.gold_before", "policy", False, ("gold",)),
        ("champion.by_group.x.judge_win_rate", "policy", True, ("champion", "judge")),
        ("forgetting.nll_difference_high", "policy", False, ()),
    ],
)
def test_known_names(name, gate, share, need):
    assert part_of(name, gate)
    assert is_share(name) is share
    assert needs_of(name) == set(need)
    assert part_of(f"{name}x", gate) is None
    assert part_of(f"x{name}", gate) is None
