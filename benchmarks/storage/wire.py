"""TCP proxy that flips, cuts or delays data in the middle of a body."""

from __future__ import annotations

import contextlib
import select
import socket
import struct
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Literal
from urllib.parse import urlsplit

CHUNK = 64 << 10
BODY = 16 << 10
Direction = Literal["up", "down"]
Change = Callable[[bytes], bytes]


@contextlib.contextmanager
def wire(upstream: str, once: Once) -> Iterator[str]:
    """Endpoint of a proxy that runs for the length of the block."""
    proxy = Wire(upstream, once)
    try:
        yield proxy.endpoint
    finally:
        proxy.close()


class Wire:
    """The proxy; one thread per connection, so that a reset reaches both sides."""

    def __init__(self, upstream: str, once: Once) -> None:
        parts = urlsplit(upstream)
        self._upstream = (parts.hostname or "127.0.0.1", parts.port or 80)
        self._once = once
        # One piece at a time over all connections, so that `during` stops the whole transfer.
        self._lock = threading.Lock()
        self._listener = socket.create_server(("127.0.0.1", 0), backlog=128)
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        threading.Thread(target=self._accept, daemon=True).start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, socket.create_connection(self._upstream) as server:
            try:
                self._forward(client, server)
            except Reset:
                for each in (client, server):
                    each.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            except (Cut, OSError):
                return

    def _forward(self, client: socket.socket, server: socket.socket) -> None:
        """Forward until either side ends: S3 clients never half-close."""
        while True:
            for source in select.select([client, server], [], [])[0]:
                up = source is client
                chunk = source.recv(CHUNK)
                if not chunk:
                    return
                with self._lock:
                    chunk = self._once("up" if up else "down", chunk)
                (server if up else client).sendall(chunk)

    def close(self) -> None:
        """Take no more connections.

        shutdown first: a close alone does not wake the accepting thread.
        """
        self._listener.shutdown(socket.SHUT_RDWR)
        self._listener.close()


@dataclass
class Once:
    """Change one piece of a body, after `after` bytes in one direction."""

    direction: Direction
    after: int
    change: Change
    total: int = 0
    done: bool = False

    def __call__(self, direction: Direction, chunk: bytes) -> bytes:
        if direction != self.direction:
            return chunk
        self.total += len(chunk)
        # Only a body fills a large piece; only heads contain HTTP/1.1.
        body = len(chunk) >= BODY and b"HTTP/1.1" not in chunk
        if self.done or self.total < self.after or not body:
            return chunk
        self.done = True
        return self.change(chunk)


def flip(chunk: bytes) -> bytes:
    """Flip one bit in the middle."""
    half = len(chunk) // 2
    return chunk[:half] + bytes([chunk[half] ^ 1]) + chunk[half + 1 :]


def reset(_chunk: bytes) -> bytes:
    """Reset the connection, as a crashed host does."""
    raise Reset


def cut(_chunk: bytes) -> bytes:
    """Close the connection, as after the last byte."""
    raise Cut


def during(work: Callable[[], object]) -> Change:
    """Return a change that runs `work` while the transfer waits."""

    def change(chunk: bytes) -> bytes:
        work()
        return chunk

    return change


class Reset(Exception):
    """Reset the connection on both sides."""


class Cut(Exception):
    """Close the connection on both sides in the middle of a body."""
