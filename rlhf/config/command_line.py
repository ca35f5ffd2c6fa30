"""Reads overrides such as `--ppo.kl_coef=0.05` from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, cast, get_origin

from rlhf.config import strict_yaml
from rlhf.config.aliases import SEED_NAMES, by_field_names
from rlhf.config.explain import cure
from rlhf.config.fields import Tree, canonical, field_kinds, whole
from rlhf.config.wording import one_line, shown_value
from rlhf.errors import ConfigError

#: Fields of section `ppo` whose mappings are values: given whole, they replace the preset's.
MAPPINGS = ("env_config", "reward_weights")
FORM = "write overrides as --section.field=value"


class Whole(dict[str, Any]):
    """A mapping that takes the place of the preset's, and is not merged into it."""


def parse_overrides(overrides: Sequence[str]) -> Tree:
    """Turn `--section.field=value` and `--section.field value` into a nested mapping.

    Names of fields are exact, but for `-` in place of `_`; names in a mapping are as written. A
    value is text, or JSON where the field is no text, so that lists and whole sections can be
    given too. A mapping that is given whole for `env_config` or `reward_weights`, or for what lies
    within, is a `Whole`. A field that is true or false may stand alone: `--section.field`,
    `--section.no-field`.

    Raises:
        ConfigError: A field that does not exist, has no value, or has two.
    """
    tree: Tree = {}
    given: list[str] = []
    for name, text in _pairs(overrides):
        key = canonical(name)
        if key == "promotion" and not text.startswith("{"):
            key = "promotion.approval"  # so that `--promotion.name` may stand beside it
        types = field_kinds(key)
        if types is None:
            raise _unknown(name)
        for other in given:
            if f"{key}.".startswith(f"{other}.") or f"{other}.".startswith(f"{key}."):
                twice = key if key == other else f"{other} and {key}"
                raise _wrong(f"{twice}: two values for one field; keep one")
        given.append(key)
        *sections, field = key.split(".")
        place = tree
        for section in sections:
            place = place.setdefault(section, {})
        value = _value(key, text, types)
        inside = key.startswith(tuple(f"ppo.{name}." for name in MAPPINGS))
        place[field] = _whole(value) if inside else value
    try:
        tree = by_field_names(tree)  # where a whole section was given
    except ConfigError as error:
        raise _wrong(str(error)) from None
    return _with_wholes(tree, given)


def _with_wholes(tree: Tree, given: Sequence[str]) -> Tree:
    """The overrides, with the mappings marked that no dotted name reached into."""
    section = tree.get("ppo")
    if not isinstance(section, dict):
        return tree
    marked = {
        name: _whole(value)
        for name, value in cast("Tree", section).items()
        if name in MAPPINGS and not any(key.startswith(f"ppo.{name}.") for key in given)
    }
    return {**tree, "ppo": {**section, **marked}}


def _whole(value: Any) -> Any:
    return Whole(cast("Tree", value)) if isinstance(value, dict) else value


def _pairs(tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        name, equals, value = token[2:].partition("=")
        if not token.startswith("--") or not name:
            raise _wrong(f"{shown_value(token)} is not an override; {FORM}")
        name = _underscored(name)
        flag, on = _flag(name) or ("", True)
        followed = bool(rest) and not rest[0].startswith("--")
        if not on and equals:
            raise _wrong(f"{name} takes no value; write --{flag}={value}")
        if flag and not equals and not (on and followed):
            value = "true" if on else "false"
        elif not equals:
            if not followed:
                known = field_kinds(canonical(name)) is not None
                raise _wrong(f"{name} has no value; {FORM}") if known else _unknown(name)
            value = rest.pop(0)
        yield flag or name, value


def _underscored(name: str) -> str:
    """`-` as `_` in the names of fields; a name in a mapping, a component's, is as it is."""
    parts: list[str] = []
    for part in name.split("."):
        above = canonical(".".join(parts).removeprefix("no_"))
        in_mapping = any(get_origin(kind) is dict for kind in field_kinds(above) or ())
        parts.append(part if in_mapping else part.replace("-", "_"))
    return ".".join(parts)


def _flag(name: str) -> tuple[str, bool] | None:
    """The field that is true or false, and whether the name says true or (`no_`) false.

    The seed's flags may leave out the section: `--no-optimize-device-cache`.
    """
    section, dot, last = name.rpartition(".")
    without = [(name.removeprefix("no_"), False), (f"{section}{dot}{last[3:]}", False)]
    for field, on in [(name, True), *(without if "no_" in (name[:3], last[:3]) else [])]:
        for key in (canonical(field), f"ppo.{field}" if field in SEED_NAMES else field):
            if bool in (field_kinds(key) or ()):
                return key, on
    return None


def _value(key: str, text: str, types: tuple[Any, ...]) -> Any:
    if any(kind is str or get_origin(kind) is Literal for kind in types):
        return text
    try:
        value = _parsed(text)
    except strict_yaml.TwiceError as error:
        raise _wrong(f"{key}: {error.problem}; keep one") from None
    except strict_yaml.BROKEN:
        return text
    # Only where a field may be null is null a value: see `resolve_none`.
    return text if value is None else value


def _parsed(text: str) -> Any:
    """JSON; in brackets YAML too, which has fewer quotes to escape from the shell."""
    try:
        return json.loads(text, object_pairs_hook=strict_yaml.unique)
    except json.JSONDecodeError:
        # JSON goes first: YAML takes the two halves of an escaped emoji for two characters.
        return strict_yaml.parse(text) if text[:1] in ("[", "{") else text


def _unknown(name: str) -> ConfigError:
    above = whole(name)
    if above:
        return _wrong(f"{name}: {above} has no fields of its own; write --{above}=value")
    return _wrong(f"{name} is not a field of the configuration; {cure(name)}")


def _wrong(text: str) -> ConfigError:
    return ConfigError(one_line(f"command line: {text}"))
