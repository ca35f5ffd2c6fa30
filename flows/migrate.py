"""The `rlhf migrate` command: a configuration from the arguments of another tool."""

from __future__ import annotations

import os
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter
from rich.padding import Padding

from rlhf.errors import ConfigError
from rlhf.files import exists, expand_home, fsync
from rlhf.plain_text import counted, one_line
from tasks.console import console, say
from tasks.listing import show_json

if TYPE_CHECKING:
    from rlhf.migration.migrate import Migration
    from rlhf.migration.names import Trainer

#: Name of the file that is written.
FILE = Path("migrated.yaml")
#: Headings of what became of arguments, with their colours.
_HEADINGS = {
    "same": ("became", ""),
    "changed": ("changed in meaning", "yellow"),
    "broken": ("never worked there", "magenta"),
    "none": ("no equal here", ""),
    "refused": ("refused by this configuration", "red"),
    "computed": ("not known without running it", "yellow"),
    "unknown": ("warning: not understood", "red"),
}
_TRAINERS: dict[str, Trainer] = {"sft": "sft", "reward": "reward_model", "ppo": "ppo"}

Words = Annotated[
    str,
    Parameter(
        allow_leading_hyphen=True,
        help="Files of arguments (YAML, JSON, a shell script, Python), or a command line after --.",
    ),
]


def migrate(
    *arguments: Words,
    out: Annotated[Path, Parameter(name=("--out", "-o"))] = FILE,
    trainer: Literal["sft", "reward", "ppo"] | None = None,
    json: bool = False,
) -> None:
    """Write a configuration from the arguments of AITraining or TRL (docs/migrating.md).

    Says of each argument what it became, what changed in meaning, what never worked there and what
    has no equal. Several files make one configuration: sft.yaml reward.yaml ppo.yaml.

    Parameters
    ----------
    out
        New file for the configuration; nothing is overwritten.
    trainer
        What the arguments are for, if they don't tell.
    json
        Print what became of each argument as JSON.
    """
    from rlhf.migration.migrate import migrate as convert
    from rlhf.migration.read import read_arguments

    if not arguments:
        raise ConfigError("no arguments to migrate; give a file, or a command line after --")
    _check_target(out)
    found = read_arguments(arguments, _TRAINERS[trainer] if trainer else None)
    result = convert(found)
    origins = ", ".join(dict.fromkeys(given.origin for given in found))
    _write(out, result.text(origins))
    if json:
        show_json(_as_json(out, result), indent=None)
        return
    _show(result)
    console.print()
    say(f"written: {out}")
    say(f"next:    rlhf config show {shlex.quote(str(out))}", "bold green")


def _check_target(out: Path) -> None:
    """Refuse a file that is there already, or can't be made.

    Raises:
        ConfigError: It names the file and the cure.
    """
    target = expand_home(out)
    setting = f"--out = {str(out)!r}"
    if os.path.lexists(target):
        raise ConfigError(
            f"{setting}: is there already; nothing is overwritten: name another with -o"
        )
    if not exists(target.parent) or not os.access(target.parent, os.W_OK | os.X_OK):
        raise ConfigError(f"{setting}: its folder is missing or not writable; name another")


def _write(out: Path, text: str) -> None:
    """Write the file whole, or not at all; one that has appeared meanwhile stays.

    Raises:
        ConfigError: The disk refuses, or something stands in its place.
    """
    target = expand_home(out)
    scratch = target.with_name(f".{target.name[:100]}-{os.getpid()}")
    try:
        try:
            scratch.write_text(text, encoding="utf-8")
            fsync(scratch)
            os.link(scratch, target)  # fails if the name is taken
        finally:
            scratch.unlink(missing_ok=True)
        fsync(target.absolute().parent)
    except OSError as error:
        raise ConfigError(
            f"--out = {str(out)!r}: can't be written ({error.strerror}); name another"
        ) from None


def _show(result: Migration) -> None:
    from rlhf.migration.migrate import described

    for fate, (heading, style) in _HEADINGS.items():
        lines = [described(finding) for finding in result.findings if finding.fate == fate]
        _show_lines(heading, style, lines)
    if result.silent:
        count = counted(result.silent, "more argument")
        console.print()
        console.print(f"{count} had the default of the old tool, or nothing to carry over")
    _show_lines("before a run", "bold", [one_line(note) for note in result.notes])


def _show_lines(heading: str, style: str, lines: Sequence[str]) -> None:
    if not lines:
        return
    console.print()
    console.print(heading, style=style or "bold")
    for line in lines:
        console.print(Padding(line, (0, 0, 0, 2), expand=False))


def _as_json(out: Path, result: Migration) -> dict[str, object]:
    return {
        "file": str(out),
        "arguments": [vars(finding) for finding in result.findings],
        "notes": [*result.notes],
    }
