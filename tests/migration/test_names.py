"""Tables of names: each argument of both tools has a place, a reason, a field that exists."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from docs.generate_migrating import TITLES, page
from rlhf.config.fields import field_types
from rlhf.config.numbers import LEAST
from rlhf.migration import convert
from rlhf.migration.names import (
    AITRAINING,
    LAUNCHER,
    OLD_PPO,
    ORDERS,
    PPO,
    TRAINERS,
    defaults,
    find,
    nearest,
    tables,
)
from tests.migration import old_names

ENTRIES = [entry for tool in TITLES for group in tables(tool).values() for entry in group.values()]


def test_every_field_of_aitraining_is_known():
    fields = tables("aitraining")["LLMTrainingParams"]
    assert sorted(fields) == sorted(old_names.AITRAINING)


@pytest.mark.parametrize(
    ("kind", "names"),
    [("ppo", old_names.PPO), (OLD_PPO, old_names.OLD_PPO), ("reward_model", old_names.REWARD)],
)
def test_every_field_of_trls_configurations_is_known(kind, names):
    assert [name for name in names if find("trl", ORDERS[kind], name) is None] == []


def test_every_argument_of_the_installed_trl_is_known():
    from trl import ModelConfig, RewardConfig, ScriptArguments, SFTConfig

    for kind, classes in {
        "sft": (SFTConfig, ScriptArguments, ModelConfig),
        "reward_model": (RewardConfig, ScriptArguments, ModelConfig),
    }.items():
        names = {field.name for cls in classes for field in dataclasses.fields(cls)}
        assert {name for name in names if find("trl", ORDERS[kind], name) is None} == set()


def test_every_entry_is_complete():
    assert len(ENTRIES) > 400
    for entry in ENTRIES:
        assert entry.outcome in ("same", "changed", "broken", "none"), entry
        assert len(entry.why) > 8 or entry.why in ("rank", "scale"), entry
        assert not entry.how or entry.how in convert._CONVERSIONS, entry
        # What has no equal has no field; what has one names one that exists.
        if entry.outcome == "none":
            assert not entry.to, entry
        elif entry.outcome != "broken" and entry.how != "silent":
            assert entry.to, entry
        fields = [entry.to.replace("*", trainer) for trainer in TRAINERS]
        assert not entry.to or any(field_types(field) is not None for field in fields), entry


def test_what_never_worked_names_its_evidence():
    for entry in ENTRIES:
        if entry.outcome == "broken":
            assert any(word in entry.why for word in (".py", "use_forward_backward", "rl_env_type"))


def test_credentials_are_marked():
    secret = {entry.name for entry in ENTRIES if entry.secret}
    assert {"token", "wandb_token", "hub_token", "push_to_hub_token"} <= secret
    assert all(not entry.to for entry in ENTRIES if entry.secret)


@pytest.mark.parametrize("tool", TITLES)
def test_defaults_are_of_fields_that_exist(tool):
    for kind in (*TRAINERS, OLD_PPO):
        for field, value in defaults(tool, kind).items():
            assert field_types(field) is not None, field
            assert value is None or not isinstance(value, float) or value == 0 or value > LEAST


def test_a_misspelt_name_has_a_neighbour():
    assert nearest("trl", ORDERS["ppo"], "cliprang") == "cliprange"
    assert nearest("aitraining", AITRAINING, "rl_klcoef") == "rl_kl_coef"
    assert nearest("trl", (PPO, LAUNCHER), "zzz") is None


def test_the_page_is_up_to_date():
    shown = Path("docs/migrating.md").read_text(encoding="utf-8")
    assert page() == shown, "run: python -m docs.generate_migrating > docs/migrating.md"
    for entry in ENTRIES:
        assert f"`{entry.name}`" in shown
    assert all(set(tables(tool)) == set(titles) for tool, titles in TITLES.items())
