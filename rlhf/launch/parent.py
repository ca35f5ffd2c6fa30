"""The parent's side: starts the processes, listens to them, and never leaves one behind."""

from __future__ import annotations

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

from rlhf.launch import folder as names
from rlhf.launch.outcome import outcome
from rlhf.ppo.termination import deferred_sigterm
from rlhf.progress import Progress
from rlhf.stage import StageResult

#: Seconds between two looks at the processes.
_LOOK = 0.05
#: A signal that comes while a process starts is lost, so it is sent again.
_AGAIN = 1.0
#: Seconds that the others have to say why they end, after one of them died.
_GRACE = 5.0


def launch(job: dict[str, Any], count: int, progress: Progress) -> StageResult:
    """Do a job in child processes.

    With checkpoints, SIGTERM is held back until they have saved.

    Raises:
        WorkerDied: One ended without a word, as by a signal.
        RLHFError: What a process raised; of other errors, those that Python knows by itself.
    """
    # Outermost: at its end the signal is passed on, which may end this process.
    hold = deferred_sigterm() if job.get("checkpoints") else nullcontext(lambda: False)
    with hold as terminated, tempfile.TemporaryDirectory(
        prefix="rlhf-launch-", ignore_cleanup_errors=True
    ) as name:  # fmt: skip
        folder = Path(name)
        level = logging.getLogger("rlhf").getEffectiveLevel()
        (folder / names.JOB).write_text(json.dumps({**job, "log_level": level}))
        with _agent(folder, count, job["runtime"]["threads"]) as agent:
            listener = _Listener(folder, progress)
            _wait(agent, listener, count, terminated)
        return outcome(folder, job["stage"], count, agent.returncode)


@contextmanager
def _agent(folder: Path, count: int, threads: int) -> Iterator[subprocess.Popen[bytes]]:
    """The launcher, which ends when our end of its stdin is closed: by us, or by our death."""
    source = str(Path(__file__).parents[2])
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(filter(None, [source, os.environ.get("PYTHONPATH")])),
        "OMP_NUM_THREADS": str(threads),
        # What a killed process leaves behind goes with the folder.
        "TMPDIR": str(folder),
    }
    if sys.platform == "linux":
        for library in ("GLOO", "NCCL"):
            environment.setdefault(f"{library}_SOCKET_IFNAME", "lo")
    with (folder / names.AGENT_LOG).open("wb") as output:
        agent = subprocess.Popen(
            [sys.executable, "-m", "rlhf.launch.agent", str(folder), str(count)],
            stdin=subprocess.PIPE, stdout=output, stderr=output, env=environment,
            start_new_session=True,  # Ctrl-C is for us; we end them
        )  # fmt: skip
    try:
        yield agent
    finally:
        _end(agent, folder)


def _end(agent: subprocess.Popen[bytes], folder: Path) -> None:
    """End what still runs, and wait until it is gone."""
    if agent.poll() is None and names.pids(folder):
        names.send(folder, signal.SIGKILL)
        with suppress(subprocess.TimeoutExpired):
            agent.wait(_GRACE)  # it reaps them
    if agent.poll() is None:
        os.killpg(agent.pid, signal.SIGKILL)
        agent.wait()
        names.send(folder, signal.SIGKILL)
    assert agent.stdin is not None
    agent.stdin.close()


def _wait(
    agent: subprocess.Popen[bytes], listener: _Listener, count: int, terminated: Callable[[], bool]
) -> None:
    """Until all have ended; SIGTERM is passed on meanwhile."""
    folder = listener.folder
    sent = 0.0
    died: float | None = None
    while agent.poll() is None:
        listener.listen()
        now = time.monotonic()
        if terminated() and now - sent > _AGAIN:
            names.send(folder, signal.SIGTERM)
            sent = now
        if died is None and any(not names.alive(pid) for pid in names.pids(folder).values()):
            died = now
        if died is not None and now - died > _GRACE:
            # They wait for the dead one, perhaps for ever.
            names.send(folder, signal.SIGKILL)
        time.sleep(_LOOK)
    listener.listen()


class _Listener:
    """Reads what the leading process says, and passes it on."""

    def __init__(self, folder: Path, progress: Progress) -> None:
        self.folder, self.progress = folder, progress
        self._file = folder / names.MESSAGES
        self._read, self._rest = 0, b""

    def listen(self) -> None:
        """Pass on what is new."""
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
