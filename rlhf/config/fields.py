"""Which fields the configuration has: their names, their types, and the names they also go by."""

from __future__ import annotations

import difflib
from collections.abc import Iterator, Mapping
from typing import Any, cast, get_args

from pydantic import BaseModel

from rlhf.config.pipeline import PipelineConfig
from rlhf.config.section import kinds
from rlhf.errors import ConfigError

Tree = dict[str, Any]
Model = type[BaseModel]

#: Fields of section `ppo` that may also be written as `rl_<name>`, in the section or at the top.
RENAMED = (
    *("kl_coef", "gamma", "gae_lambda", "value_loss_coef", "clip_range", "value_clip_range"),
    *("num_ppo_epochs", "chunk_size", "mini_batch_size", "max_new_tokens"),
    *("top_k", "top_p", "temperature"),
)
ALIASES = {f"rl_{name}": name for name in RENAMED}


def canonical(key: str) -> str:
    """`rl_gamma` and `ppo.rl_gamma` as `ppo.gamma`; every other dotted key as it is."""
    alias = key.removeprefix("ppo.")
    return f"ppo.{ALIASES[alias]}" if alias in ALIASES else key


def without_aliases(tree: Tree) -> Tree:
    """A preset with every `rl_` name moved to its field; two values for one field are an error."""
    section: Any = tree.get("ppo") or {}
    if not isinstance(section, dict):
        return tree  # validation says what is wrong with it
    given = [
        *cast("Tree", section).items(),
        *((key, value) for key, value in tree.items() if key in ALIASES),
    ]
    renamed: Tree = {}
    for key, value in given:
        name = ALIASES.get(key, key)
        if name in renamed:
            raise ConfigError(
                f"ppo.{name} is given twice, as {name} and as rl_{name}: {renamed[name]!r} and "
                f"{value!r}; keep one"
            )
        renamed[name] = value
    rest = {k: v for k, v in tree.items() if k not in ALIASES and k != "ppo"}
    return {**rest, "ppo": renamed} if renamed else rest


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
