"""Deferred SIGTERM and Ctrl-C: a training process saves before it ends, and says so at once."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from types import FrameType

#: Words for the signals that are held back.
NAMES = {signal.SIGTERM: "terminated", signal.SIGINT: "interrupted"}
#: Seconds until the save from which they are told.
TOLD = 10.0


def to_stderr(line: str) -> None:
    """Write a line to standard error; not by print, in whose midst a handler may run."""
    os.write(2, f"{line}\n".encode())


#: Shows a line from within a signal handler; a live display of the terminal sets its own.
notify: Callable[[str], None] = to_stderr


@contextmanager
def deferred_sigterm(
    clock: Callable[[], float] = time.monotonic,
) -> Iterator[Callable[[], bool]]:
    """Hold back SIGTERM and the first Ctrl-C; yields a function that says if one came.

    It is asked after each update, up to three times in a row: from the time between two updates
    follows when the save is due, which is told. The second Ctrl-C goes to the previous handler at
    once. On exit the first signal is raised again for its previous handler: Prefect's, or the
    default, which ends the process. Outside of the main thread, which alone receives signals,
    nothing is held. An ignored Ctrl-C stays ignored.
    """
    received: list[int] = []
    asked = deque([clock()], maxlen=4)

    def came() -> bool:
        asked.append(clock())
        return bool(received)

    def due() -> str:
        now, times = clock(), list(asked)  # a copy: the handler may run in the midst of an append
        update = max((after - before for before, after in pairwise(times)), default=0.0)
        left = update - (now - times[-1])
        if left < TOLD:
            return ""
        return f", in about {left:.0f} s" if left < 90 else f", in about {left / 60:.0f} min"

    def record(number: int, _: FrameType | None) -> None:
        if number == signal.SIGINT and received:
            signal.signal(signal.SIGINT, previous[signal.SIGINT])
            signal.raise_signal(signal.SIGINT)
            return
        name = NAMES[signal.Signals(number)]
        again = "; Ctrl-C again ends it without" if number == signal.SIGINT else ""
        if received:
            name, again = f"{name} again", "; kill -9 ends it without, and keeps the save before"
        notify(f"{name}: saving after this update{due()}{again}")
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = {signal.SIGTERM: signal.signal(signal.SIGTERM, record)}
    if signal.getsignal(signal.SIGINT) not in (signal.SIG_IGN, None):
        previous[signal.SIGINT] = signal.signal(signal.SIGINT, record)
    try:
        yield came
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
        if received:
            signal.raise_signal(received[0])
