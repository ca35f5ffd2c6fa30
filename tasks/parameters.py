"""Parameters of the flows: preset and overrides, with their JSON schema.

Prefect checks a deployment's parameters against their JSON schema before a run exists, and makes
the form in its UI from it. So the overrides carry the configuration's own schema, in which nothing
is required, and without defaults, so that a form sends chosen values alone. Python callers may pass
a loaded configuration instead, which the flow uses as it is, with the sources of its values.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from typing import Annotated, Any, cast

from pydantic import GetCoreSchemaHandler, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema, core_schema

from rlhf.config import LoadedConfig, PipelineConfig, load_preset, presets
from rlhf.config.fields import flatten
from rlhf.config.load import COMMAND_LINE, OVERRIDE
from rlhf.config.text import as_written

Tree = dict[str, Any]
NO_PRESET = "none"
#: No override. A field that may be null has no form in Prefect's UI until its type is chosen.
NO_OVERRIDES: Tree = {}


class _PresetSchema:
    """JSON schema of a preset's name: a shipped one, one in RLHF_PRESETS, or none."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": "string", "enum": [NO_PRESET, *presets()]}


class _OverridesSchema:
    """Validation and JSON schema of overrides."""

    def __get_pydantic_core_schema__(
        self, source: Any, handler: GetCoreSchemaHandler
    ) -> CoreSchema:
        mapping = handler.generate_schema(Tree)
        return core_schema.no_info_wrap_validator_function(_unless_loaded, mapping)

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return copy.deepcopy(_partial_schema())


#: Sections that the form shows first: what most runs change. Of the others the store is last.
FIRST = ("data", "base", "ppo", "sft", "reward_model", "judge", "evaluation", "gates", "promotion")

Preset = Annotated[str, _PresetSchema()]
Overrides = Annotated[Tree | PipelineConfig | LoadedConfig, _OverridesSchema()]


def resolve(preset: str, overrides: Tree | PipelineConfig | LoadedConfig) -> LoadedConfig:
    """Load the configuration that parameters name, or return a loaded one as it is.

    Raises:
        ConfigError: One line naming the field, the value and the cure.
    """
    if isinstance(overrides, LoadedConfig):
        return overrides
    # Prefect has validated the parameters, so that a configuration is a mapping by now.
    return load_preset(None if preset == NO_PRESET else preset, cast("Tree", overrides))


def configuration_name(parameters: Mapping[str, Any]) -> str:
    """Return the name in a run's parameters: that of the overrides, or of the preset."""
    overrides: Tree | LoadedConfig = parameters.get("overrides") or {}
    if isinstance(overrides, LoadedConfig):
        return overrides.config.name
    preset = parameters.get("preset", NO_PRESET)
    return overrides.get("name") or (preset if preset != NO_PRESET else "rlhf")


def overridden(parameters: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return (dotted name, value) of what a run's parameters change in its preset."""
    overrides: Tree | LoadedConfig = parameters.get("overrides") or {}
    if isinstance(overrides, LoadedConfig):
        return [(k, v) for k, v, source in overrides.rows() if source in (COMMAND_LINE, OVERRIDE)]
    # A whole configuration, also as Prefect keeps it, changes no preset.
    if isinstance(overrides, PipelineConfig) or PipelineConfig.model_fields.keys() <= {*overrides}:
        return []
    return [(key, as_written(value)) for key, value in flatten(overrides) if key != "name"]


def _unless_loaded(value: Any, to_mapping: core_schema.ValidatorFunctionWrapHandler) -> Any:
    if isinstance(value, LoadedConfig):
        return value
    return to_mapping(value.model_dump(mode="json") if isinstance(value, PipelineConfig) else value)


@functools.cache
def _partial_schema() -> Tree:
    """Return the schema of partial overrides.

    Cached, because `prefect deploy --all` reads it about 100 times.
    """
    whole = PipelineConfig.model_json_schema()
    partial = _without_defaults(whole, whole.pop("$defs"))
    fields = partial["properties"]
    last = ("store", "store_options")
    order = (*FIRST, *(name for name in fields if name not in last), *last)
    partial["properties"] = {name: fields[name] for name in dict.fromkeys(order)}
    # `rl_` names may stand at the top too.
    partial["patternProperties"] = partial["properties"]["ppo"]["patternProperties"]
    return partial


def _without_defaults(node: Any, definitions: Tree) -> Any:
    """Return the schema with its references resolved, and without defaults."""
    if isinstance(node, list):
        return [_without_defaults(item, definitions) for item in cast("list[Any]", node)]
    if not isinstance(node, dict):
        return node
    tree = cast("Tree", node)
    if "$ref" in tree:
        own = {key: value for key, value in tree.items() if key != "$ref"}
        tree = definitions[tree["$ref"].rpartition("/")[2]] | own
    if tree.get("type") == "boolean":
        # An untouched check box of a form sends false, an untouched choice sends nothing.
        tree = {key: value for key, value in tree.items() if key != "type"} | {
            "enum": [True, False]
        }
    names = tree.get("properties")
    return {
        key: {name: _field(name, value[name], definitions) for name in value}
        if value is names
        else _without_defaults(value, definitions)
        for key, value in tree.items()
        if key != "default"
    }


def _field(name: str, schema: Any, definitions: Tree) -> Any:
    """Return a field's schema with the name that the guides use, and its default in words."""
    made = _without_defaults(schema, definitions) | {"title": name}
    default = schema.get("default", definitions)
    if default is None or isinstance(default, str | int | float):
        said = f"Default: {as_written(default)}."
        made["description"] = f"{made.get('description', '')} {said}".strip()
    return made
