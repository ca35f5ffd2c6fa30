"""Deferred SIGTERM: a training process saves before it ends."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_sigterm() -> Iterator[Callable[[], bool]]:
    """Hold back SIGTERM; yields a function that returns whether it arrived.

    On exit the signal is raised again for the previous handler: Prefect's, or the default, which
    ends the process. Outside of the main thread, which alone receives signals, nothing is held.
    """
    received: list[int] = []

    def record(number: int, _: FrameType | None) -> None:
        received.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    previous = signal.signal(signal.SIGTERM, record)
    try:
        yield lambda: bool(received)
    finally:
        signal.signal(signal.SIGTERM, previous)
        if received:
            signal.raise_signal(signal.SIGTERM)
