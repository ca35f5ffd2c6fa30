"""A value of a proposed configuration with its reason, and such values as a YAML text."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import yaml

from rlhf.plain_text import one_line


@dataclass(frozen=True)
class Choice:
    """One value, and why."""

    field: str
    """Dotted name; one that ends in `[]` adds an item to a list."""
    value: Any
    reason: str
    """In one line, for people; empty where the value above it has told."""
    title: str = ""
    """Name in a summary for people; empty leaves the choice out there."""
    shown: str = ""
    """Value in the summary, if it is not `value`."""

    @property
    def in_words(self) -> str:
        """The value as the summary shows it."""
        return self.shown or _scalar(self.value)


def tree_of(choices: Sequence[Choice]) -> dict[str, Any]:
    """Return the configuration tree of choices."""
    tree: dict[str, Any] = {}
    for choice in choices:
        *parents, last = choice.field.removesuffix("[]").split(".")
        section = tree
        for name in parents:
            section = section.setdefault(name, {})
        if choice.field.endswith("[]"):
            section.setdefault(last, []).append(choice.value)
        else:
            section[last] = choice.value
    return tree


def replaced(
    choices: Sequence[Choice], changes: Mapping[str, Mapping[str, Any]], reason: str
) -> list[Choice]:
    """Return choices with other values for fields, in place or behind those of their section."""
    result = list(choices)
    for section, values in changes.items():
        for name, value in values.items():
            field = f"{section}.{name}"
            where = [i for i, c in enumerate(result) if c.field == field]
            if where:
                old = result[where[0]]
                result[where[0]] = Choice(field, value, reason, old.title)
                continue
            same = [i for i, c in enumerate(result) if c.field.startswith(f"{section}.")]
            result.insert(same[-1] + 1 if same else len(result), Choice(field, value, reason))
    return result


def as_yaml(choices: Sequence[Choice], head: Sequence[str]) -> str:
    """Return choices as YAML: each value below a comment with its reason.

    Args:
        choices: Those of one section stand together.
        head: Lines of the comment at the top.
    """
    lines = [_comment(line, "") for line in head]
    lines += _section([(choice.field.split("."), choice) for choice in choices], "")
    return "\n".join(lines) + "\n"


def _section(items: Sequence[tuple[list[str], Choice]], indent: str) -> list[str]:
    """Return the lines of a mapping; fields first-come, first-served."""
    groups: dict[str, list[tuple[list[str], Choice]]] = {}
    for path, choice in items:
        groups.setdefault(path[0].removesuffix("[]"), []).append((path[1:], choice))
    lines: list[str] = []
    for name, members in groups.items():
        first = members[0][1]
        if not indent:
            lines.append("")
        if members[0][0]:
            lines += [f"{indent}{name}:", *_section(members, indent + "  ")]
        elif first.field.endswith("[]"):
            lines.append(f"{indent}{name}:")
            for _, choice in members:
                lines += _reason(choice, indent + "  ")
                lines.append(f"{indent}  - {_scalar(choice.value)}")
        else:
            lines += [*_reason(first, indent), f"{indent}{name}: {_scalar(first.value)}"]
    return lines


def _reason(choice: Choice, indent: str) -> list[str]:
    return [_comment(choice.reason, indent)] if choice.reason else []


def _comment(text: str, indent: str) -> str:
    """Return a line of comment, whatever the text holds."""
    return f"{indent}# {one_line(text)}".rstrip()


def _scalar(value: Any) -> str:
    """Return a value in one line of YAML."""
    if value is None:
        return "none"
    if isinstance(value, Mapping) and all(map(_is_plain, value.values())):
        # As people write it: YAML's own writer quotes the key `on`.
        return f"{{{', '.join(f'{key}: {_scalar(part)}' for key, part in value.items())}}}"
    text = yaml.safe_dump(
        value, allow_unicode=True, width=math.inf, default_flow_style=True, sort_keys=False
    )
    return text.removesuffix("...\n").strip()


def _is_plain(value: Any) -> bool:
    """Return whether a value in a mapping needs no quotes."""
    is_word = isinstance(value, str) and re.fullmatch(r"[A-Za-z][\w.]*", value)
    return bool(is_word) or (isinstance(value, int | float) and not isinstance(value, bool))
