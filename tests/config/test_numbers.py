"""Every number of the configuration has bounds, in Python and in the schema that Prefect checks."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from rlhf.config import PipelineConfig, load_config, load_preset
from rlhf.errors import ConfigError
from tasks.parameters import _partial_schema
from tests.examples import examples

SCHEMA = _partial_schema()
#: Keywords that hold no schema, or names with schemas.
NAMES = ("properties", "patternProperties")
LISTS = ("anyOf", "allOf", "oneOf", "prefixItems")


def leaves(node: Any, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (path, schema) of all values that are no section."""
    if node is False:
        return
    inner = [(f"{path}.{k}", v) for names in NAMES for k, v in node.get(names, {}).items()]
    inner += [(path, v) for names in LISTS for v in node.get(names, ())]
    if node.get("type") == "array" and "prefixItems" not in node:
        inner.append((f"{path}[]", node["items"]))
    if node.get("type") == "object" and not isinstance(node.get("additionalProperties"), bool):
        inner.append((f"{path}.*", node.get("additionalProperties", {})))
    if not inner and node.get("type") != "object":
        yield path, node
    for name, schema in inner:
        yield from leaves(schema, name)


LEAVES = list(leaves(SCHEMA, "overrides"))
NUMBERS = [(path, node) for path, node in LEAVES if node.get("type") in ("integer", "number")]


def test_every_value_of_the_schema_has_a_type():
    """A value of any type may be a number of any size."""
    known = ("type", "enum", "const")
    assert [path for path, node in LEAVES if not any(key in node for key in known)] == []
    assert len(NUMBERS) > 150


def test_every_number_of_the_schema_is_bounded():
    for path, node in NUMBERS:
        low = max(node.get(key, -math.inf) for key in ("minimum", "exclusiveMinimum"))
        high = min(node.get(key, math.inf) for key in ("maximum", "exclusiveMaximum"))
        assert -(2.0**63) < low < high < 2.0**63, f"{path}: {node}"


def test_every_whole_number_fits_what_counts_in_32_bits_or_is_refused_by_name():
    assert all(n.get("maximum", 2**31) <= 2**31 for _, n in NUMBERS if n["type"] == "integer")


HUGE = [10**30, -(10**30), 2**63, 10**400, 1e300, -1e300, math.inf, -math.inf, math.nan, 1e-320]


def override(path: str, value: Any) -> dict[str, Any] | None:
    """Return overrides with a value at a path; None where other fields would have to fit."""
    *sections, field = path.removeprefix("overrides.").split(".")
    if any(mark in path for mark in ("[]", "*", "env_config", "^", "custom")):
        return None
    tree: Any = value
    for name in reversed([*sections, field]):
        tree = {name: tree}
    return tree


@pytest.mark.parametrize("path", sorted({p for p, _ in NUMBERS if override(p, 0)}))
def test_a_number_beyond_all_bounds_is_refused_in_one_line(path):
    for value in HUGE:
        with pytest.raises(ConfigError) as caught:
            load_preset(None, override(path, value) or {})
        text = str(caught.value)
        assert "\n" not in text
        assert len(text) < 400
        assert path.rpartition(".")[2] in text, text


def test_the_api_refuses_what_its_lists_could_not_write():
    """Prefect validates a deployment's parameters by this schema before a run exists."""
    check = Draft202012Validator(SCHEMA)
    for overrides in (
        {"ppo": {"total_episodes": 10**30}},
        {"rl_chunk_size": 10**30},
        {"ppo": {"reward_weights": {"length": 1e300}}},
        {"data": {"score_weights": {"x": 10**30}}},
        {"gates": {"policy": [{"metric": "sampled.kl", "max": 10**30}]}},
        {"ppo": {"env_config": {"components": {"a": {"type": "length", "weight": 10**30}}}}},
        {"ppo": {"env_config": {"components": {"a": {"points": [[0, 1e30]]}}}}},
        {"ppo": {"env_config": {"components": {"a": {"no_such": 10**30}}}}},
        {"promotion": {"smoke_seconds": 1e10}},
        {"no_such_field": 10**30},
    ):
        assert not check.is_valid(overrides), overrides
        with pytest.raises(ConfigError):
            load_preset(None, overrides)


@settings(max_examples=examples(60), deadline=None)
@given(
    path=st.sampled_from([p for p, _ in NUMBERS if override(p, 0)]),
    value=st.one_of(st.integers(), st.floats(), st.integers().map(lambda n: n * 10**40)),
)
def test_what_the_schema_and_the_configuration_accept_prefect_can_write(path, value):
    """A configuration that loads holds numbers of at most 64 bits, all finite."""
    try:
        config = load_preset(None, override(path, value) or {}).config
    except ConfigError:
        return
    written = json.loads(json.dumps(config.model_dump(mode="json"), allow_nan=False))
    assert PipelineConfig.model_validate(written) == config
    assert all(abs(n) < 2**63 for n in numbers(written))


def numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list):
        for item in value:
            yield from numbers(item)
    elif isinstance(value, int | float):
        yield value


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("ppo.total_episodes=" + "9" * 5000, "ppo.total_episodes = '99999"),
        ("data.world.temperature=1e400", "data.world.temperature = inf: must be a finite"),
        (
            "promotion.smoke_seconds=1e10",
            "promotion.smoke_seconds = 10000000000.0: must be at most",
        ),
        ("ppo.temperature=1e-9", "ppo.temperature: 1e-09 divides logits until they overflow"),
        ("ppo.kl_coef=1e-320", "ppo.kl_coef: 9.99989e-321 is 0 in float32"),
        (
            'ppo.reward_weights={"length": 1e30}',
            "ppo.reward_weights.length = 1e+30: must be at most",
        ),
        (
            "gates.policy=[{metric: sampled.kl, max: 1.0e+30}]",
            "gates.policy.0.max = 1e+30: must be",
        ),
    ],
)
def test_messages_name_field_value_and_bound(override, message):
    with pytest.raises(ConfigError) as caught:
        load_config(None, [f"--{override}"])
    assert len(str(caught.value)) < 300
    assert message in str(caught.value)


def test_a_model_from_scratch_fits_a_machine():
    wide = ["hidden_size=65536", "layers=1024", "heads=64"]
    with pytest.raises(ConfigError, match=r"make 1.8e.13 weights"):
        load_config(None, [f"--base.architecture.{text}" for text in wide])


def test_a_whole_number_too_long_to_write_is_refused(tmp_path):
    """YAML reads hexadecimal numbers of any length, which Python then refuses to write."""
    preset = tmp_path / "my.yaml"
    preset.write_text(f"ppo: {{total_episodes: 0x{'f' * 9000}}}\nbase: {{path: some/model}}\n")
    with pytest.raises(ConfigError, match=r"total_episodes = a number of thousands of digits"):
        load_config(preset)


def test_waits_double_up_to_a_day_and_fit_what_sleeps():
    retries = load_config(None, ["--retries.attempts=50", "--retries.delay_seconds=604800"]).config
    waits = [retries.retries.delay(attempt) for attempt in range(50)]
    assert max(waits) == 86_400
    assert [PipelineConfig().retries.delay(attempt) for attempt in range(4)] == [5, 10, 20, 40]
