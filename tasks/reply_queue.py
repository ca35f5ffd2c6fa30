"""Replies for several callers at once: one is made at a time, a few more wait."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncGenerator, Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

from rlhf.chat import Reply
from rlhf.errors import RLHFError

T = TypeVar("T")
#: Makes a reply: takes what is called with each part of its text, and what tells to end.
Job = Callable[[Callable[[str], object], Callable[[], bool]], Reply]


class Busy(RLHFError):
    """As many callers wait as may."""

    retriable = True


class TooSlow(RLHFError):
    """A reply took longer than it may, waiting included."""


class ReplyQueue:
    """Makes replies in a thread of its own, one after the other.

    Torch computes one reply with all cores; two at once would take more than twice as long each.

    Args:
        most: Callers that are served or wait at a time.
        seconds: Most that a caller waits for its whole reply.
    """

    def __init__(self, most: int, seconds: float) -> None:
        self.most, self.seconds = most, seconds
        self._callers = 0
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="replies")

    async def parts(self, job: Job) -> AsyncGenerator[str | Reply]:
        """Yield the parts of a reply's text as they are made, and the reply at last.

        The reply is given up at the next token where the caller stops to iterate.

        Raises:
            Busy: Too many wait already.
            TooSlow: The time is over.
            RLHFError: The reply can't be made.
        """
        if self._callers >= self.most:
            raise Busy(f"{self.most} requests are being answered or wait; try again later")
        self._callers += 1
        loop = asyncio.get_running_loop()
        made: asyncio.Queue[str | Reply | BaseException] = asyncio.Queue()
        end, given_up = time.monotonic() + self.seconds, threading.Event()

        def put(item: str | Reply | BaseException) -> None:
            with contextlib.suppress(RuntimeError):  # the server has ended
                loop.call_soon_threadsafe(made.put_nowait, item)

        def work() -> None:
            try:
                if not given_up.is_set():
                    put(job(put, lambda: given_up.is_set() or time.monotonic() > end))
            except BaseException as error:
                put(error)

        try:
            self._thread.submit(work)
            while True:
                try:
                    async with asyncio.timeout(max(0.0, end - time.monotonic())):
                        item = await made.get()
                except TimeoutError:
                    raise self._too_slow() from None
                if isinstance(item, BaseException):
                    raise item
                if isinstance(item, Reply) and item.ending == "cancelled":
                    raise self._too_slow()
                yield item
                if isinstance(item, Reply):
                    return
        finally:
            given_up.set()
            self._callers -= 1

    async def scored(self, work: Callable[[], T]) -> T:
        """Return what a function computes in the thread of the replies."""
        return await asyncio.wrap_future(self._thread.submit(work))

    def close(self) -> None:
        """End the thread after the reply that is being made."""
        self._thread.shutdown(wait=True, cancel_futures=True)

    def _too_slow(self) -> TooSlow:
        return TooSlow(
            f"the reply took more than {self.seconds:g} s; ask for fewer tokens, or start the "
            "server with a larger --max-seconds"
        )
