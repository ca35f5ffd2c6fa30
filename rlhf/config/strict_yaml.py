"""YAML (or JSON) that a person wrote: read strictly, and complained about without repeating it."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import yaml

#: What reading broken YAML may raise.
BROKEN = (yaml.YAMLError, ValueError, RecursionError)


class TwiceError(yaml.constructor.ConstructorError, ValueError):
    """A key stands twice in one mapping; `problem` says which."""

    def __init__(self, key: Any, mark: yaml.Mark | None = None) -> None:
        super().__init__(None, None, f"{key} stands there twice", mark)


def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """The mapping, for `json.loads` as `object_pairs_hook`; raises `TwiceError`."""
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise TwiceError(key)
        found[key] = value
    return found


def parse(text: str) -> Any:
    """The value of a YAML (or JSON) text; raises one of `BROKEN`."""
    return yaml.load(text, _Loader)


class _Loader(yaml.SafeLoader):
    """Refuses a key that stands twice, and a value that holds itself."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        """The mapping, built at once, so that an alias to an outer value is an error."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode) and key.value in seen:
                raise TwiceError(key.value, key.start_mark)
            seen.add(str(key.value))
        return super().construct_mapping(node, deep=True)


def reason(error: Exception) -> str:
    """What YAML's parser found, without the excerpt of the file that its own text repeats."""
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return str(error)
    return f"line {mark.line + 1}: {getattr(error, 'problem', None) or 'unexpected text'}"
