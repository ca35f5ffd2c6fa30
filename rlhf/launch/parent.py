"""Parent of a launch: starts the children, forwards messages, returns the result.

No child outlives the call of `launch`, or of `take_part` on another machine. The result, or the
error that a child reported, is read from the files in the launch's folder.
"""

from __future__ import annotations

import ipaddress
import json
import logging
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

import psutil

from rlhf.errors import Interrupted, RLHFError, WorkerDied
from rlhf.launch.job import (
    AGENT_LOG,
    FAILURES,
    JOB,
    MESSAGES,
    RESULT,
    Job,
    agent_log,
    alive,
    ended_file,
    output_file,
    pids,
    rebuilt_error,
    send,
    tail_of,
)
from rlhf.launch.nodes import WAIT, Alone, Nodes, Place, join, meet, report_of
from rlhf.meter import Meter
from rlhf.signals import deferred_sigterm
from rlhf.stage import Progress, StageResult, silent

#: Seconds between two polls of the children.
_POLL = 0.05
#: Seconds until a signal is sent again: one that arrives while a child starts is lost.
_RESEND = 1.0
#: Seconds in which the other children may report why they end, after one of them died.
_GRACE = 5.0


def launch(job: Job, progress: Progress = silent, nodes: Nodes | None = None) -> StageResult:
    """Run a job in `job.section.processes` child processes on each of its machines.

    With checkpoints, SIGTERM is held back until they have saved; the same job then resumes.

    Args:
        job: The job; this is the first of its `section.nodes` machines.
        progress: Told of every step.
        nodes: How to find the other machines; None leaves it to torchrun's environment variables.

    Raises:
        WorkerDied: A child ended without a report, as by a signal, or another machine did not come
            or was lost; the others were ended.
        RLHFError: An error that a child reported; other errors keep their own class.
    """
    # Outermost: on leaving it the signal is delivered, which may end this process.
    hold = deferred_sigterm() if job.checkpoints else nullcontext(lambda: False)
    with (
        hold as terminated,
        _folder() as folder,
        meet(job, nodes, terminated) as others,
    ):  # fmt: skip
        level = logging.getLogger("rlhf").getEffectiveLevel()
        sent = job.model_copy(update={"log_level": level})
        status = _run(folder, sent, _Listener(folder, progress), terminated, others)
        others.collect(folder, failed=status != 0)
        count = job.section.processes or 1
        _note_peaks(folder, count * job.section.nodes)
        return read_result(
            folder, job.stage, count * job.section.nodes, status, count, lost=others.lost
        )


def take_part(
    leader: tuple[str, int], node: int, prepare: Callable[[str, Mapping[str, Any], Path], Job],
    *, versions: Mapping[str, str] | None = None, wait: float = WAIT,
) -> None:  # fmt: skip
    """Run this machine's part of another one's launch; return when it has ended well.

    Args:
        leader: Host and port of the first machine, which may start later.
        node: Number of this machine, from 1.
        prepare: Makes this machine's job from the first one's, as JSON, and `Nodes.context`; the
            folder is there until the end.
        versions: Versions of code and libraries here.
        wait: Seconds in which the first machine must answer.

    Raises:
        WorkerDied: The first machine did not answer, or was lost.
        RLHFError: What the launch failed of.
    """
    with deferred_sigterm() as terminated, _folder() as folder:
        member = join(*leader, node, versions or {}, wait, terminated)
        try:
            sent = member.learn("job", terminated)
            try:
                job = prepare(sent["job"], sent["context"], folder)
            except BaseException as error:
                member.fail(error)
                raise
            member.start(terminated)
            status = _run(folder, job, _Listener(folder, silent), terminated, member)
            count = job.section.processes or 1
            ranks = range(node * count, (node + 1) * count)
            member.conclude(report_of(folder, ranks, status), terminated)
        finally:
            member.close()


@contextmanager
def _folder() -> Iterator[Path]:
    with tempfile.TemporaryDirectory(prefix="rlhf-launch-", ignore_cleanup_errors=True) as name:
        yield Path(name)


