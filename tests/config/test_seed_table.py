"""Rows of the seed's parameter table: default, bounds and aliases of each."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import jsonschema
import pytest
import yaml
from pydantic import BaseModel, ValidationError

from rlhf.config import PipelineConfig, PPOConfig, load_config
from rlhf.config.ppo import SEED_NAMES
from rlhf.errors import ConfigError


@dataclass(frozen=True)
class Row:
    """A row of the table.

    `other` is a value within the bounds that is not the default; `good` are values at the bounds
    and `bad` those beyond, each with what the error says; `with_` is what they need beside them.
    """

    default: Any
    other: Any
    good: tuple[Any, ...] = ()
    bad: tuple[tuple[Any, str], ...] = ()
    advised: tuple[float, float] | None = None
    with_: tuple[tuple[str, Any], ...] = ()


NUMBER, WHOLE = "must be a number", "must be a whole number"
FINITE = "must be a finite number"
PLACE = "is no place of a model; give a local folder, artifact:<digest>, s3://bucket/prefix"
TABLE = {
    "reward_model_path": Row(
        None, "models/rm",
        good=("a/b", "a/b@v1", "artifact:3f2a91", "s3://bucket/rm", "/rm", None),
        bad=(("", "must not be empty"), ("s3://", PLACE), ("https://host/rm", PLACE)),
    ),
    "gamma": Row(
        0.99, 0.95, good=(1.0, 1e-6), advised=(0.9, 0.99),
        bad=((0.0, "must be more than 0"), (1.0001, "must be at most 1"), ("x", NUMBER)),
    ),
    "gae_lambda": Row(
        0.95, 0.9, good=(0.0, 1.0), advised=(0.9, 0.99),
        bad=((-0.0001, "must be at least 0"), (1.0001, "must be at most 1")),
    ),
    "kl_coef": Row(
        0.1, 0.05, good=(0.0, 100.0), advised=(0.01, 0.5),
        bad=((-1e-6, "must be at least 0"), (float("inf"), FINITE), (float("nan"), FINITE)),
    ),
    "value_loss_coef": Row(
        1.0, 0.5, good=(0.0,), advised=(0.5, 2.0), bad=((-0.1, "must be at least 0"),)
    ),
    "clip_range": Row(
        0.2, 0.3, good=(1e-6, 0.9999), advised=(0.1, 0.3),
        bad=((0.0, "must be more than 0"), (1.0, "must be less than 1")),
    ),
    "value_clip_range": Row(
        0.2, 0.5, good=(1e-6, 50.0, None), bad=((0.0, "must be more than 0"),)
    ),
    "num_ppo_epochs": Row(
        4, 2, good=(1,), bad=((0, "must be at least 1"), (1.5, WHOLE), (True, "must not be true"))
    ),
    "chunk_size": Row(
        128, 64, good=(8,),
        bad=((0, "must be at least 1"), (7, "mini_batch_size = 8 exceeds chunk_size = 7")),
    ),
    "mini_batch_size": Row(
        8, 16, good=(1, 128),
        bad=((0, "must be at least 1"), (129, "mini_batch_size = 129 exceeds chunk_size = 128")),
    ),
    "optimize_device_cache": Row(True, False, good=(True,), bad=(("x", "must be true or false"),)),
    "max_new_tokens": Row(128, 64, good=(1,), bad=((0, "must be at least 1"),)),
    "top_k": Row(50, 10, good=(0,), bad=((-1, "must be at least 0"), (0.5, WHOLE))),
    "top_p": Row(
        1.0, 0.9, good=(1e-6,),
        bad=((0.0, "must be more than 0"), (1.0001, "must be at most 1")),
    ),
    "temperature": Row(1.0, 0.7, good=(1e-6, 5.0), bad=((0.0, "must be more than 0"),)),
    "reward_fn": Row(None, "default", bad=(("no_such_function", "must be"),)),
    "multi_objective": Row(
        False, True, bad=(("x", "must be true or false"),),
        with_=(("reward_weights", {"reward_model": 1.0}),),
    ),
    "reward_weights": Row(None, {"reward_model": 2.0}, with_=(("multi_objective", True),)),
    "env_type": Row(None, "text_generation", bad=(("no_such_type", "must be"),)),
    "env_config": Row(None, {"stop_sequences": ["x"]}, with_=(("env_type", "text_generation"),)),
}  # fmt: skip
FIELDS = [name for name in TABLE if name in PPOConfig.model_fields]
ROWS = [pytest.param(name, TABLE[name], id=name) for name in FIELDS]
BAD = [(name, *case) for name in FIELDS for case in TABLE[name].bad]
GOOD = [(name, value) for name in FIELDS for value in TABLE[name].good]


def section(name: str, value: Any) -> dict[str, Any]:
    return {name: value, **dict(TABLE[name.removeprefix("rl_")].with_)}


def plain(value: Any) -> Any:
    """A value of the configuration as it was written."""
    # Through JSON: a section holds tuples where a list was written.
    return (
        value.model_dump(mode="json", exclude_unset=True) if isinstance(value, BaseModel) else value
    )


def test_the_table_is_the_seeds():
    assert set(TABLE) == set(SEED_NAMES)


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_default(name, row):
    assert getattr(PPOConfig(), name) == row.default
    assert getattr(load_config().config.ppo, name) == row.default


@pytest.mark.parametrize(("name", "value"), GOOD)
def test_values_at_the_bounds(name, value):
    assert getattr(PPOConfig(**section(name, value)), name) == value


@pytest.mark.parametrize(("name", "value", "words"), BAD)
def test_values_beyond_the_bounds(name, value, words, tmp_path):
    """The one line names field, value (unless it is no number at all), cure and origin."""
    with pytest.raises(ValidationError):
        PPOConfig(**section(name, value))
    preset = tmp_path / "my.yaml"
    preset.write_text(yaml.safe_dump({"ppo": section(f"rl_{name}", value)}))
    with pytest.raises(ConfigError) as caught:
        load_config(preset)
    text = str(caught.value)
    assert text.startswith("ppo")
    assert words in text
    assert name in text
    assert isinstance(value, bool) or words == PLACE or f" = {value!r}" in text
    assert text.endswith("(from my.yaml)")
    assert "\n" not in text


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_advised_range(name, row):
    extra = PPOConfig.model_fields[name].json_schema_extra or {}
    assert extra.get("advised") == (list(row.advised) if row.advised else None)  # pyright: ignore


@pytest.mark.parametrize("write", ["rl_{}", "{}"])
@pytest.mark.parametrize(("name", "row"), ROWS)
def test_alias_in_python(name, row, write):
    key = write.format(name)
    given = section(key, row.other)
    assert plain(getattr(PPOConfig(**given), name)) == row.other
    nested = PipelineConfig.model_validate({"ppo": given})
    assert plain(getattr(nested.ppo, name)) == row.other
    assert name in nested.ppo.model_fields_set
    beside = PipelineConfig.model_validate({f"rl_{name}": row.other, "ppo": dict(row.with_)})
    assert beside == nested == PipelineConfig.model_validate_json(nested.model_dump_json())


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_alias_in_yaml(name, row, tmp_path):
    path = tmp_path / "my.yaml"
    trees = (
        {"ppo": section(f"rl_{name}", row.other)},
        {f"rl_{name}": row.other, "ppo": dict(row.with_)},
    )
    for tree in trees:
        path.write_text(yaml.safe_dump(tree))
        loaded = load_config(path)
        assert plain(getattr(loaded.config.ppo, name)) == row.other
        assert {k for k in loaded.sources if k.startswith(f"ppo.{name}")}
        assert set(loaded.sources.values()) == {"my.yaml"}


@pytest.mark.parametrize("form", ["--rl_{}", "--rl-{}", "--ppo.rl_{}", "--ppo.{}"])
@pytest.mark.parametrize(("name", "row"), ROWS)
def test_alias_on_the_command_line(name, row, form):
    written = name.replace("_", "-") if "-" in form[2:] else name
    text = row.other if isinstance(row.other, str) else yaml.safe_dump(
        row.other, default_flow_style=True
    ).split("\n")[0]  # fmt: skip
    beside = [f"--ppo.{key}={value}" for key, value in row.with_]
    for override in ([f"{form.format(written)}={text}"], [form.format(written), text]):
        loaded = load_config(None, [*override, *beside])
        assert plain(getattr(loaded.config.ppo, name)) == row.other
        assert set(loaded.sources.values()) == {"command line"}


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_an_override_replaces_the_presets_value_under_either_name(name, row, tmp_path):
    path = tmp_path / "my.yaml"
    for here, there in (("{}", "--rl_{}"), ("rl_{}", "--ppo.{}")):
        path.write_text(yaml.safe_dump({"ppo": section(here.format(name), row.default)}))
        if isinstance(row.other, dict):
            pytest.skip("mappings are merged")
        loaded = load_config(path, [f"{there.format(name)}={row.other}"])
        assert getattr(loaded.config.ppo, name) == row.other
        assert loaded.sources[f"ppo.{name}"] == "command line"


@pytest.mark.parametrize(("name", "row"), ROWS)
def test_both_names_are_one_clear_error(name, row, tmp_path):
    both = {name: row.other, f"rl_{name}": row.default}
    expected = f"{name} is given twice, as {name} and as rl_{name}: "
    trees = (
        {"ppo": both},
        {"ppo": {name: row.other}, f"rl_{name}": row.default},
        {"ppo": {f"rl_{name}": row.other}, f"rl_{name}": row.default},
    )
    path = tmp_path / "my.yaml"
    with pytest.raises(ValidationError, match=expected):
        PPOConfig(**both)
    for tree in trees:
        with pytest.raises(ValidationError, match=f"ppo.{expected}"):
            PipelineConfig.model_validate(tree)
        path.write_text(yaml.safe_dump(tree))
        with pytest.raises(ConfigError) as caught:
            load_config(path)
        assert str(caught.value).startswith(f"ppo.{expected}")
        assert str(caught.value).endswith("keep one (from my.yaml)")
    with pytest.raises(ConfigError, match=f"command line: ppo.{name}: two values"):
        load_config(None, [f"--ppo.{name}=1", f"--rl-{name}=1"])


def test_a_section_object_takes_a_name_at_the_top():
    ppo = PPOConfig(gamma=0.5, compat="trl")
    given = PipelineConfig(ppo=ppo, rl_kl_coef=0.3).ppo  # pyright: ignore[reportCallIssue]
    assert given == PPOConfig(gamma=0.5, kl_coef=0.3, compat="trl")
    with pytest.raises(ValidationError, match=r"ppo\.gamma is given twice"):
        PipelineConfig(ppo=ppo, rl_gamma=0.3)  # pyright: ignore[reportCallIssue]


def test_the_error_repeats_no_password():
    both = {"reward_model_path": "s3://key:s3cret@b", "rl_reward_model_path": "s3://key:s3cret@b"}
    for tree in ({"ppo": both}, {"ppo": {"reward_model_path": "s3://key:s3cret@bucket/x"}}):
        with pytest.raises(ValidationError) as caught:
            PipelineConfig.model_validate(tree)
        assert "s3cret" not in str(caught.value)


def test_the_schema_that_prefect_checks_parameters_by_knows_the_aliases():
    schema = PipelineConfig.model_json_schema()
    jsonschema.validate({"rl_gamma": 0.5, "ppo": {"rl_kl_coef": 0.3, "gamma": 0.9}}, schema)
    for wrong in ({"rl_nothing": 1}, {"ppo": {"rl_nothing": 1}}):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(wrong, schema)
