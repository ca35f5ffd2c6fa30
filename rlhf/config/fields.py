"""Which fields the configuration has: their names, their types, and the names they also go by."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, cast, get_args

from pydantic import BaseModel

from rlhf.config.aliases import ALIASES
from rlhf.config.pipeline import PipelineConfig
from rlhf.config.section import Tree, below, kinds, sections, without_none

Model = type[BaseModel]


def canonical(key: str) -> str:
    """`rl_gamma` and `ppo.rl_gamma` as `ppo.gamma`; every other dotted key as it is."""
    alias, dot, rest = key.removeprefix("ppo.").partition(".")
    return f"ppo.{ALIASES[alias]}{dot}{rest}" if alias in ALIASES else key


def whole(key: str) -> str | None:
    """The field, itself no section, that a dotted name reaches into: `gates.policy` or None."""
    above = key.rpartition(".")[0]
    types = field_kinds(above) if above else ()
    if types is None:
        return whole(above)
    return above if types and not _has_fields(types) else None


def _has_fields(types: tuple[Any, ...]) -> bool:
    """Whether dotted names may go on: sections do, and mappings from names to sections."""
    return bool(sections(types)) or below(types, "") is not None


def field_kinds(key: str) -> tuple[Any, ...] | None:
    """The types that the field of this dotted name may have; None if there is no such field."""
    found: tuple[Any, ...] | None = (PipelineConfig,)
    for name in key.split("."):
        found = below(found, name)
        if found is None:
            return None
    return found


def siblings(key: str) -> list[str]:
    """The fields that stand beside this dotted name, if what it names lies in a section."""
    found: tuple[Any, ...] | None = (PipelineConfig,)
    for name in key.split(".")[:-1]:
        found = below(found or (), name)
    return sorted({name for section in sections(found or ()) for name in section.model_fields})


def nearest(key: str) -> str | None:
    """The field whose name is most like this one's."""
    names = list(_names(PipelineConfig))
    plain = key.removeprefix("ppo.").removeprefix("rl_")
    end = f".{key}" if plain == key else f"ppo.{plain}"
    same_end = [name for name in names if name.endswith(end)]
    close = difflib.get_close_matches(key, [*names, *ALIASES], n=1, cutoff=0.6)
    return next(iter((*same_end, *close)), None)


def resolve_none(tree: Tree) -> Tree:
    """`none` means null where a field may be null, and an empty section is one of defaults."""
    return without_none(tree, (PipelineConfig,))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """(dotted key, leaf) pairs of a nested mapping; lists are leaves."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(cast("Tree", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _names(model: Model, prefix: str = "") -> Iterator[str]:
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        types = kinds(field.annotation)
        for section in sections((*types, *get_args(types[0]))):
            yield from _names(section, f"{prefix}{name}.")
