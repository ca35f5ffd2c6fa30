"""Connection between the first machine of a launch and another one.

Each message is a JSON object in a line. Each end says every second that it lives, in a thread of
its own, because a training's parent may be busy for minutes. A machine that is silent for longer
than the limit, or closes the connection, is lost: TCP alone notices no machine that lost its power.
"""

from __future__ import annotations

import json
import queue
import socket
import threading
import time
from contextlib import suppress
from typing import Any

from rlhf.limits import load_json

#: Seconds between two signs of life.
BEAT = 1.0
#: Seconds without a sign of life after which the other machine is lost.
SILENCE = 60.0
#: Most bytes of one message: reports of errors, and a configuration with its prompts and rules.
_MOST = 2**26
#: Most bytes of all messages of a machine that has not said yet that it is one of the launch.
_MOST_OF_STRANGER = 2**16


class Channel:
    """One connection. `lost` says why it is of no more use; None while it is.

    Args:
        connection: The connected socket.
        silence: Seconds without a sign of life after which the other end is lost.
        is_stranger: Whether the other end has yet to say who it is; it may send little till then.
    """

    def __init__(
        self, connection: socket.socket, silence: float = SILENCE, is_stranger: bool = False
    ) -> None:
        self._socket, self.silence, self.is_stranger = connection, silence, is_stranger
        self.own: str = connection.getsockname()[0]
        """Address of this machine, as the other one reaches it."""
        self.peer: str = connection.getpeername()[0]
        """Address of the other machine."""
        self.lost: str | None = None
        self._inbox: queue.SimpleQueue[dict[str, Any]] = queue.SimpleQueue()
        self._lock, self._closed = threading.Lock(), threading.Event()
        connection.settimeout(silence)
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()
        threading.Thread(target=self._beat, daemon=True).start()

    def send(self, **message: Any) -> None:
        """Send a message; if that fails, the other machine is lost."""
        line = json.dumps(message).encode() + b"\n"
        try:
            with self._lock:
                self._socket.sendall(line)
        except OSError as error:
            self._lose(f"it can't be reached ({error})")

    def receive(self, seconds: float) -> dict[str, Any] | None:
        """Return the next message, or None if none comes in that time."""
        with suppress(queue.Empty):
            return self._inbox.get(timeout=seconds)
        return None

    def close(self, linger: float = 5.0) -> None:
        """Close the connection, when the other end has read all or that many seconds have passed.

        At once, a sign of life that crosses the closing would take the last messages with it.
        """
        self._closed.set()
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_WR)
            self._reader.join(linger)
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)  # wakes the reader
        self._socket.close()

    def _lose(self, reason: str) -> None:
        if self.lost is None and not self._closed.is_set():
            self.lost = reason
        self._closed.set()

    def _beat(self) -> None:
        while not self._closed.wait(BEAT):
            self.send()

    def _read(self) -> None:
        rest, received = b"", 0
        heard = time.monotonic()
        while self.lost is None:
            try:
                new = self._socket.recv(2**16)
            except TimeoutError:
                return self._lose(f"no sign of life for {time.monotonic() - heard:.0f} s")
            except OSError as error:
                return self._lose(f"it can't be reached ({error})")
            if not new:
                return self._lose("it closed the connection")
            heard = time.monotonic()
            received += len(new)
            if self.is_stranger and received > _MOST_OF_STRANGER:
                return self._lose("it sends much before it says which machine it is")
            *lines, rest = (rest + new).split(b"\n")
            try:
                messages = [load_json(line) for line in lines]
            except ValueError:
                messages = [None]
            if len(rest) > _MOST or not all(isinstance(message, dict) for message in messages):
                return self._lose("what it sends is no message of a launch")
            for message in filter(None, messages):
                self._inbox.put(message)
        return None
