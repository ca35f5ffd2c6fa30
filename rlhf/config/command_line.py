"""Reads overrides such as `--ppo.kl_coef=0.05` from the command line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from typing import Any, Literal, get_origin

import yaml

from rlhf.config.explain import cure, one_line, shown_value
from rlhf.config.fields import Tree, canonical, field_kinds, whole
from rlhf.errors import ConfigError

FORM = "write overrides as --section.field=value"


def parse_overrides(overrides: Sequence[str]) -> Tree:
    """Turn `--section.field=value` and `--section.field value` into a nested mapping.

    Names are exact, but for `-` in place of `_`. A value is text, or JSON where the field is no
    text, so that lists and whole sections can be given too.

    Raises:
        ConfigError: A field that does not exist, has no value, or has two.
    """
    tree: Tree = {}
    given: list[str] = []
    for name, text in _pairs(overrides):
        key = canonical(name)
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
        place[field] = _value(text, types)
    return tree


def _pairs(tokens: Sequence[str]) -> Iterator[tuple[str, str]]:
    rest = list(tokens)
    while rest:
        token = rest.pop(0)
        name, equals, value = token[2:].partition("=")
        if not token.startswith("--") or not name:
            raise _wrong(f"{shown_value(token)} is not an override; {FORM}")
        name = name.replace("-", "_")
        if not equals:
            if not rest or rest[0].startswith("--"):
                known = field_kinds(canonical(name)) is not None
                raise _wrong(f"{name} has no value; {FORM}") if known else _unknown(name)
            value = rest.pop(0)
        yield name, value


def _value(text: str, types: tuple[Any, ...]) -> Any:
    if any(kind is str or get_origin(kind) is Literal for kind in types):
        return text
    try:
        # YAML's brackets are JSON's, with fewer quotes to escape from the shell.
        value = yaml.safe_load(text) if text[:1] in ("[", "{") else json.loads(text)
    except (ValueError, yaml.YAMLError, RecursionError):
        return text
    # Only where a field may be null is null a value: see `resolve_none`.
    return text if value is None else value


def _unknown(name: str) -> ConfigError:
    above = whole(name)
    if above:
        return _wrong(f"{name}: {above} has no fields of its own; write --{above}=value")
    return _wrong(f"{name} is not a field of the configuration; {cure(name)}")


def _wrong(text: str) -> ConfigError:
    return ConfigError(one_line(f"command line: {text}"))
