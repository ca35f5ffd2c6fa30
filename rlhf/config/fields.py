"""Which fields the configuration has: their names, their types, and the names they also go by."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, cast, get_args

from pydantic import BaseModel

from rlhf.config.aliases import aliases, gathered
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.ppo import PPOConfig
from rlhf.config.section import kinds
from rlhf.errors import ConfigError

Tree = dict[str, Any]
Model = type[BaseModel]

#: Names that fields of section `ppo` also go by, in the section or at the top.
ALIASES = aliases(PPOConfig.model_fields)
RENAMED = tuple(ALIASES.values())


def canonical(key: str) -> str:
    """`rl_gamma` and `ppo.rl_gamma` as `ppo.gamma`; every other dotted key as it is."""
    alias = key.removeprefix("ppo.")
    return f"ppo.{ALIASES[alias]}" if alias in ALIASES else key


def without_aliases(tree: Tree) -> Tree:
    """A preset with every `rl_` name moved to its field; two values for one field are an error."""
    try:
        return gathered(tree, PPOConfig.model_fields)
    except ValueError as error:
        raise ConfigError(str(error)) from None


def whole(key: str) -> str | None:
    """The field, itself no section, that a dotted name reaches into: `gates.policy` or None."""
    above = key.rpartition(".")[0]
    types = field_kinds(above) if above else ()
    if types is None:
        return whole(above)
    return above if types and not _section(types) else None


def field_kinds(key: str) -> tuple[Any, ...] | None:
    """The types that the field of this dotted name may have; None if there is no such field."""
    found: tuple[Any, ...] = (PipelineConfig,)
    for name in key.split("."):
        section = _section(found)
        if section is None or name not in section.model_fields:
            return None
        found = kinds(section.model_fields[name].annotation)
    return found


def nearest(key: str) -> str | None:
    """The field whose name is most like this one's."""
    names = list(_names(PipelineConfig))
    same_end = [name for name in names if name.endswith(f".{key}")]
    close = difflib.get_close_matches(key, [*names, *ALIASES], n=1, cutoff=0.6)
    return next(iter((*same_end, *close)), None)


def resolve_none(tree: Tree, model: Model = PipelineConfig) -> Tree:
    """`none` means null where a field may be null, and an empty section is one of defaults."""
    resolved = dict(tree)
    for name, field in model.model_fields.items():
        if name not in tree:
            continue
        value, allowed = tree[name], kinds(field.annotation)
        section = _section(allowed)
        if type(None) in allowed and isinstance(value, str) and value.lower() in ("none", "null"):
            resolved[name] = None
        elif section and value is None and type(None) not in allowed:
            resolved[name] = {}
        elif section and isinstance(value, dict):
            resolved[name] = resolve_none(cast("Tree", value), section)
        elif (item := _section(get_args(field.annotation))) and isinstance(value, list):
            values = cast("list[Any]", value)
            resolved[name] = [
                resolve_none(cast("Tree", v), item) if isinstance(v, dict) else v for v in values
            ]
    return resolved


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) pairs of a nested mapping; lists are leaves."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(cast("Tree", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _section(types: tuple[Any, ...]) -> Model | None:
    return next((t for t in types if isinstance(t, type) and issubclass(t, BaseModel)), None)


def _names(model: Model, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        types = kinds(field.annotation)
        section = _section((*types, *get_args(types[0])))
        if section:
            yield from _names(section, f"{prefix}{name}.")
