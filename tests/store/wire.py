"""A TCP proxy with faults at chosen bytes of chosen requests.

It changes no byte without a fault, so SigV4 signatures stay valid: the signed host header is the
wire's own.
For benchmarks, `python -m tests.store.wire http://127.0.0.1:7480 --mib-per-second 200` prints its
endpoint and serves until SIGTERM.
"""

from __future__ import annotations

import argparse
import contextlib
import math
import signal
import socket
import sys
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any
from urllib.parse import urlsplit

from tests.store.link import Flow, Link, Request, Throttle


@dataclass(eq=False)
class Fault:
    """A fault and its position, made by `Wire.arm`; fields may change at any time."""

    kind: str  # "flip", "cut" (FIN), "reset" (RST), "stall"; "hang up": close what was accepted
    direction: str = "up"  # from client to server; or "down"
    at: int = 0  # bytes that pass before it strikes, from the beginning of:
    where: str = "body"  # or "message" (with its head), or "stream" (the whole connection)
    method: str = ""  # of the request; empty: any
    path: str = ""  # part of the request's path and query
    bit: int = 0  # the one to flip in byte `at`
    seconds: float = math.inf  # how long to stall, unless `released` comes before
    released: bool = False
    times: float = 1  # how often to strike; math.inf: for ever
    struck: int = 0
    _lock: threading.Lock = field(default_factory=threading.Lock, repr=False)

    def __post_init__(self) -> None:
        assert self.kind in ("flip", "cut", "reset", "stall", "hang up")
        assert self.direction in ("up", "down")
        assert self.where in ("body", "message", "stream")

    def claim(self) -> bool:
        """Count a strike, and return whether the fault is still armed."""
        with self._lock:
            armed = self.struck < self.times
            self.struck += armed
            return armed


class Wire:
    """The proxy; its settings and faults may be changed at any time."""

    def __init__(self, upstream: str, rate: float) -> None:
        url = urlsplit(upstream)
        self.throttle = {"up": Throttle(rate), "down": Throttle(rate)}
        self.faults: tuple[Fault, ...] = ()
        self.seen: list[Request] = []
        self.links: set[Link] = set()
        self.closing = False
        self._server = (url.hostname, url.port or 80)
        self._threads: list[threading.Thread] = []
        self._acceptor = threading.Thread(target=self._accept, daemon=True)
        self._listening = threading.Event()
        self._port = _bound(0)  # never listens, but reserves the port while the proxy does not
        self.endpoint = f"http://127.0.0.1:{self._port.getsockname()[1]}"
        self.listen()
        self._acceptor.start()

    def arm(self, kind: str, direction: str = "up", at: int = 0, **choice: Any) -> Fault:
        """Add a fault; by default it strikes once, in the first body that is long enough."""
        fault = Fault(kind, direction, at, **choice)
        self.faults = (*self.faults, fault)
        return fault

    def clear(self) -> None:
        """Remove all faults; stalled connections go on."""
        faults, self.faults = self.faults, ()
        for fault in faults:
            fault.times, fault.released = 0, True

    def refuse(self) -> None:
        """Refuse connections until `listen`; open ones stay, but see `drop`."""
        self._listening.clear()
        with contextlib.suppress(OSError):  # it does not listen
            self._listener.shutdown(socket.SHUT_RDWR)  # close() alone would not wake accept()
        self._listener.close()

    def listen(self) -> None:
        """Undo `refuse`; no-op after the end of the block, as timers may call it."""
        if self.closing:
            return
        self._listener = _bound(self._port.getsockname()[1])
        self._listener.listen(128)
        self._listening.set()

    def drop(self) -> None:
        """Reset all open connections."""
        for link in tuple(self.links):
            link.end("reset")

    def body_bytes(self, direction: str, method: str = "", path: str = "") -> int:
        """Count body bytes of requests with this method and part of a path."""
        chosen = (r for r in tuple(self.seen) if method in ("", r.method) and path in r.path)
        return sum(request.body[direction] for request in chosen)

    def close(self) -> None:
        """Close all connections and end all threads."""
        self.closing = True
        self.refuse()
        self._listening.set()
        self._acceptor.join()
        self._port.close()
        for link in tuple(self.links):
            link.end()
        for thread in self._threads:
            thread.join()

    def _accept(self) -> None:
        while self._listening.wait() and not self.closing:
            try:
                client = self._listener.accept()[0]
            except OSError:  # by `refuse`
                continue
            if any(fault.kind == "hang up" and fault.claim() for fault in self.faults):
                client.close()
                continue
            try:
                server = socket.create_connection(self._server, timeout=10)
            except OSError:
                client.close()
                continue
            link = Link(self, client, server)
            self.links.add(link)
            flows = [Flow(self, link, direction) for direction in ("up", "down")]
            self._threads = [*filter(threading.Thread.is_alive, self._threads), *flows]
            for flow in flows:
                flow.start()


def _bound(port: int) -> socket.socket:
    opened = socket.socket()
    opened.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    opened.bind(("127.0.0.1", port))
    return opened


@contextlib.contextmanager
def wire(upstream: str, bytes_per_second: float = 0) -> Iterator[Wire]:
    """Open a wire to the server at this endpoint; 0: without a limit of speed."""
    opened = Wire(upstream, bytes_per_second)
    try:
        yield opened
    finally:
        opened.close()


def main() -> None:
    """Serve until Ctrl-C or SIGTERM."""
    parser = argparse.ArgumentParser(prog="python -m tests.store.wire")
    parser.add_argument("upstream", help="endpoint of the server, http://HOST:PORT")
    parser.add_argument("--mib-per-second", type=float, default=0, help="in each direction")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with (
        contextlib.suppress(KeyboardInterrupt),
        wire(options.upstream, options.mib_per_second * 2**20) as opened,
    ):
        sys.stdout.write(f"{opened.endpoint}\n")
        sys.stdout.flush()
        signal.pause()


if __name__ == "__main__":
    main()
