"""The `rlhf init` command: one configuration that fits the user's data, base and machine."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from rlhf.errors import ConfigError, RLHFError
from rlhf.plain_text import one_line
from tasks.console import ask, console, say

if TYPE_CHECKING:
    from tasks.proposal import Proposal

#: Value of --base for a model from scratch, as configurations write it.
SCRATCH = "none"
#: Folder that is proposed to people who name none.
FOLDER = "my-project"

Overrides = Annotated[
    str,
    Parameter(
        allow_leading_hyphen=True,
        help="Columns and places: --data.prompt_column=ask, --store=s3://bucket/prefix.",
    ),
]


def init(
    folder: Path | None = None,
    *overrides: Overrides,
    data: str | None = None,
    base: str | None = None,
) -> None:
    """Write a configuration that fits your data, base model and machine, with its reasons.

    What is missing is asked on a terminal. Nothing is overwritten.

    Parameters
    ----------
    folder
        New folder for the configuration, such as my-project.
    data
        Preference data: a file, a folder, an s3:// URI or a hub dataset id.
    base
        Model to start from: a folder, a hub id, s3://bucket/prefix or artifact:<digest>; none
        trains a small one from scratch.
    """
    may_ask = sys.stdin.isatty() and sys.stdout.isatty()
    if data is None and not may_ask:
        raise ConfigError(
            "--data is missing, and there is no terminal to ask on; give --data <file, folder, "
            "s3:// URI or hub dataset id>"
        )
    if folder is None and not may_ask:
        raise ConfigError(f"the folder is missing; name a new one: rlhf init {FOLDER} --data …")
    # Before the first question: importing torch takes seconds.
    from tasks.proposal import check_target, find_base, find_data, propose, write_project

    try:
        if folder is None:
            folder = Path(_answer("Folder of the project", FOLDER, lambda t: check_target(Path(t))))
        check_target(folder)
        if data is None:
            question = "Preference data (file, folder, s3:// URI or hub dataset id)"
            data = _answer(question, None, find_data)
            if base is None:
                question = "Base model (folder or hub id; none: a small one from scratch)"
                base = _answer(question, SCRATCH, lambda t: t == SCRATCH or find_base(t))
    except EOFError:
        raise ConfigError(
            "no answer; give the folder, --data and --base on the command line"
        ) from None
    start = None if base == SCRATCH else base
    proposal = propose(folder.name, data, start, overrides, lambda line: say(f"{line} …", "dim"))
    path = write_project(folder, proposal)
    _show(proposal, path)


def _answer(question: str, default: str | None, check: Callable[[str], object]) -> str:
    """Ask until an answer can be used.

    Raises:
        EOFError: There is no answer.
    """
    while True:
        answer = ask(question, default)
        try:
            if answer.strip():
                check(answer.strip())
                return answer.strip()
        except RLHFError as error:
            say(one_line(error), "red")


def _show(proposal: Proposal, path: Path) -> None:
    """Print the choices with their reasons, what to know before a run, and the next command."""
    console.print()
    table = Table("choice", "value", "why", box=None, pad_edge=False, header_style="bold")
    for choice in proposal.choices:
        if choice.title:
            table.add_row(*map(one_line, (choice.title, choice.in_words, choice.reason)))
    if proposal.seconds:
        table.add_row("time", _duration(sum(proposal.seconds.values())), _times(proposal.seconds))
    console.print(table)
    for line in proposal.warnings:
        console.print()
        console.print(f"• {one_line(line)}", style="yellow")
    console.print()
    say(f"written: {path}  (data, base and store stand there in full)")
    say("reports, logs and checkpoints go to .rlhf in the folder in which you run it", "dim")
    say(f"next:    rlhf run {shlex.quote(str(path))}", "bold green")


def _times(seconds: Mapping[str, float]) -> str:
    parts = [f"{name.replace('_', ' ')} {_duration(value)}" for name, value in seconds.items()]
    return f"a coarse guess of the trainings ({', '.join(parts)}); the gates take longer"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"
