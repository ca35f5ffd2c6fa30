"""Connections of `tests/store/wire.py`, with a thread for each direction.

Heads of HTTP/1.1 are parsed to find where bodies begin and end; bodies pass by splice, unread.
"""

from __future__ import annotations

import contextlib
import fcntl
import math
import os
import select
import socket
import struct
import termios
import threading
import time
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.store.wire import Fault, Wire

CHUNK = 1 << 20
LONGEST_HEAD = 1 << 16


@dataclass(eq=False)
class Request:
    """A request and its body bytes so far: "up" its own, "down" the answer's."""

    method: str = ""
    path: str = ""
    body: dict[str, int] = field(default_factory=lambda: {"up": 0, "down": 0})
    answered: bool = False


class Throttle:
    """Bytes per second of one direction, for all connections together; 0: no limit."""

    def __init__(self, rate: float) -> None:
        self.rate = rate
        self._due = 0.0
        self._lock = threading.Lock()

    def pay(self, count: int, waited: bool) -> None:
        """Sleep until the bytes may pass; oversleeping is made up for, idle time is not."""
        if self.rate:
            with self._lock:
                now = time.monotonic()
                self._due = max(self._due, now if waited else now - 0.1) + count / self.rate
                seconds = self._due - now
            time.sleep(max(0, seconds))


class Ended(Exception):
    """Raised when the link has ended, for both directions."""


class Link:
    """A client's connection and its connection to the server."""

    def __init__(self, wire: Wire, client: socket.socket, server: socket.socket) -> None:
        self.sockets = (client, server)
        self.unanswered: deque[Request] = deque()
        self.ended = False
        self.wake = os.eventfd(0)
        self._wire, self._running, self._lock = wire, 2, threading.Lock()
        for each in self.sockets:
            each.setblocking(False)
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    def end(self, how: str = "") -> None:
        """Stop both flows; the sockets are closed when both have left."""
        with self._lock:
            if self.ended or not self._running:
                return
            self.ended = True
            for each in self.sockets:
                with contextlib.suppress(OSError):
                    if how == "reset":
                        each.setsockopt(
                            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
                        )
                    if how == "cut":
                        each.shutdown(socket.SHUT_WR)
            os.eventfd_write(self.wake, 1)

    def drain(self) -> None:
        """Read until the client closes: close() with unread bytes would send an RST."""
        self.sockets[0].settimeout(0.05)
        while not self._wire.closing:
            with contextlib.suppress(TimeoutError):
                if not self.sockets[0].recv(CHUNK):
                    return

    def leave(self) -> None:
        """Count a flow that has ended; the last one closes the sockets."""
        with self._lock:
            self._running -= 1
            if not self._running:
                for each in self.sockets:
                    each.close()
                os.close(self.wake)
                self._wire.links.discard(self)


