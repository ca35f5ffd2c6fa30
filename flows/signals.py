"""Ctrl-C and SIGTERM: stop this process's own Prefect server and exit at once.

Prefect would report the run's end first. But the ephemeral server gets the same signal when it is
sent to the process group, and Prefect's client then waits minutes for an answer. Exiting at once is
safe: checkpoints and artifacts appear only when whole. While a model is trained, the library
delays SIGTERM until the running step is saved (`rlhf.signals`).
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from tasks.board import board
from tasks.run_record import INTERRUPTED

#: Seconds that the server has to stop after SIGTERM, before it is killed.
PATIENCE = 3.0
MESSAGES = {signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
_own_server = False


def exit_on_signals() -> None:
    """Make SIGINT and SIGTERM end this process, with the exit codes 130 and 143.

    With a permanent Prefect server (PREFECT_API_URL), Prefect handles Ctrl-C, and SIGTERM during a
    flow: it reports the run's end to the server first.
    """
    global _own_server  # noqa: PLW0603  (signal handlers belong to the whole process)
    _own_server = not os.environ.get("PREFECT_API_URL")
    if _own_server:
        signal.signal(signal.SIGINT, _exit)
    signal.signal(signal.SIGTERM, _exit)


@contextmanager
def exit_on_sigterm() -> Iterator[None]:
    """Restore the SIGTERM handler of `exit_on_signals` in a flow; Prefect replaces it."""
    if not _own_server or threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGTERM, _exit)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, handler)


def _exit(number: int, _: object) -> None:
    signal.signal(signal.SIGTERM, signal.SIG_IGN)  # a second one must not leave the server running
    message = MESSAGES[signal.Signals(number)]
    board.end_by_signal(INTERRUPTED, 128 + number)  # first: its display must not draw over the line
    line = f"\n{message}; the same command goes on after the last finished stage or checkpoint\n"
    show_cursor = "\x1b[?25h" if sys.stderr.isatty() else ""  # a progress bar hides it
    os.write(2, (show_cursor + line).encode())
    _stop_server()
    os._exit(128 + number)


def _stop_server() -> None:
    """Stop the ephemeral server, if this process started one."""
    module = sys.modules.get("prefect.server.api.server")
    server = module.SubprocessASGIServer().server_process if module else None
    if server is None:
        return
    server.terminate()
    try:
        server.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        server.kill()
