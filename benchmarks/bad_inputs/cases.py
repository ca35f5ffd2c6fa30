"""A bad input of the command line, what came of it, and what must hold of that."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

#: Most lines of an error, and most characters of one of them.
LINES, WIDTH = 6, 2_000
#: Seconds of CPU, and megabytes of memory, that one bad input may take.
SECONDS, MEGABYTES = 20.0, 600
#: Exit codes of errors: a gate's 3 is none of a bad input.
ERRORS = (1, 2)


@dataclass(frozen=True)
class Case:
    """One command with a bad input.

    Args:
        kind: What is bad, for the table of results.
        arguments: Of `rlhf`; `<policy>` is replaced by the digest of one in the sound store.
        refused: True if it must not exit with 0; None if either is right.
        says: What the error has to name: the field, the value or the cure.
    """

    kind: str
    arguments: tuple[str, ...]
    refused: bool | None = None
    says: tuple[str, ...] = ()
    environment: Mapping[str, str | None] = field(default_factory=dict[str, str | None])
    shell: str = ""
    """Shell text behind the command: redirections and pipes."""
    before: str = ""
    """Shell text before the command."""

    @property
    def shown(self) -> str:
        """The command, shortened."""
        words = " ".join(
            repr(word) if not word.isprintable() or not word or " " in word else word
            for word in self.arguments
        )
        about = f"{words}{' ' if self.shell else ''}{self.shell}"
        about = f"{self.before}; {about}" if self.before else about
        variables = " ".join(f"{k}={v}" for k, v in self.environment.items())
        about = f"{variables} {about}".strip()
        return about if len(about) <= 150 else f"{about[:150]}…"


@dataclass(frozen=True)
class Outcome:
    """Result of a command: how it ended, and its traces in memory and files.

    Args:
        code: Its exit code; None if it did not end in time.
        output: What it wrote to its standard output.
        errors: What it wrote to its standard error.
        seconds: CPU time that it took.
        megabytes: By how much it raised the process's peak of memory.
        changed: Files that it made, changed or removed.
    """

    code: int | None
    output: str = ""
    errors: str = ""
    seconds: float = 0.0
    megabytes: float = 0.0
    changed: tuple[str, ...] = ()


def problems(case: Case, outcome: Outcome) -> list[str]:
    """Return what is wrong with the end of a command that was given a bad input."""
    if outcome.code is None:
        return ["does not end"]
    failed, said = outcome.code != 0, outcome.output + outcome.errors
    errors = [line for line in outcome.errors.splitlines() if line.strip()]
    heads = sum(line.startswith("error: ") for line in errors)
    has_streams = not case.shell  # else what it says may not arrive
    checks = {
        "traceback": "Traceback (most recent call last)" in said or "Exception ignored" in said,
        "an unexpected exception": "fault of the program" in said,
        f"exit code {outcome.code}": outcome.code not in (0, *ERRORS),
        "exit code 0": bool(case.refused) and not failed,
        "says nothing": failed and has_streams and not said.strip(),
        f"{heads} lines with error:": failed and has_streams and not outcome.output and heads != 1,
        f"{len(errors)} lines": failed and len(errors) > LINES,
        "a very long line": any(len(line) > WIDTH for line in errors),
        "control characters": not "".join(errors).replace("\t", "").isprintable(),
        f"{outcome.seconds:.0f} s of CPU": outcome.seconds > SECONDS,
        f"{outcome.megabytes:,.0f} MB of memory": outcome.megabytes > MEGABYTES,
        f"leaves {', '.join(outcome.changed[:3])}": failed and bool(outcome.changed),
        f"does not name {case.says}": failed and not all(t in outcome.errors for t in case.says),
    }
    return [name for name, is_so in checks.items() if is_so]
