"""Parent of a launch: starts the children, forwards messages, returns the result.

No child outlives the call of `launch`. The result, or the error that a child reported, is read
from the files in the launch's folder.
"""

from __future__ import annotations

import builtins
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from pathlib import Path
from typing import Any

from rlhf import errors
from rlhf.errors import Interrupted, RLHFError, WorkerDied
from rlhf.launch.job import (
    AGENT_LOG,
    FAILURES,
    JOB,
    MESSAGES,
    RESULT,
    Job,
    alive,
    ended_file,
    output_file,
    pids,
    send,
)
from rlhf.signals import deferred_sigterm
from rlhf.stage import Progress, StageResult, silent

#: Seconds between two polls of the children.
_POLL = 0.05
#: Seconds until a signal is sent again: one that arrives while a child starts is lost.
_RESEND = 1.0
#: Seconds in which the other children may report why they end, after one of them died.
_GRACE = 5.0
#: Lines and characters of a dead child's output that its error shows.
_LINES, _CHARACTERS = 8, 1500


def launch(job: Job, progress: Progress = silent) -> StageResult:
    """Run a job in `job.section.processes` child processes.

    With checkpoints, SIGTERM is held back until they have saved; the same job then resumes.

    Raises:
        WorkerDied: A child ended without a report, as by a signal; the others were ended.
        RLHFError: An error that a child reported; other errors keep their own class.
    """
    count = job.section.processes or 1
    threads = max(1, job.runtime.threads // count)
    level = logging.getLogger("rlhf").getEffectiveLevel()
    runtime = job.runtime.model_copy(update={"threads": threads})
    sent = job.model_copy(update={"runtime": runtime, "log_level": level})
    # Outermost: on leaving it the signal is delivered, which may end this process.
    hold = deferred_sigterm() if job.checkpoints else nullcontext(lambda: False)
    with hold as terminated, tempfile.TemporaryDirectory(
        prefix="rlhf-launch-", ignore_cleanup_errors=True
    ) as name:  # fmt: skip
        folder = Path(name)
        (folder / JOB).write_text(sent.model_dump_json())
        with _agent(folder, count, threads) as agent:
            _wait(agent, _Listener(folder, progress), terminated)
        return read_result(folder, job.stage, count, agent.returncode)


def read_result(folder: Path, stage: str, count: int, status: int) -> StageResult:
    """Return the result of a launch that has ended.

    An `RLHFError` is taken for the cause of all other errors. Next comes a child that died without
    a report: it broke the connections of the others.

    Raises:
        WorkerDied: A child ended without a report.
        RLHFError: An error that a child reported; other errors keep their own class.
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


@contextmanager
def _agent(folder: Path, count: int, threads: int) -> Iterator[subprocess.Popen[bytes]]:
    """Start the launcher's process, and end it with the block.

    It also ends when this end of its stdin is closed, as by this process's death.
    """
    source = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(threads),
        # Temporary files of a killed child are removed with the folder.
        "TMPDIR": str(folder),
    }
    if sys.platform == "linux":
        for library in ("GLOO", "NCCL"):
            environment.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    with (folder / AGENT_LOG).open("wb") as output:
        agent = subprocess.Popen(
            [sys.executable, "-m", "rlhf.launch.agent", str(folder), str(count)],
            stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone
        )  # fmt: skip
    try:
        yield agent
    finally:
        _end(agent, folder)


def _end(agent: subprocess.Popen[bytes], folder: Path) -> None:
    """Kill the processes that still run, and wait until they have ended."""
    if agent.poll() is None and pids(folder):
        send(folder, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            agent.wait(_GRACE)  # it reaps them
    if agent.poll() is None:
        os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
        send(folder, signal.SIGKILL)
    assert agent.stdin is not None
    agent.stdin.close()


def _wait(
    agent: subprocess.Popen[bytes], listener: _Listener, terminated: Callable[[], bool]
) -> None:
    """Wait until all children have ended; forward messages and SIGTERM meanwhile."""
    folder = listener.folder
    sent = 0.0
    died: float | None = None
    while agent.poll() is None:
        listener.listen()
        now = time.monotonic()
        if terminated() and now - sent > _RESEND:
            send(folder, signal.SIGTERM)
            sent = now
        if died is None and any(not alive(pid) for pid in pids(folder).values()):
            died = now
        if died is not None and now - died > _GRACE:
            # A collective with the dead child may never return.
            send(folder, signal.SIGKILL)
        time.sleep(_POLL)
    listener.listen()


class _Listener:
    """Forwards progress and log records, which the leading child writes to a file."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder, self.progress = folder, progress
        self._file = folder / MESSAGES
        self._read, self._rest = 0, b""

    def listen(self) -> None:
        """Forward the messages since the last call."""
        if not self._file.exists():
            return
        with self._file.open("rb") as file:
            file.seek(self._read)
            new = file.read()
        self._read += len(new)
        *lines, self._rest = (self._rest + new).split(b"\n")
        for line in lines:
            message = json.loads(line)
            if "step" in message:
                self.progress(message["step"], message["total"], message["metrics"])
            else:
                logging.getLogger(message["logger"]).log(message["level"], "%s", message["text"])


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
    """Rebuild a child's error by class name; RuntimeError if that is not possible."""
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
    # The launcher sends SIGTERM to the children that outlive the first.
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
