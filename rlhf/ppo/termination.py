"""SIGTERM while training: first save, then go."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def deferred_sigterm() -> Iterator[Callable[[], bool]]:
    """Hold SIGTERM back; yields a function that says whether it came.

    On leaving, whoever listened before gets the signal after all: Prefect, or the default that ends
    the process. Outside of the main thread, where signals do not arrive, it never comes.
    """
    came: list[int] = []

    def remember(number: int, _: FrameType | None) -> None:
        came.append(number)

    if threading.current_thread() is not threading.main_thread():
        yield lambda: False
        return
    before = signal.signal(signal.SIGTERM, remember)
    try:
        yield lambda: bool(came)
    finally:
        signal.signal(signal.SIGTERM, before)
        if came:
            signal.raise_signal(signal.SIGTERM)
