"""What a launch came to, from what its processes left in the folder."""

from __future__ import annotations

import builtins
import json
import signal
from pathlib import Path
from typing import Any

from rlhf import errors
from rlhf.errors import Interrupted, RLHFError, WorkerDied
from rlhf.launch import folder as names
from rlhf.stage import StageResult

#: Lines and characters of a dead process's output that its error shows.
_LINES, _CHARACTERS = 8, 1500


def outcome(folder: Path, stage: str, count: int, status: int) -> StageResult:
    """The result of a launch that has ended.

    An error of ours is the cause of all others. A process that died without a word is the cause
    of what the others say, whose connections broke.

    Raises:
        WorkerDied: A process ended without a word.
        RLHFError: What a process raised; of other errors, those that Python knows by itself.
    """
    said = _said(folder, count)
    raised = [error for error in said.values() if error is not None]
    ours = [e for e in raised if isinstance(e, RLHFError) and not isinstance(e, Interrupted)]
    if ours:
        raise ours[0]
    silent = [rank for rank in range(count) if rank not in said]
    if silent:
        raise _died(folder, stage, count, silent, status)
    strange = [e for e in raised if not isinstance(e, Interrupted)]
    if strange or raised:
        raise (strange or raised)[0]
    result: dict[str, Any] = json.loads((folder / names.RESULT).read_text())
    return StageResult(result)


def _said(folder: Path, count: int) -> dict[int, Exception | None]:
    """How each process ended, in its own words, the earliest first; None is well."""
    found: dict[int, tuple[float, Exception | None]] = {}
    for rank in range(count):
        file = names.ended_file(folder, rank)
        if file.exists():
            words = json.loads(file.read_text())
            error = _error(words["kind"], words["message"]) if "kind" in words else None
            found[rank] = (words["time"], error)
    return {rank: found[rank][1] for rank in sorted(found, key=lambda rank: found[rank][0])}


def _error(kind: str, message: str) -> Exception:
    for place in (errors, builtins):
        known = getattr(place, kind, None)
        if isinstance(known, type) and issubclass(known, Exception):
            try:
                return known(message)
            except TypeError:  # such as UnicodeDecodeError, which is made of more
                break
    return RuntimeError(f"{kind}: {message}")


def _died(folder: Path, stage: str, count: int, silent: list[int], status: int) -> WorkerDied:
    """The error for the process that died first, as the launcher saw it."""
    file = folder / names.FAILURES
    codes: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
    # The launcher asks by SIGTERM those to end that outlive the first.
    first = min(silent, key=lambda rank: codes.get(str(rank), 0) in (0, -signal.SIGTERM))
    code = codes.get(str(first))
    if code is None:
        who, code, output = "the launcher of its processes", status, folder / names.AGENT_LOG
    else:
        who, output = f"process {first + 1} of {count}", names.output_file(folder, first)
    how = f"ended with status {code}"
    if code < 0:
        how = f"was ended by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            how += " (as when memory runs out)"
    return WorkerDied(f"{stage}: {who} {how}; the others were ended. {_tail(output)}")


def _tail(file: Path) -> str:
    text = file.read_text(errors="replace") if file.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()][-_LINES:]
    if not lines:
        return "It printed nothing"
    return "It printed last:\n" + "\n".join(lines)[-_CHARACTERS:]
