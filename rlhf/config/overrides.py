"""Parser of command-line overrides such as `--ppo.kl_coef=0.05`."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast, get_origin

from rlhf.config.fields import canonical, containing_field, field_types
from rlhf.config.messages import cure
from rlhf.config.ppo import SEED_NAMES, by_field_names
from rlhf.config.section import Tree
from rlhf.config.text import BROKEN, DuplicateKey, one_line, parse, shown_value, unique
from rlhf.errors import ConfigError
from rlhf.limits import load_json

#: Cure for what is not an override.
FORM = "write overrides as --section.field=value"
#: Mappings in section `ppo` that replace the preset's when they are given whole.
MAPPINGS = ("env_config", "reward_weights")


def parse_overrides(overrides: Sequence[str]) -> Tree:
    """Parse `--section.field=value` and `--section.field value` into a tree.

    Names of fields are exact, but for `-` in place of `_`; names in a mapping are as written. A
    value is text, or JSON where the field is not text, so that lists and whole sections can be
    given. A mapping given whole for `env_config` or `reward_weights`, or for a value in them, is a
    `Replacement`. A flag may stand alone: `--section.field`, `--section.no-field`.

    Raises:
        ConfigError: A field does not exist, has no value, or has two.
    """
    tree: Tree = {}
    keys: list[str] = []
    for name, text in _split_tokens(overrides):
        key = canonical(name)
        if key == "promotion" and not text.startswith("{"):
            key = "promotion.approval"  # so that `--promotion.name` may stand beside it
        types = field_types(key)
        if types is None:
            raise _unknown_field(name)
        for other in keys:
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                twice = key if key == other else f"{other} and {key}"
                raise _error(f"{twice}: two values for one field; keep one")
        keys.append(key)
        *parents, field = key.split(".")
        section = tree
        for parent in parents:
            section = section.setdefault(parent, {})
        value = _parse_value(key, text, types)
        in_mapping = key.startswith(tuple(f"ppo.{name}." for name in MAPPINGS))
        section[field] = _as_replacement(value) if in_mapping else value
    try:
        tree = by_field_names(tree)  # a section given whole may hold `rl_` names
    except ConfigError as error:
        raise _error(str(error)) from None
    return _mark_replacements(tree, keys)


class Replacement(dict[str, Any]):
    """A mapping that replaces the preset's instead of being merged into it."""


def _split_tokens(tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Yield (name, text of the value) pairs; of a flag alone, `true` or `false`."""
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        name, equals, value = token[2:].partition("=")
        if not token.startswith("--") or not name:
            raise _error(f"{shown_value(token)} is not an override; {FORM}")
        name = _with_underscores(name)
        flag, on = _flag(name) or ("", True)
        has_next = bool(rest) and not rest[0].startswith("--")
        if not on and equals:
            raise _error(f"{name} takes no value; write --{flag}={value}")
        if flag and not equals and not (on and has_next):
            value = "true" if on else "false"
        elif not equals:
            if not has_next:
                known = field_types(canonical(name)) is not None
                raise _error(f"{name} has no value; {FORM}") if known else _unknown_field(name)
            value = rest.pop(0)
        yield flag or name, value


def _with_underscores(name: str) -> str:
    """Return the dotted name with `-` as `_`, except in names of components."""
    parts: list[str] = []
    for part in name.split("."):
        parent = canonical(".".join(parts).removeprefix("no_"))
        in_mapping = any(get_origin(t) is dict for t in field_types(parent) or ())
        parts.append(part if in_mapping else part.replace("-", "_"))
    return ".".join(parts)


def _flag(name: str) -> tuple[str, bool] | None:
    """Return the boolean field that a name sets, and the value: false for `no_`.

    The seed's flags may leave out the section: `--no-optimize-device-cache`.
    """
    section, dot, last = name.rpartition(".")
    negated = [(name.removeprefix("no_"), False), (f"{section}{dot}{last[3:]}", False)]
    for field, on in [(name, True), *(negated if "no_" in (name[:3], last[:3]) else [])]:
        for key in (canonical(field), f"ppo.{field}" if field in SEED_NAMES else field):
            if bool in (field_types(key) or ()):
                return key, on
    return None


def _parse_value(key: str, text: str, types: tuple[Any, ...]) -> Any:
    """Parse JSON or YAML, unless the field may be text or the text is broken."""
    if any(t is str or get_origin(t) is Literal for t in types):
        return text
    try:
        value = _parse_json(text)
    except DuplicateKey as error:
        raise _error(f"{key}: {error.problem}; keep one") from None
    except BROKEN:
        return text
    # `null` means null only where a field may be null: see `resolve_none`.
    return text if value is None else value


def _parse_json(text: str) -> Any:
    """Parse JSON; in brackets YAML too, with fewer quotes to escape from the shell."""
    try:
        return load_json(text, object_pairs_hook=unique)
    except json.JSONDecodeError:
        # JSON goes first: YAML takes the two halves of an escaped emoji for two characters.
        return parse(text) if text[:1] in ("[", "{") else text


def _mark_replacements(tree: Tree, keys: Sequence[str]) -> Tree:
    """Mark mappings that are overridden as a whole, so that they are not merged."""
    section = tree.get("ppo")
    if not isinstance(section, dict):
        return tree
    marked = {
        name: _as_replacement(value)
        for name, value in cast("Tree", section).items()
        if name in MAPPINGS and not any(key.startswith(f"ppo.{name}.") for key in keys)
    }
    return {**tree, "ppo": {**section, **marked}}


def _as_replacement(value: Any) -> Any:
    return Replacement(cast("Tree", value)) if isinstance(value, dict) else value


def _unknown_field(name: str) -> ConfigError:
    parent = containing_field(name)
    if parent:
        return _error(f"{name}: {parent} has no fields of its own; write --{parent}=value")
    return _error(f"{name} is not a field of the configuration; {cure(name)}")


def _error(text: str) -> ConfigError:
    return ConfigError(one_line(f"command line: {text}"))
