"""The result or error of a launch, from the files that its children left."""

from __future__ import annotations

import builtins
import json
import signal
from pathlib import Path
from typing import Any

from rlhf import errors
from rlhf.errors import Interrupted, RLHFError, WorkerDied
from rlhf.launch.job import AGENT_LOG, FAILURES, RESULT, ended_file, output_file
from rlhf.stage import StageResult

#: Lines and characters of a dead child's output that its error shows.
_LINES, _CHARACTERS = 8, 1500


def read_result(folder: Path, stage: str, count: int, status: int) -> StageResult:
    """Return the result of a launch that has ended.

    An `RLHFError` is taken for the cause of all other errors. Next comes a child that died without
    a report: it broke the connections of the others.

    Raises:
        WorkerDied: A child ended without a report.
        RLHFError: An error that a child reported. Other errors come as what they were in Python.
    """
    reports = _reports(folder, count)
    raised = [error for error in reports.values() if error is not None]
    failures = [error for error in raised if not isinstance(error, Interrupted)]
    for error in failures:
        if isinstance(error, RLHFError):
            raise error
    unreported = [rank for rank in range(count) if rank not in reports]
    if unreported:
        raise _worker_died(folder, stage, count, unreported, status)
    if raised:
        raise (failures or raised)[0]
    result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return StageResult(result)


def _reports(folder: Path, count: int) -> dict[int, Exception | None]:
    """Return each child's error by rank, earliest report first; None for success."""
    reports: list[tuple[float, int, Exception | None]] = []
    for rank in range(count):
        file = ended_file(folder, rank)
        if file.exists():
            report = json.loads(file.read_text())
            error = _error(report["kind"], report["message"]) if "kind" in report else None
            reports.append((report["time"], rank, error))
    return {rank: error for _, rank, error in sorted(reports, key=lambda entry: entry[:2])}


def _error(name: str, message: str) -> Exception:
    """Return an error of that class, or a RuntimeError that names it."""
    for module in (errors, builtins):
        cls = getattr(module, name, None)
        if isinstance(cls, type) and issubclass(cls, Exception):
            try:
                return cls(message)
            except TypeError:  # such as UnicodeDecodeError, which takes more arguments
                break
    return RuntimeError(f"{name}: {message}")


def _worker_died(
    folder: Path, stage: str, count: int, unreported: list[int], status: int
) -> WorkerDied:
    """Return the error for the child that died first, as the launcher saw it."""
    file = folder / FAILURES
    codes: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
    # The launcher ends those by SIGTERM that outlive the first.
    first = min(unreported, key=lambda rank: codes.get(str(rank), 0) in (0, -signal.SIGTERM))
    code = codes.get(str(first))
    if code is None:
        process, code, output = "the launcher of its processes", status, folder / AGENT_LOG
    else:
        process, output = f"process {first + 1} of {count}", output_file(folder, first)
    ending = f"ended with status {code}"
    if code < 0:
        ending = f"was ended by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            ending += " (as when memory runs out)"
    return WorkerDied(f"{stage}: {process} {ending}; the others were ended. {_tail(output)}")


def _tail(file: Path) -> str:
    text = file.read_text(errors="replace") if file.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()][-_LINES:]
    if not lines:
        return "It printed nothing"
    return "It printed last:\n" + "\n".join(lines)[-_CHARACTERS:]
