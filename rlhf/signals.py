"""Deferred SIGTERM and Ctrl-C: a training process saves before it ends, and says so at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

#: Words for the signals that are held back.
NAMES = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}


def to_stderr(line: str) -> None:
    """Write a line to standard error; not by print, in whose midst a handler may run."""
    os.write(2, f"{line}\n".encode())


#: Shows a line from within a signal handler; a live display of the terminal sets its own.
notify: Callable[[str], None] = to_stderr


@contextmanager
def deferred_sigterm() -> Iterator[Callable[[], bool]]:
    """Hold back SIGTERM and the first Ctrl-C; yields a function that says if one came.

    The second Ctrl-C goes to the previous handler at once. On exit the first signal is raised again
    for its previous handler: Prefect's, or the default, which ends the process. Outside of the main
    thread, which alone receives signals, nothing is held. An ignored Ctrl-C stays ignored.
    """
    received: list[int] = []

    def record(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])
            signal.raise_signal(signal.SIGINT)
            return
        if not received:
            again = "; Ctrl-C again ends it without" if number == signal.SIGINT else ""
            notify(f"{NAMES[signal.Signals(number)]}: saving after this update{again}")
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, record)}
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, record)
    try:
        yield lambda: bool(received)
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
