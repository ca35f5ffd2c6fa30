"""Laws of the layout: one-way imports, no class in flows, one table of stages."""

from __future__ import annotations

import ast
import importlib.metadata
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import get_args

import pytest

import rlhf
from rlhf.config.pipeline import StageName

ROOT = Path(__file__).parents[1]
PACKAGES = ("rlhf", "tasks", "flows")
#: A stage's name may be a string here: in the Literal, and in the table that is checked against it.
#: In a champion's history "promote" is the action of an entry, beside "rollback".
DECLARATIONS = ("rlhf/config/pipeline.py", "tasks/stages.py", "rlhf/champions.py")


@cache
def module_trees() -> dict[str, ast.Module]:
    """Parsed product modules by dotted name."""
    trees = {}
    for path in sorted(p for package in PACKAGES for p in (ROOT / package).rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        trees[name] = ast.parse(path.read_text())
    return trees


def import_graph(trees: dict[str, ast.Module]) -> dict[str, set[str]]:
    """The modules that each module imports, under TYPE_CHECKING and inside functions too."""
    graph = {}
    for name, tree in trees.items():
        targets: set[str] = set()
        for node in ast.walk(tree):
            if isinstance(node, ast.Import):
                targets.update(alias.name for alias in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module:
                inner = {f"{node.module}.{alias.name}" for alias in node.names}
                targets |= inner & trees.keys()
                if inner - trees.keys():
                    targets.add(node.module)
        graph[name] = targets & trees.keys() - {name}
    return graph


def cycles(graph: dict[str, set[str]]) -> Iterator[list[str]]:
    """A shortest path from each module back to itself, where there is one."""
    for start in sorted(graph):
        paths = [[start, target] for target in sorted(graph[start])]
        visited: set[str] = set()
        while paths:
            path = paths.pop(0)
            if path[-1] == start:
                yield path
                break
            if path[-1] not in visited:
                visited.add(path[-1])
                paths += [[*path, target] for target in sorted(graph[path[-1]])]


def classes(tree: ast.Module) -> list[str]:
    return [node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)]


def stage_names(tree: ast.Module) -> list[str]:
    """Strings in code, docstrings apart, that equal a stage's name."""
    docstrings = {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}
    return [
        f"line {node.lineno}: {node.value!r}"
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and id(node) not in docstrings
        and node.value in get_args(StageName)
    ]


def test_no_import_cycle():
    assert [" → ".join(path) for path in cycles(import_graph(module_trees()))] == []


def upper_names(tree: ast.Module) -> list[str]:
    """Strings in code that name a module of the packages above the library."""
    return [
        node.value
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant)
        and re.fullmatch(r"(tasks|flows)\.[\w.]+", str(node.value))
    ]


def test_the_library_names_what_stands_above_it_in_one_table():
    # A name in a string is no import that the contracts see: `rlhf.Pipeline` is the only use.
    named = {n: upper_names(tree) for n, tree in module_trees().items() if n.startswith("rlhf")}
    above = [module for module in rlhf.PUBLIC.values() if not module.startswith("rlhf.")]
    assert {name: found for name, found in named.items() if found} == {"rlhf": above}


def test_flows_define_no_class():
    # Prefect loads a flow by its file and the command by its module: a class would exist twice.
    flows = {name: tree for name, tree in module_trees().items() if name.startswith("flows.")}
    assert {name: classes(tree) for name, tree in flows.items() if classes(tree)} == {}


def test_no_flow_module_shadows_a_dependency():
    # Prefect puts a flow's folder first on sys.path.
    names = {name.split(".")[1] for name in module_trees() if name.startswith("flows.")}
    assert names & set(importlib.metadata.packages_distributions()) == set()


def test_stages_are_named_in_their_table_alone():
    named = {
        name: lines
        for name, tree in module_trees().items()
        if f"{name.replace('.', '/')}.py" not in DECLARATIONS and (lines := stage_names(tree))
    }
    assert named == {}


def test_documents_name_modules_that_exist():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.glob("benchmarks/*.md")]
    path = re.compile(r"\b(?:rlhf|tasks|flows|tests|benchmarks)/[\w/]+\.py\b")
    missing = {
        document.name: gone
        for document in documents
        if document.name != "CHANGELOG.md"
        and (gone := [p for p in path.findall(document.read_text()) if not (ROOT / p).is_file()])
    }
    assert missing == {}


@pytest.mark.parametrize(
    ("b", "count"),
    [
        ("def f():\n    from rlhf import a", 2),
        ("from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rlhf.a", 2),
        ("import os", 0),
    ],
)
def test_a_cycle_is_detected(b, count):
    trees = {"rlhf": "", "rlhf.a": "from rlhf.b import x", "rlhf.b": b}
    graph = import_graph({name: ast.parse(text) for name, text in trees.items()})
    assert len(list(cycles(graph))) == count


def test_a_class_and_a_stages_name_are_detected():
    tree = ast.parse('"train-sft"\ndef f():\n    class A: ...\n    return name == "train-sft"')
    assert classes(tree) == ["A"]
    assert stage_names(tree) == ["line 4: 'train-sft'"]
