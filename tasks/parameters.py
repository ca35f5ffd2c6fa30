"""The flows' parameters: a preset's name, and overrides that Prefect checks at submission.

A deployment's parameters are checked against a JSON schema before a run exists, and the form in
Prefect's UI is made from it. So the overrides carry the configuration's own schema, in which
nothing is required, and no default: a form must not send what nobody chose.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Mapping
from contextvars import ContextVar
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, GetJsonSchemaHandler
from pydantic.json_schema import JsonSchemaValue
from pydantic_core import CoreSchema

from rlhf.config import Loaded, PipelineConfig, load_preset, presets

Tree = dict[str, Any]


NO_PRESET = "none"
#: No override. A field that may be null has no form in Prefect's UI until its type is chosen.
NOTHING: Tree = {}


class _Known:
    """Puts the names of the shipped presets into the schema."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return {"type": "string", "enum": [NO_PRESET, *presets()]}


class _Partial:
    """Puts the configuration's schema, with nothing to fill in, in the place of any mapping."""

    def __get_pydantic_json_schema__(
        self, schema: CoreSchema, handler: GetJsonSchemaHandler
    ) -> JsonSchemaValue:
        return copy.deepcopy(_partial_schema())


@functools.cache
def _partial_schema() -> Tree:
    """Made once: Prefect asks for it some hundred times in a `prefect deploy --all`."""
    whole = PipelineConfig.model_json_schema()
    partial = _without_defaults(whole, whole.pop("$defs"))
    # What PPO's section goes by, `rl_gamma` and the like, may stand at the top too.
    partial["patternProperties"] = partial["properties"]["ppo"]["patternProperties"]
    return partial


def _without_defaults(node: Any, definitions: Tree) -> Any:
    """The schema in one piece, and without defaults."""
    if isinstance(node, list):
        return [_without_defaults(item, definitions) for item in cast("list[Any]", node)]
    if not isinstance(node, dict):
        return node
    tree = cast("Tree", node)
    if "$ref" in tree:
        own = {key: value for key, value in tree.items() if key != "$ref"}
        tree = definitions[tree["$ref"].rpartition("/")[2]] | own
    if tree.get("type") == "boolean":
        # A form's check box is false when nobody has touched it; a choice is nothing.
        tree = {key: value for key, value in tree.items() if key != "type"} | {
            "enum": [True, False]
        }
    names = tree.get("properties")
    return {
        key: {name: _without_defaults(value[name], definitions) for name in value}
        if value is names
        else _without_defaults(value, definitions)
        for key, value in tree.items()
        if key != "default"
    }


def _tree(value: Any) -> Any:
    return value.model_dump(mode="json") if isinstance(value, PipelineConfig) else value


Preset = Annotated[str, _Known()]
Overrides = Annotated[dict[str, Any], BeforeValidator(_tree), _Partial()]


#: Where a command that has put preset and overrides together found each value.
ORIGINS: ContextVar[Mapping[str, str] | None] = ContextVar("ORIGINS", default=None)


def resolve(preset: str, overrides: Tree) -> Loaded:
    """The configuration that a run's parameters name, and where each value came from.

    Raises:
        ConfigError: One line naming the field, the value and the cure.
    """
    loaded = load_preset(None if preset == NO_PRESET else preset, overrides)
    origins = ORIGINS.get()
    return loaded if origins is None else Loaded(loaded.config, origins)
