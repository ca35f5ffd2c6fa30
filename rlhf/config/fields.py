"""Dotted names of fields, such as `ppo.lora.r`, their types and meanings."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from typing import Any, cast, get_args

from pydantic import BaseModel

from rlhf.config.pipeline import PipelineConfig
from rlhf.config.ppo import ALIASES
from rlhf.config.section import Tree, member_types, sections, union_members, without_none

#: End of a sentence; `e.g.` and decimals are none.
_END = re.compile(r"(?<=[^\s.]{2}[.!?)])\s+(?=[A-Z`\"(])")


def canonical(key: str) -> str:
    """Return the dotted name, `rl_gamma` and `ppo.rl_gamma` replaced by `ppo.gamma`."""
    alias, dot, rest = key.removeprefix("ppo.").partition(".")
    return f"ppo.{ALIASES[alias]}{dot}{rest}" if alias in ALIASES else key


def field_types(key: str) -> tuple[Any, ...] | None:
    """Return the types of the field with this dotted name; None if there is none."""
    types: tuple[Any, ...] | None = (PipelineConfig,)
    for name in key.split("."):
        types = member_types(types, name)
        if types is None:
            return None
    return types


def meaning_of(key: str) -> str:
    """Return what a field with this dotted name is, in a sentence; empty if it is not known.

    A name within a mapping, such as that of a component, has the mapping's meaning.
    """
    types: tuple[Any, ...] = (PipelineConfig,)
    found = ""
    for name in key.split("."):
        for section in sections(types):
            field = section.model_fields.get(name)
            if field is not None and field.description:
                found = first_sentence(field.description)
                break
        types = member_types(types, name) or ()
    return found


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring as one line."""
    line = " ".join(text.split())
    return _END.split(line, maxsplit=1)[0]


def containing_field(key: str) -> str | None:
    """Return `ppo.gamma` for `ppo.gamma.x`; None if no plain field contains the name."""
    parent = key.rpartition(".")[0]
    types = field_types(parent) if parent else ()
    if types is None:
        return containing_field(parent)
    return parent if types and not _has_members(types) else None


def siblings(key: str) -> list[str]:
    """Return the field names of the section that contains this dotted name."""
    types: tuple[Any, ...] | None = (PipelineConfig,)
    for name in key.split(".")[:-1]:
        types = member_types(types or (), name)
    return sorted({name for section in sections(types or ()) for name in section.model_fields})


def nearest(key: str) -> str | None:
    """Return the field with the most similar dotted name, or None."""
    names = list(_field_names(PipelineConfig))
    plain = key.removeprefix("ppo.").removeprefix("rl_")
    end = f".{key}" if plain == key else f"ppo.{plain}"
    same_end = [name for name in names if name.endswith(end)]
    close = difflib.get_close_matches(key, [*names, *ALIASES], n=1, cutoff=0.6)
    return next(iter((*same_end, *close)), None)


def resolve_none(tree: Tree) -> Tree:
    """Apply `without_none` to a configuration tree."""
    return without_none(tree, (PipelineConfig,))


def flatten(tree: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (dotted name, leaf) pairs of a nested mapping; lists are leaves."""
    for key, value in tree.items():
        if isinstance(value, dict) and value:
            yield from flatten(cast("Tree", value), f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _has_members(types: tuple[Any, ...]) -> bool:
    """Return whether values of these types have members that dotted names address."""
    return bool(sections(types)) or member_types(types, "") is not None


def _field_names(model: type[BaseModel], prefix: str = "") -> Iterator[str]:
    """Yield the dotted names of all fields, sections included."""
    for name, field in model.model_fields.items():
        yield f"{prefix}{name}"
        types = union_members(field.annotation)
        for section in sections((*types, *get_args(types[0]))):
            yield from _field_names(section, f"{prefix}{name}.")
