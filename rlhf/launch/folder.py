"""The files by which the parent, the launcher and the processes of one launch talk."""

from __future__ import annotations

import os
from contextlib import suppress
from pathlib import Path

JOB = "job.json"
RESULT = "result.json"
MESSAGES = "messages.jsonl"
FAILURES = "failures.json"
AGENT_LOG = "agent.log"
#: Environment variable with the launcher's process id.
AGENT_PID = "RLHF_AGENT_PID"


def pid_file(folder: Path, rank: int) -> Path:
    """Holds a process's id, from its start on."""
    return folder / f"{rank}.pid"


def ended_file(folder: Path, rank: int) -> Path:
    """How a process ended, in its own words."""
    return folder / f"{rank}.ended.json"


def output_file(folder: Path, rank: int) -> Path:
    """What a process printed."""
    return folder / f"{rank}.output"


def pids(folder: Path) -> dict[int, int]:
    """The processes, by rank, that have not said that they ended."""
    found: dict[int, int] = {}
    for file in folder.glob("*.pid"):
        rank = int(file.stem)
        with suppress(ValueError):  # being written
            if not ended_file(folder, rank).exists():
                found[rank] = int(file.read_text())
    return found


def send(folder: Path, number: int) -> None:
    """Send all processes a signal."""
    for pid in pids(folder).values():
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def alive(pid: int) -> bool:
    """Whether there is such a process; one that waits to be reaped counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
