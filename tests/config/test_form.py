"""The form of a run on Prefect's page: names of the guides, what most runs change first."""

from __future__ import annotations

import pytest

from rlhf.config import PipelineConfig
from tasks.parameters import NO_OVERRIDES, _partial_schema

SCHEMA = _partial_schema()


def fields(node, path=()):
    """Every field of the form with its dotted name and schema."""
    if isinstance(node, list):
        for item in node:
            yield from fields(item, path)
    elif isinstance(node, dict):
        for name, value in node.get("properties", {}).items():
            yield ".".join((*path, name)), value
            yield from fields(value, (*path, name))
        for key in ("anyOf", "oneOf", "items", "additionalProperties"):
            yield from fields(node.get(key), path)


def test_what_most_runs_change_stands_first_and_the_store_last():
    names = [*SCHEMA["properties"]]
    assert names[:3] == ["data", "base", "ppo"]
    assert names[-2:] == ["store", "store_options"]
    assert {*names} == {*PipelineConfig.model_fields}


def test_every_field_has_the_name_that_is_written_in_a_configuration():
    found = [*fields(SCHEMA)]
    assert len(found) > 200
    assert [path for path, field in found if field["title"] != path.rpartition(".")[2]] == []


@pytest.mark.parametrize(
    ("path", "default"),
    [("ppo.kl_coef", "Default: 0.1."), ("data.source", "Default: world."),
     ("sft.enabled", "Default: true."), ("judge.base", "Default: none.")],
)  # fmt: skip
def test_a_fields_default_stands_in_its_description(path, default):
    assert dict(fields(SCHEMA))[path]["description"].endswith(default)


def test_the_form_itself_sends_no_default():
    assert NO_OVERRIDES == {}
    assert [path for path, field in fields(SCHEMA) if "default" in field] == []
