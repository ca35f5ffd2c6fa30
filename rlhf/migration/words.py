"""Command lines of AITraining, accelerate, torchrun and TRL: their options with values."""

from __future__ import annotations

import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any

from rlhf.migration.names import Tool, Trainer, tables
from rlhf.migration.secrets import holds_secret

#: Commands of AITraining, by its name today and before.
_AITRAINING = ("aitraining", "autotrain")
_LAUNCHERS = ("accelerate", "torchrun", "python", "python3", "trl", "uv", "deepspeed")
#: Words of a shell that stand before a command.
_BEFORE = ("then", "do", "else", "if", "time", "nohup", "exec", "env", "(", "{", "!")
#: Trainers by what names of scripts and of `trl`'s commands hold.
_SCRIPTS: tuple[tuple[str, Trainer], ...] = (
    ("ppo", "ppo"), ("reward", "reward_model"), ("rm", "reward_model"), ("sft", "sft"),
)  # fmt: skip
#: Characters of a shell's operators, and those of private use that stand for quoted ones.
_OPERATORS = ";<>|&"
_SHIELD = {ord(char): 0xF8F0 + i for i, char in enumerate(_OPERATORS)}
_UNSHIELD = {code: char for char, code in _SHIELD.items()}
#: Trainers that have no equal here.
_OTHERS = re.compile(r"dpo|grpo|kto|orpo|rloo|cpo|gkd|bco|xpo|prm|distill", re.IGNORECASE)


@dataclass(frozen=True)
class CommandLine:
    """A command line in parts."""

    tool: Tool
    options: Sequence[tuple[str, Any]]
    """Options and values, as text; a list for several values, True for a flag alone."""
    launcher: Sequence[tuple[str, Any]] = ()
    """Options that stand before the script."""
    trainer: Trainer | None = None
    """By the name of the script or command."""
    other: str = ""
    """A trainer that has no equal here, by the name of the script or command."""
    by_accelerate: bool = False
    """Whether `accelerate launch` starts the script."""


def is_command(words: Sequence[str]) -> bool:
    """Return whether words are a command line of one of the tools."""
    rest = _without_variables(words)
    first = PurePath(rest[0]).name if rest else ""
    return first in _AITRAINING or first in _LAUNCHERS or first.endswith(".py")


def find_commands(text: str) -> list[list[str]]:
    """Return the command lines of the tools in a shell script.

    Raises:
        ValueError: A quote is not closed, or a line of options continues no command.
    """
    joined = re.sub(r"\\\r?\n", " ", text)
    commands: list[list[str]] = []
    for line in joined.splitlines():
        if "--" not in line:
            continue
        several = list(_commands_of(line))
        words = several[0] if several else []
        if words and words[0].startswith("--"):
            # Without its value, which may be a credential.
            name = words[0].partition("=")[0]
            name = "an option" if holds_secret(name) else repr(name)
            raise ValueError(f"{name} begins a line; end the line before it with a backslash")
        commands += [
            words for words in several
            if is_command(words) and any(word.startswith("--") for word in words)
        ]  # fmt: skip
    return commands


def _commands_of(line: str) -> Iterator[list[str]]:
    """Yield the commands of a line of a shell, without redirections."""
    # The number of a redirected stream, as in `2>&1`, would be a word of its own.
    lexer = shlex.shlex(
        re.sub(r"(?<=\s)\d(?=[<>])", "", _shielded(line)), posix=True,
        punctuation_chars=_OPERATORS,
    )  # fmt: skip
    lexer.whitespace_split = True
    words: list[str] = []
    is_target = False
    for word in lexer:
        if not word or not set(word) <= set(_OPERATORS):
            words += [] if is_target else [word.translate(_UNSHIELD)]
            is_target = False
        elif "<" in word or ">" in word:
            is_target = True
        else:
            yield _without_keywords(words)
            words, is_target = [], False
    yield _without_keywords(words)


def _shielded(line: str) -> str:
    """Return a line with other characters in place of operators that are quoted or escaped.

    shlex returns them like the operators of the shell.
    """
    quote, is_escaped, found = "", False, list[str]()
    for char in line:
        is_text = bool(quote) or is_escaped
        found.append(char.translate(_SHIELD) if is_text else char)
        if is_escaped:
            is_escaped = False
        elif char == "\\" and quote != "'":
            is_escaped = True
        elif quote:
            quote = "" if char == quote else quote
        elif char in "'\"":
            quote = char
    return "".join(found)


def _without_keywords(words: Sequence[str]) -> list[str]:
    """Return a command without the words of the shell before it, such as `then`."""
    start = next((i for i, word in enumerate(words) if word not in _BEFORE), len(words))
    return list(words[start:])


def parse_command(words: Sequence[str]) -> CommandLine:
    """Take a command line apart."""
    rest = _without_variables(words)
    if PurePath(rest[0]).name in _AITRAINING:
        kind = rest[1] if len(rest) > 1 and not rest[1].startswith("-") else "llm"
        other = "" if kind in ("llm", "lm_training") else f"{rest[0]} {kind}"
        return CommandLine("aitraining", [*_options(rest[1:], "aitraining")], other=other)
    before, script, after = _parts(rest)
    name = PurePath(script).stem
    matches: list[Trainer] = [told for part, told in _SCRIPTS if part in _parts_of(name)]
    trainer = next(iter(matches), None)
    other = name if trainer is None and _OTHERS.search(name) else ""
    return CommandLine(
        "trl", [*_options(after, "trl")], [*_options(before, "trl")], trainer, other,
        PurePath(rest[0]).name == "accelerate",
    )  # fmt: skip


def _without_variables(words: Sequence[str]) -> list[str]:
    """Return a command without the variables that are set before it."""
    start = next((i for i, w in enumerate(words) if not re.match(r"[A-Za-z_]\w*=", w)), len(words))
    return list(words[start:])


def _parts(words: Sequence[str]) -> tuple[Sequence[str], str, Sequence[str]]:
    """Return what stands before the script or `trl`'s command, its name, and what follows."""
    if PurePath(words[0]).name == "trl":
        return (), words[1] if len(words) > 1 else "", words[2:]
    at = next((i for i, word in enumerate(words) if word.endswith(".py")), None)
    if at is None:
        return (), "", words
    return words[:at], words[at], words[at + 1 :]


def _parts_of(name: str) -> set[str]:
    """Return the words in a script's name, such as `reward` in `reward_modeling`."""
    return set(re.split(r"[^a-z0-9]+", name.lower()))


def _options(words: Sequence[str], tool: Tool) -> Iterator[tuple[str, Any]]:
    """Yield options with their values; words that belong to no option are passed over."""
    rest = list(words)
    while rest:
        word = rest.pop(0)
        if not re.match(r"--?[A-Za-z]", word):
            continue
        name, equals, text = word.lstrip("-").partition("=")
        values = [text] if equals else []
        while not equals and rest and not re.match(r"--?[A-Za-z]", rest[0]):
            values.append(rest.pop(0))
        value: Any = values[0] if len(values) == 1 else values or True
        is_known = any(name.replace("-", "_") in group for group in tables(tool).values())
        if not values and not is_known and name.startswith(("no-", "no_")):
            name, value = name[3:], False
        yield name.replace("-", "_"), value