class Flow(threading.Thread):
    """One direction of a link."""

    def __init__(self, wire: Wire, link: Link, direction: str) -> None:
        super().__init__(daemon=True)
        self.wire, self.link, self.direction = wire, link, direction
        self.throttle = wire.throttle[direction]
        self.source, self.target = link.sockets if direction == "up" else link.sockets[::-1]
        self.request = Request()
        self.ahead = bytearray()  # read in search of the end of a head, not yet sent
        self.sent = 0
        self.began = {"stream": 0}  # the value of `sent` where each began
        self.struck_at: dict[Fault, int] = {}
        self.waited = True  # for data, or for the target to take them
        self.pipe = os.pipe()
        with contextlib.suppress(PermissionError):  # many connections, and not root
            fcntl.fcntl(self.pipe[1], fcntl.F_SETPIPE_SZ, CHUNK)

    def run(self) -> None:
        try:
            while self._message():
                self.began = {"stream": 0}
            self._carry(math.inf)  # bytes that are no message of HTTP
            self.target.shutdown(socket.SHUT_WR)
        except Ended:
            pass
        except (OSError, ValueError):  # a head that a flip has made unreadable
            self.link.end("reset")
        finally:
            for end in self.pipe:
                os.close(end)
            self.link.leave()

    def _message(self) -> bool:
        if not (length := self._until(b"\r\n\r\n")):
            return False
        first, *lines = self.ahead[:length].decode("latin-1").split("\r\n")
        headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in lines)}
        words = [*first.split(" "), "", ""]
        self.began["message"] = self.sent
        if self.direction == "up":
            size = float(headers.get("content-length", 0))
            self.request = Request(words[0], words[1])
            self.wire.seen.append(self.request)
            self.link.unanswered.append(self.request)
        else:
            size = self._answer(int(words[1]), headers)
        if not self._carry(length):
            return False
        if self.direction == "up" and "expect" in headers and not self.ahead:
            self._wait(self.source, select.POLLIN)
            if self.request.answered:
                return True  # a final answer, so the client keeps the body and goes on
        if "message" in self.began:
            self.began["body"] = self.sent
        return self._chunks() if "transfer-encoding" in headers else self._carry(size)

    def _answer(self, status: int, headers: dict[str, str]) -> float:
        """Read the head of an answer; returns the size of its body."""
        self.request, final = (self.link.unanswered or [Request()])[0], status >= 200
        if not final:
            del self.began["message"]  # no test aims at "100 Continue"
        elif self.link.unanswered:
            self.link.unanswered.popleft().answered = True
        if not final or self.request.method == "HEAD" or status in (204, 304):
            headers.pop("transfer-encoding", None)
            return 0
        return float(headers.get("content-length", math.inf))

    def _chunks(self) -> bool:
        while length := self._until(b"\r\n"):
            size = int(self.ahead[:length].split(b";")[0], 16)
            if not size:
                return self._carry(self._until(b"\r\n\r\n"))
            if not self._carry(length + size + 2):
                break
        return False

    def _until(self, mark: bytes) -> int:
        """Read ahead to the end of the mark; returns the length, 0 without the mark."""
        while (found := self.ahead.find(mark)) < 0:
            if len(self.ahead) > LONGEST_HEAD or not self._read():
                return 0
        return found + len(mark)

    def _carry(self, left: float) -> bool:
        """Carry so many bytes, with faults; returns False at the end of the stream."""
        while not self.link.ended:
            limit = left
            for fault in self.wire.faults:
                if (distance := self._distance(fault)) > 0:
                    limit = min(limit, distance)
                elif distance == 0 and (fault.kind != "flip" or left):
                    if fault.kind == "flip" and not self.ahead and not self._read():
                        return False
                    self._strike(fault)
                    break  # a stall takes time: look at all faults again
            else:
                if not left:
                    return True
                if not (count := self._move(limit)):
                    return False
                left -= max(0, count)
        raise Ended

    def _distance(self, fault: Fault) -> int:
        """Return the bytes until a fault strikes; negative: not in this message."""
        began = self.began.get(fault.where)
        chosen = fault.method in ("", self.request.method) and fault.path in self.request.path
        here = fault.direction == self.direction and fault.kind != "hang up"
        spent = fault.struck >= fault.times or self.struck_at.get(fault) == self.sent
        if began is None or not chosen or not here or spent:
            return -1
        return began + fault.at - self.sent

    def _strike(self, fault: Fault) -> None:
        self.struck_at[fault] = self.sent
        if not fault.claim():
            return
        if fault.kind == "flip":
            self.ahead[0] ^= 1 << fault.bit
        elif fault.kind == "stall":
            end = time.monotonic() + fault.seconds
            while not (fault.released or self.link.ended) and time.monotonic() < end:
                time.sleep(0.005)
        else:
            self._flush()
            self.link.end(fault.kind)
            if fault.kind == "cut":
                self.link.drain()
            raise Ended

    def _flush(self) -> None:
        """Wait until the receiver's kernel has the sent bytes; an RST discards them."""
        end = time.monotonic() + 1
        while time.monotonic() < end:
            queued = fcntl.ioctl(self.target, termios.TIOCOUTQ, bytes(4))
            if not any(queued):
                return
            time.sleep(0.001)

    def _read(self) -> bool:
        """Read some bytes into `ahead`; returns False at the end of the stream."""
        self._wait(self.source, select.POLLIN)
        data = self.source.recv(LONGEST_HEAD)
        self.ahead += data
        return bool(data)

    def _move(self, limit: float) -> int:
        """Move up to so many bytes; returns 0 at the end, -1 after waiting for some."""
        share = int(self.throttle.rate / 50) or 1 if self.throttle.rate else CHUNK
        limit, read = int(min(limit, share, CHUNK)), bool(self.ahead)
        try:
            count = min(limit, len(self.ahead)) or os.splice(
                self.source.fileno(), self.pipe[1], limit
            )
        except BlockingIOError:
            self._wait(self.source, select.POLLIN)
            return -1
        self.throttle.pay(count, self.waited)
        self.waited = False
        self.sent += count
        if "body" in self.began:  # counted before the client can see it
            self.request.body[self.direction] += count
        left = count
        while left:
            try:
                if read:
                    sent = self.target.send(self.ahead[:left])
                    del self.ahead[:sent]
                else:
                    sent = os.splice(self.pipe[0], self.target.fileno(), left)
            except BlockingIOError:
                self._wait(self.target, select.POLLOUT)
            else:
                left -= sent
        return count

    def _wait(self, end: socket.socket, event: int) -> None:
        """Wait for the socket, or for the end of the link."""
        poll = select.poll()
        poll.register(end, event)
        poll.register(self.link.wake, select.POLLIN)
        if not poll.poll(0):
            self.waited = True
            poll.poll()
        if self.link.ended:
            raise Ended
