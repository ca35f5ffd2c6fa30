"""Kill the processes that an interrupted test session leaves running.

Every process that a session starts inherits the environment variable `VARIABLE`, which names the
session; so do processes after `setsid` and the children of servers. A small separate process waits
for the end of pytest (also by Ctrl-C, SIGTERM or SIGKILL), and then kills all processes with that
name.
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
import sys
import time
import uuid
from pathlib import Path

VARIABLE = "PYTEST_SESSION_NAMES"


def start() -> None:
    """Name this session and have its processes killed when this process has ended."""
    name = uuid.uuid4().hex
    # A session that a test starts belongs to the outer session too.
    os.environ[VARIABLE] = f"{os.environ.get(VARIABLE, '')}:{name}"
    if sys.platform != "linux":
        return
    environment = {key: value for key, value in os.environ.items() if key != VARIABLE}
    command = [sys.executable, "-I", "-S", __file__, str(os.getpid()), name]
    # A session of its own: neither Ctrl-C nor SIGHUP reaches it. `wait` is not called, for it
    # outlives this process; init or the session's parent collects it.
    with Path(os.devnull).open("r+b") as null:
        reaper = subprocess.Popen(
            command, env=environment, stdin=null, stdout=null, stderr=null, cwd="/",
            start_new_session=True,
        )  # fmt: skip
    reaper.returncode = 0  # no ResourceWarning about a process that is meant to live on


def processes_of(name: str) -> list[int]:
    """Return the living processes that the session of this name has started."""
    pids = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            if name.encode() in (folder / "environ").read_bytes():
                pids.append(int(folder.name))
        except OSError:  # ended meanwhile, or of another user
            continue
    return pids


def main(pid: int, name: str) -> None:
    """Wait for the end of process `pid`, then kill all of the session's processes."""
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        select.select([os.pidfd_open(pid)], [], [])
    while pids := processes_of(name):
        for each in pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(each, signal.SIGKILL)
        time.sleep(0.05)


if __name__ == "__main__":
    main(int(sys.argv[1]), sys.argv[2])
