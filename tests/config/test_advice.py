"""Warnings for values of the user's outside their advised range."""

from __future__ import annotations

import pytest

from rlhf.config import PipelineConfig, load_config, load_preset, presets

BASES = ([], ["--base.path=some/model"])


def advice(*overrides):
    return load_config(None, overrides).advice()


@pytest.mark.parametrize("overrides", BASES)
def test_defaults_are_as_advised(overrides):
    assert advice(*overrides) == []


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("gamma", 0.9, 0.99), ("gae_lambda", 0.9, 0.99), ("kl_coef", 0.01, 0.5),
        ("value_loss_coef", 0.5, 2.0), ("clip_range", 0.1, 0.3),
    ],
)  # fmt: skip
def test_outside_and_at_the_ends(name, low, high):
    for value in (low, high):
        assert advice(f"--ppo.{name}={value}") == []
    for value in (low - 0.001, high + 0.001):
        assert advice(f"--ppo.{name}={value}") == [
            f"ppo.{name} = {value:g} is outside the advised {low:g}–{high:g}; "
            "keep it only if you mean it"
        ]


def test_a_line_for_each_value():
    lines = advice("--ppo.gamma=1", "--rl-kl-coef=0")
    assert {line.split(" ")[0] for line in lines} == {"ppo.kl_coef", "ppo.gamma"}


@pytest.mark.parametrize("overrides", BASES)
@pytest.mark.parametrize("name", presets())
def test_presets_of_the_project_warn_of_no_value_of_their_own(name, overrides):
    loaded = load_config(f"configs/{name}.yaml", overrides)
    assert loaded.advice() == load_preset(name, {}).advice() == []
    (line,) = load_config(f"configs/{name}.yaml", [*overrides, "--ppo.gamma=0.5"]).advice()
    assert line.startswith("ppo.gamma = 0.5 is outside")
    (line,) = load_preset(name, {"rl_gamma": 0.5}).advice()
    assert line.startswith("ppo.gamma = 0.5 is outside")


def test_a_file_of_the_same_name_elsewhere_is_the_users(tmp_path):
    path = tmp_path / "quickstart.yaml"
    path.write_text("from_scratch: {ppo: {gamma: 0.8}}\nppo: {kl_coef: 0.9}\n")
    lines = load_config(path).advice()
    assert {line.split(" ")[0] for line in lines} == {"ppo.kl_coef", "ppo.gamma"}


def test_a_pretrained_bases_own_discount_is_no_users_choice():
    """A configuration without its values' sources, as it is passed between flows."""
    config = load_config(None, ["--base.path=some/model"]).config
    assert config.ppo.gamma == 1.0
    assert load_preset(None, config.model_dump(mode="json")).advice() == []
    assert PipelineConfig.model_validate(config.model_dump(mode="json")) == config


@pytest.mark.parametrize(
    ("arguments", "filters"),
    [
        ([], "top_k = 50"), (["--ppo.top_p=0.9"], "top_k = 50 and top_p = 0.9"),
        (["--ppo.top_k=0", "--ppo.top_p=0.9"], "top_p = 0.9"), (["--ppo.top_k=0"], None),
    ],
)  # fmt: skip
def test_truncation_without_replay(arguments, filters):
    lines = advice("--ppo.truncation=none", *arguments)
    assert lines == [] if filters is None else lines == [
        f"ppo.truncation = none with {filters} computes ratio and KL of another distribution than "
        "replies are drawn from; set ppo.truncation to replay, or ppo.top_k to 0 and ppo.top_p to 1"
    ]  # fmt: skip


def test_a_peers_way_is_no_exception():
    assert len(advice("--ppo.compat=verl")) == 1
    assert advice("--ppo.compat=verl", "--ppo.truncation=replay") == []


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ("kl_target=3.0", "kl_target = 3 has no effect, because ppo.kl_controller = fixed; set"),
        ("kl_horizon=300", "kl_horizon = 300 has no effect, because ppo.kl_controller = fixed"),
        ("compat=openrlhf", None),
        ("lr_final_fraction=0.5", None),
    ],
)
def test_values_that_nothing_reads(value, line):
    replay = "--ppo.truncation=replay"
    lines = advice(f"--ppo.{value}", replay)
    assert len(lines) == (line is not None)
    assert line is None or lines[0].startswith(f"ppo.{line}")
    (penalty,) = advice("--ppo.missing_eos=none", "--ppo.missing_eos_penalty=2.0", replay)
    assert penalty.startswith("ppo.missing_eos_penalty = 2 has no effect")
    (final,) = advice("--ppo.lr_scheduler=constant", "--ppo.lr_final_fraction=0.5", replay)
    assert final.endswith("set that to linear, or remove the value")


@pytest.mark.parametrize("name", ["veto", "trigger"])
def test_limits_of_drift_without_a_comparison_have_no_effect(name):
    limits = [f"--data.drift.{name}.tokens=0.1", f"--data.drift.{name}.labels=0.2"]
    assert advice(*limits) == []
    assert advice("--data.drift.enabled=false") == []
    (line,) = advice(*limits, "--data.drift.enabled=false")
    assert f"data.drift.{name} (tokens = 0.1, labels = 0.2) has no effect" in line
    assert "\n" not in line
