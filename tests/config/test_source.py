"""Configurations as Python callers give them: presets, files, mappings, objects, and changes."""

from __future__ import annotations

from pathlib import Path

import pytest

from rlhf.config import PPOConfig, load_config, load_source
from rlhf.errors import ConfigError

PRESET = "configs/quickstart.yaml"


def test_a_preset_is_what_the_command_loads():
    command = load_config(PRESET, ["--ppo.kl_coef=0.05", "--seed=3"])
    for source in ("quickstart", PRESET, Path(PRESET)):
        loaded = load_source(source, {"ppo": {"kl_coef": 0.05}, "seed": 3})
        assert loaded.config == command.config
        assert loaded.sources["ppo.kl_coef"] == "override"
        assert loaded.sources["ppo.gamma"] == "quickstart.yaml"
    assert load_source("quickstart", {"rl_kl_coef": 0.05, "seed": 3}).config == command.config


def test_objects_and_mappings_are_taken_with_changes():
    loaded = load_source("quickstart", {})
    assert load_source(loaded, {}) is loaded
    for source in (loaded, loaded.config, loaded.config.model_dump()):
        assert load_source(source, {}).config == loaded.config
        changed = load_source(source, {"ppo": {"kl_coef": 0.05}}).config
        assert changed == load_source("quickstart", {"ppo": {"kl_coef": 0.05}}).config
    tree = {"store": Path("a/store"), "sft": {"epochs": 2}}
    assert load_source(tree, {}).config.store == "a/store"
    assert load_source(None, {}).config == load_config().config
    # Of a section object the fields that were set count, and a preset's others stay.
    given = load_source("quickstart", {"ppo": PPOConfig(kl_coef=0.05)}).config.ppo
    assert given == load_source("quickstart", {"ppo": {"kl_coef": 0.05}}).config.ppo


def test_a_file_of_ones_own_and_a_home_folder(tmp_path, monkeypatch):
    (tmp_path / "own.yaml").write_text("ppo: {gamma: 0.9}\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_source("~/own.yaml", {}).config.ppo.gamma == 0.9
    monkeypatch.chdir(tmp_path)
    assert load_source("own.yaml", {"ppo": {"gamma": 0.8}}).config.ppo.gamma == 0.8


CYCLE: dict = {}
CYCLE["ppo"] = CYCLE


@pytest.mark.parametrize(
    ("source", "changes", "said"),
    [
        ("quickstart", {"ppo": {"kl_coeff": 1}}, "ppo.kl_coeff is not .* mean ppo.kl_coef?"),
        ("quickstart", {"pppo": {}}, "pppo is not a field .*did you mean ppo?"),
        ("quickstart", {"kl_coef": 1}, "kl_coef is not .* mean ppo.kl_coef?"),
        ("quickstart", {"ppo": {"kl_coef": -1}}, "= -1: must be at least 0 .from over"),
        ("quickstart", {"ppo": 5}, "ppo = 5: is a section; set the fields in it"),
        ("quickstrat", {}, "preset = 'quickstrat' is not known here; choose one of .*quickstart"),
        ("none/such.yaml", {}, "no such file"),
        (5, {}, "config = 5: is of type int; give the name of a preset"),
        ({"sead": 1}, {}, "sead is not a field .*did you mean seed?"),
        (None, CYCLE, "holds a value that contains itself"),
    ],
)  # fmt: skip
def test_mistakes_are_one_line(source, changes, said):
    with pytest.raises(ConfigError, match=said) as error:
        load_source(source, changes)
    assert len(str(error.value).splitlines()) == 1
