"""Strict YAML and JSON parsing, and values as text in messages.

A duplicate key is an error. No error repeats the text, which may hold a secret.
"""

from __future__ import annotations

import json
import re
from collections.abc import Hashable
from typing import Any

import yaml

from rlhf import limits

#: Characters of a message: above them a name or value is too long to be read.
LONGEST_LINE = 4_000
#: Exceptions that `parse` raises for broken YAML.
BROKEN = (yaml.YAMLError, ValueError, RecursionError)


def parse(text: str) -> Any:
    """Parse a YAML or JSON text of limited size.

    Raises:
        Exception: One of `BROKEN`.
    """
    if len(text) > limits.MAX_CONFIG_BYTES:
        raise ValueError(f"has more than {limits.MAX_CONFIG_BYTES:,} characters; shorten it")
    try:
        return yaml.load(text, _Loader)
    except RecursionError:
        raise ValueError(f"is nested more than {limits.MAX_DEPTH} levels deep") from None
    except (ArithmeticError, LookupError, AttributeError, TypeError):
        # As from `!!int ""`, `!!timestamp x` or 1:1:…:1.0 with thousands of digits.
        raise ValueError("holds a value that is none of its type; write it in quotes") from None


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raise `DuplicateKey` for a duplicate key; for `json.loads(object_pairs_hook=…)`."""
    mapping: dict[str, Any] = {}
    for key, value in pairs:
        if key in mapping:
            raise DuplicateKey(key)
        mapping[key] = value
    return mapping


def reason(error: Exception) -> str:
    """Return line and problem of a YAML error, without its excerpt of the text."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error)
    return f"line {mark.line + 1}: {getattr(error, 'problem', None) or 'unexpected text'}"


def shown_value(value: Any) -> str:
    """Return the value's repr, cut off after 80 characters."""
    try:
        text = repr(value)
    except ValueError:  # Python writes no whole number of more than 4,300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:79]}…"


def as_written(value: Any) -> str:
    """Format a value as in a preset: text bare, null as `none`, others as JSON."""
    if value is None:
        return "none"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def one_line(text: str) -> str:
    """Remove line breaks, and from URIs user info such as passwords; leave out a long middle."""
    line = re.sub(r"//[^\s'\"]*@", "//…@", " ".join(text.split()))
    return line if len(line) <= LONGEST_LINE else f"{line[:1500]} … {line[-500:]}"


class DuplicateKey(yaml.constructor.ConstructorError, ValueError):
    """Error for a key that appears twice in a mapping; `problem` names the key."""

    def __init__(self, key: Any, mark: yaml.Mark | None = None) -> None:
        super().__init__(None, None, f"{key} stands there twice", mark)


class _Loader(yaml.SafeLoader):
    """Safe YAML loader that refuses duplicate keys, values that contain themselves, and bombs.

    A bomb is a text of aliases of aliases, which grows a thousandfold with each line.
    """

    def get_single_node(self) -> Any:
        """Compose the document, and check its size before anything is built from it."""
        node: Any = super().get_single_node()
        limits.measure(node, _inner_nodes)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """Build the mapping at once, so that an alias to an outer value is an error."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise DuplicateKey(key.value, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=True)


def _inner_nodes(node: Any) -> list[Any]:
    """Return the nodes in a YAML node: items, or keys and values."""
    if isinstance(node, yaml.MappingNode):
        return [part for pair in node.value for part in pair]
    return node.value if isinstance(node, yaml.SequenceNode) else []
