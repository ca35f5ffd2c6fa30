"""Ctrl-C and SIGTERM: the command says one line and goes, and takes its Prefect server with it.

Prefect would report the run's end first. But the ephemeral server gets the same signal when it is
sent to the process group, and its client then waits minutes for an answer. Leaving at once is safe:
checkpoints and artifacts appear only when whole. While the policy is trained, the library holds
SIGTERM back until the running update is saved (`rlhf.ppo.termination`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

#: Seconds that the server has to end by itself.
PATIENCE = 3.0
SAID = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}

_own_server = False


def leave_on_signals() -> None:
    """From now on, these signals end this process, with the exit codes 130 and 143.

    With a Prefect server of one's own (PREFECT_API_URL), Ctrl-C stays Prefect's, and so does
    SIGTERM during a flow: the server is told first.
    """
    global _own_server  # noqa: PLW0603  (signals are the whole process's)
    _own_server = not os.environ.get("PREFECT_API_URL")
    if _own_server:
        signal.signal(signal.SIGINT, _leave)
    signal.signal(signal.SIGTERM, _leave)


@contextmanager
def before_prefect() -> Iterator[None]:
    """Inside of a flow, where Prefect listens for SIGTERM: what was chosen above comes first."""
    if not _own_server or threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def _leave(number: int, _: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not leave the server behind
    said = SAID[signal.Signals(number)]
    line = f"\n{said}; the same command goes on after the last finished stage or PPO checkpoint\n"
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
    os.write(2, (show_cursor + line).encode())
    _stop_server()
    os._exit(128 + number)


def _stop_server() -> None:
    """End the ephemeral server, if this process started one."""
    module = sys.modules.get("prefect.server.api.server")
    server = module.SubprocessASGIServer().server_process if module else None
    if server is None:
        return
    server.terminate()
    try:
        server.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        server.kill()
