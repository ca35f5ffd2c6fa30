"""Warnings for values outside their advised range."""

from __future__ import annotations

import pytest

from rlhf.config import PipelineConfig, advice, load_config


def test_defaults_are_as_advised():
    assert advice(PipelineConfig()) == []


@pytest.mark.parametrize(
    ("name", "low", "high"),
    [
        ("gamma", 0.9, 0.99), ("gae_lambda", 0.9, 0.99), ("kl_coef", 0.01, 0.5),
        ("value_loss_coef", 0.5, 2.0), ("clip_range", 0.1, 0.3),
    ],
)  # fmt: skip
def test_outside_and_at_the_ends(name, low, high):
    for value in (low, high):
        assert advice(load_config(None, [f"--ppo.{name}={value}"]).config) == []
    for value in (low - 0.001, high + 0.001):
        config = load_config(None, [f"--ppo.{name}={value}"]).config
        assert advice(config) == [
            f"ppo.{name} = {value:g} is outside the advised {low:g}–{high:g}; "
            "keep it only if you mean it"
        ]


def test_a_line_for_each_value():
    lines = advice(load_config(None, ["--ppo.gamma=1", "--rl-kl-coef=0"]).config)
    assert {line.split(" ")[0] for line in lines} == {"ppo.kl_coef", "ppo.gamma"}


def test_the_quickstart_is_told_of_its_discount():
    lines = advice(load_config("configs/quickstart.yaml").config)
    assert [line.split(" is ")[0] for line in lines] == ["ppo.gamma = 1"]


@pytest.mark.parametrize(
    ("arguments", "filters"),
    [
        ([], "top_k = 50"), (["--ppo.top_p=0.9"], "top_k = 50 and top_p = 0.9"),
        (["--ppo.top_k=0", "--ppo.top_p=0.9"], "top_p = 0.9"), (["--ppo.top_k=0"], None),
    ],
)  # fmt: skip
def test_truncation_without_replay(arguments, filters):
    lines = advice(load_config(None, ["--ppo.truncation=none", *arguments]).config)
    assert lines == [] if filters is None else lines == [
        f"ppo.truncation = none with {filters} computes ratio and KL of another distribution than "
        "replies are drawn from; set ppo.truncation to replay, or ppo.top_k to 0 and ppo.top_p to 1"
    ]  # fmt: skip


def test_a_peers_way_is_no_exception():
    assert len(advice(load_config(None, ["--ppo.compat=verl"]).config)) == 1
    assert advice(load_config(None, ["--ppo.compat=verl", "--ppo.truncation=replay"]).config) == []


@pytest.mark.parametrize("name", ["veto", "trigger"])
def test_limits_of_drift_without_a_comparison_have_no_effect(name):
    limits = [f"--data.drift.{name}.tokens=0.1", f"--data.drift.{name}.labels=0.2"]
    assert advice(load_config(None, limits).config) == []
    assert advice(load_config(None, ["--data.drift.enabled=false"]).config) == []
    (line,) = advice(load_config(None, [*limits, "--data.drift.enabled=false"]).config)
    assert f"data.drift.{name} (tokens = 0.1, labels = 0.2) has no effect" in line
    assert "\n" not in line
