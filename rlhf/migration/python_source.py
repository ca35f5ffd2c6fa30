"""Arguments in a Python file, which is read and never run."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any

from rlhf.migration.names import Trainer
from rlhf.plain_text import one_line

#: Classes whose calls are read, with the trainer that they tell.
CLASSES: Mapping[str, Trainer | None] = {
    "PPOConfig": "ppo",
    "PPOv2Config": "ppo",
    "RewardConfig": "reward_model",
    "SFTConfig": "sft",
    "ScriptArguments": None,
    "ModelConfig": None,
    "LoraConfig": None,
    "LLMTrainingParams": None,
}
#: Nodes of a file that are walked; those of a long training script are some ten thousand.
_MOST_NODES = 500_000
#: Errors of an expression that is no literal.
_NO_LITERAL = (ValueError, TypeError, SyntaxError, RecursionError, MemoryError)


@dataclass
class Calls:
    """Arguments of the calls in a file."""

    classes: set[str] = field(default_factory=set[str])
    """Classes that are called."""
    values: list[tuple[str, str, Any]] = field(default_factory=list[tuple[str, str, Any]])
    """Class, argument and value."""
    computed: list[tuple[str, str]] = field(default_factory=list[tuple[str, str]])
    """Class and argument whose value only running the file would tell."""


def read_calls(text: str) -> Calls:
    """Return the arguments of calls of the known classes, by reading the source alone.

    Values are literals, negative numbers, and names to which the file assigns a literal once.
    What several calls of a class say differently, or the file changes afterwards, has no value.

    Raises:
        ValueError: It is no Python, or too large or nested too deeply.
    """
    try:
        tree = ast.parse(text)
        nodes = [node for _, node in zip(range(_MOST_NODES + 1), ast.walk(tree), strict=False)]
    except SyntaxError as error:
        raise ValueError(f"line {error.lineno}: is no Python ({error.msg})") from None
    except (RecursionError, MemoryError):
        raise ValueError("is nested too deeply; write it flatter") from None
    if len(nodes) > _MOST_NODES:
        raise ValueError(f"has more than {_MOST_NODES:,} parts; give the call alone")
    constants = dict(_constants(nodes))
    calls: dict[str, list[Calls]] = {}
    for node in nodes:
        if isinstance(node, ast.Call) and (name := _called(node)) in CLASSES:
            found = Calls()
            _read_call(node, name, constants, found)
            calls.setdefault(_group(name), []).append(found)
    return _joined(calls, set(_changes(nodes)))


def _group(name: str) -> str:
    return "PPOConfig" if name == "PPOv2Config" else name


def _called(node: ast.Call) -> str:
    function = node.func
    if isinstance(function, ast.Name):
        return function.id
    return function.attr if isinstance(function, ast.Attribute) else ""


def _constants(nodes: list[ast.AST]) -> Iterator[tuple[str, Any]]:
    """Yield the names to which the whole file assigns once, if that is a literal."""
    values: dict[str, ast.expr] = {}
    stores: dict[str, int] = {}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            values[node.targets[0].id] = node.value
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store | ast.Del):
            stores[node.id] = stores.get(node.id, 0) + 1
        elif isinstance(node, ast.arg):  # a parameter of a function
            stores[node.arg] = stores.get(node.arg, 0) + 1
    for name, value in values.items():
        if stores[name] == 1:
            with suppress(*_NO_LITERAL):
                yield name, ast.literal_eval(value)


def _read_call(node: ast.Call, name: str, constants: Mapping[str, Any], found: Calls) -> None:
    group = _group(name)
    for keyword in node.keywords:
        if keyword.arg is None:
            found.computed.append((group, "**"))
            continue
        value = keyword.value
        if isinstance(value, ast.Name) and value.id in constants:
            found.values.append((group, keyword.arg, constants[value.id]))
            continue
        try:
            found.values.append((group, keyword.arg, ast.literal_eval(value)))
        except _NO_LITERAL:
            found.computed.append((group, one_line(keyword.arg)))
    found.computed += [(group, f"argument {i + 1}") for i in range(len(node.args))]


def _joined(calls: Mapping[str, list[Calls]], changes: set[tuple[str, str]]) -> Calls:
    """Return one call for each class: of several calls the arguments that are the same in all."""
    joined = Calls(set(calls))
    for group, several in calls.items():
        first = several[0]
        given = [value for value in first.values if all(value in each.values for each in several)]
        kept = [value for value in given if (group, value[1]) not in changes]
        joined.values += kept
        names = [(group, name) for each in several for _, name, _ in each.values]
        names += [unknown for each in several for unknown in each.computed]
        names += sorted(change for change in changes if change[0] == group)
        known = {(group, name) for _, name, _ in kept}
        joined.computed += [name for name in dict.fromkeys(names) if name not in known]
    return joined


def _changes(nodes: list[ast.AST]) -> Iterator[tuple[str, str]]:
    """Yield class and argument of what is assigned to an object after its call."""
    objects: dict[str, str] = {}
    for node in nodes:
        if isinstance(node, ast.Assign | ast.AnnAssign | ast.NamedExpr):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            if isinstance(node.value, ast.Call) and (name := _called(node.value)) in CLASSES:
                objects |= {ast.unparse(target): _group(name) for target in targets}
    for node in nodes:
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del):
            owner = ast.unparse(node.value)
            if owner in objects:
                yield objects[owner], node.attr
            elif owner.endswith(".args"):  # of a trainer, which has them from one of the calls
                yield from ((group, node.attr) for group in set(objects.values()))
        elif isinstance(node, ast.Call) and _called(node) in ("setattr", "replace") and node.args:
            group = objects.get(ast.unparse(node.args[0]))
            names = [keyword.arg or "**" for keyword in node.keywords]
            if _called(node) == "setattr" and len(node.args) > 1:
                name = node.args[1]
                is_text = isinstance(name, ast.Constant) and isinstance(name.value, str)
                names = [str(name.value) if is_text else "**"]  # type: ignore[union-attr]
            if group:
                yield from ((group, name) for name in names)
