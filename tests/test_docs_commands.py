"""Commands in the guides: each is one that the command line, make and Python take."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from flows.cli import app
from rlhf.config.fields import canonical, field_types

ROOT = Path(__file__).parents[1]
#: Without generated pages that have tests of their own: of all commands, and of mistakes.
GUIDES = [
    path for path in sorted([*ROOT.glob("*.md"), *ROOT.glob("docs/*.md")])
    if path.name not in ("commands.md", "mistakes.md")
]  # fmt: skip
_BLOCK = re.compile(r"(?ms)^ *```(sh|bash|console)\n(.*?)^ *```")
#: Words in a block after which another command begins.
_NEXT = re.compile(r"&&|\|\||[;&|]")


def commands(text: str) -> list[str]:
    """The commands in a page's blocks, without prompts, comments and what they are piped into."""
    found = []
    for block in _BLOCK.finditer(text):
        for line in block[2].replace("\\\n", " ").splitlines():
            plain = re.sub(r"(^|\s)#.*", "", line.strip().removeprefix("$ "))
            found += [part.strip() for part in _NEXT.split(_quoted(plain))]
    return [command for command in found if command]


def _quoted(line: str) -> str:
    """A line whose quoted parts hold no separators."""
    return re.sub(r"'[^']*'|\"[^\"]*\"", lambda m: re.sub(r"[;&|]", "_", m[0]), line)


def words_of(command: str) -> list[str]:
    """The words of a command; `…` and `<name>` stand for any word."""
    words = shlex.split(command)
    while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
        words = words[1:]  # variables of the environment
    return [re.sub(r"<[^>]*>", "x", word) for word in words]


def told(name: str) -> list[tuple[str, str]]:
    """All commands of the guides that begin with this word."""
    return [
        (guide.name, command)
        for guide in GUIDES
        for command in commands(guide.read_text("utf-8"))
        if words_of(command)[:1] == [name]
    ]


@pytest.mark.parametrize(("guide", "command"), told("rlhf"))
def test_the_command_line_takes_it(guide, command):
    words = ["configs/quickstart.yaml" if word == "…" else word for word in words_of(command)[1:]]
    app.parse_args(words, exit_on_error=False, print_error=False)
    for word in words:
        name = canonical(word.removeprefix("--").partition("=")[0].replace("-", "_"))
        if word.startswith("--") and "." in name:
            assert field_types(name) is not None, f"{name}: no such value"


@pytest.mark.parametrize(("guide", "command"), told("make"))
def test_make_knows_it(guide, command):
    rules = re.findall(r"(?m)^([\w-]+):", (ROOT / "Makefile").read_text("utf-8"))
    targets = [
        word for word in words_of(command)[1:] if not word.startswith("-") and "=" not in word
    ]
    assert set(targets) <= set(rules)


@pytest.mark.parametrize(("guide", "command"), told("python"))
def test_python_finds_the_module(guide, command):
    words = words_of(command)
    if words[1:2] != ["-m"] or words[2].partition(".")[0] not in (
        "benchmarks",
        "docs",
        "tests",
        "tasks",
    ):
        return
    path = ROOT / words[2].replace(".", "/")
    assert path.with_suffix(".py").is_file() or (path / "__main__.py").is_file()


def test_a_wrong_command_is_found():
    text = "```sh\n$ rlhf runs --wide | cat   # as it is\nmake x && rlhf nothing\n```\n"
    assert commands(text) == ["rlhf runs --wide", "cat", "make x", "rlhf nothing"]
    with pytest.raises(Exception, match="nothing"):
        app.parse_args(["nothing"], exit_on_error=False, print_error=False)