def _run(
    folder: Path, job: Job, listener: _Listener, terminated: Callable[[], bool], others: Alone
) -> int:
    """Run this machine's children, and return the launcher's exit status."""
    count = job.section.processes or 1
    threads = max(1, job.runtime.threads // count)
    runtime = job.runtime.model_copy(update={"threads": threads})
    (folder / JOB).write_text(job.model_copy(update={"runtime": runtime}).model_dump_json())
    with _agent(folder, count, threads, others.place) as agent:
        _wait(agent, listener, terminated, others)
    return agent.returncode


def read_result(
    folder: Path, stage: str, count: int, status: int, per_node: int | None = None,
    *, lost: str | None = None,
) -> StageResult:  # fmt: skip
    """Return the result of a launch that has ended.

    An `RLHFError` is taken for the cause of all other errors. Next come a machine that was lost,
    and a child that died without a report: it broke the connections of the others.

    Args:
        folder: Folder of the launch.
        stage: Name of the stage, for messages.
        count: Children on all machines.
        status: Exit status of this machine's launcher.
        per_node: Children on each machine; None is all.
        lost: Why the launch ended, if a machine was lost.

    Raises:
        WorkerDied: A machine was lost, or a child ended without a report.
        RLHFError: An error that a child reported; other errors keep their own class.
    """
    reports = _reports(folder, count)
    raised = [error for error in reports.values() if error is not None]
    failures = [error for error in raised if not isinstance(error, Interrupted)]
    for error in failures:
        if isinstance(error, RLHFError):
            raise error
    if lost:
        raise WorkerDied(lost)
    unreported = [rank for rank in range(count) if rank not in reports]
    if unreported:
        raise _worker_died(folder, stage, count, unreported, status, per_node or count)
    if raised:
        raise (failures or raised)[0]
    result: dict[str, Any] = json.loads((folder / RESULT).read_text())
    return StageResult(result)


@contextmanager
def _agent(
    folder: Path, count: int, threads: int, place: Place | None
) -> Iterator[subprocess.Popen[bytes]]:
    """Start the launcher's process, and end it with the block.

    It also ends when this end of its stdin is closed, as by this process's death.
    """
    source = str(Path(__file__).parents[2])
    environment = {
        # torchrun would take its options from these, which are for this process.
        **{name: value for name, value in os.environ.items() if not name.startswith("PET_")},
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(threads),
        # Temporary files of a killed child are removed with the folder.
        "TMPDIR": str(folder),
    }
    interface = _interface(place)
    if interface is not None:
        for library in ("GLOO", "NCCL"):
            environment.setdefault(f"{library}_SOCKET_IFNAME", interface)
    where = [] if place is None else [json.dumps(asdict(place))]
    with (folder / AGENT_LOG).open("wb") as output:
        agent = subprocess.Popen(
            [sys.executable, "-m", "rlhf.launch.agent", str(folder), str(count), *where],
            stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment,
            start_new_session=True,  # Ctrl-C reaches this process alone
        )  # fmt: skip
    try:
        yield agent
    finally:
        _end(agent, folder)


def _interface(place: Place | None) -> str | None:
    """Return the network interface that children talk by; None leaves it to their libraries.

    These would ask for the address of the machine's name, which is often another one's, or none.
    """
    if place is None or ipaddress.ip_address(place.own).is_loopback:
        return "lo" if sys.platform == "linux" else None
    for name, addresses in psutil.net_if_addrs().items():
        if any(entry.address == place.own for entry in addresses):
            return name
    return None


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
    agent: subprocess.Popen[bytes], listener: _Listener, terminated: Callable[[], bool],
    others: Alone,
) -> None:  # fmt: skip
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
        if died is None and (
            others.is_broken() or any(not alive(pid) for pid in pids(folder).values())
        ):
            died = now
        if died is not None and now - died > _GRACE:
            # A collective with the dead child may never return, and a launcher may wait for others.
            send(folder, signal.SIGKILL)
            if others.is_broken() and (not pids(folder) or now - died > 2 * _GRACE):
                return
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
            error = rebuilt_error(report["kind"], report["message"]) if "kind" in report else None
            reports.append((report["time"], rank, error))
    return {rank: error for _, rank, error in sorted(reports, key=lambda entry: entry[:2])}


def _note_peaks(folder: Path, count: int) -> None:
    """Give the meter of this process the children's peaks of their devices' memory."""
    for rank in range(count):
        file = ended_file(folder, rank)
        if Meter.current is not None and file.exists():
            Meter.current.note(json.loads(file.read_text()).get("peaks", {}))


def _worker_died(
    folder: Path, stage: str, count: int, unreported: list[int], status: int, per_node: int
) -> WorkerDied:
    """Return the error for the child that died first, as the launcher saw it."""
    file = folder / FAILURES
    codes: dict[str, int] = json.loads(file.read_text()) if file.exists() else {}
    # The launcher sends SIGTERM to the children that outlive the first.
    first = min(unreported, key=lambda rank: codes.get(str(rank), 0) in (0, -signal.SIGTERM))
    code = codes.get(str(first))
    node = first // per_node
    if code is None:
        process, code, output = "the launcher of its processes", status, agent_log(folder, node)
    else:
        process, output = f"process {first + 1} of {count}", output_file(folder, first)
    if count > per_node:
        process += f" on node {node + 1} of {count // per_node}"
    ending = f"ended with status {code}"
    if code < 0:
        ending = f"was ended by {signal.Signals(-code).name}"
        if -code == signal.SIGKILL:
            ending += " (as when memory runs out)"
    tail = tail_of(output)
    last = f"It printed last:\n{tail}" if tail else "It printed nothing"
    return WorkerDied(f"{stage}: {process} {ending}; the others were ended. {last}")
