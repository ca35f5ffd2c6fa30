"""A slow network: `python -m benchmarks.storage.throttle http://HOST:PORT MIB`.

Forwards TCP to the server at MIB MiB/s in each direction, over all connections together. It
splices, without copies in Python, to cost little CPU time. Its first line of output is its own
address. For every line of standard input it prints the bytes forwarded so far and its CPU seconds,
as JSON; it ends at the end of its input. Linux only.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import IO
from urllib.parse import urlsplit

CHUNK = 1 << 20
BURST = 0.01
"""Seconds of idle line time that may be made up, because `sleep` overshoots."""


@contextlib.contextmanager
def throttled(upstream: str, mib: float) -> Iterator[Throttle]:
    """Throttle in a child process, which ends with the block."""
    command = [sys.executable, "-m", "benchmarks.storage.throttle", upstream, str(mib)]
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as process:
        assert process.stdin
        assert process.stdout
        try:
            yield Throttle(process.stdout.readline().strip(), process.stdin, process.stdout)
        finally:
            process.stdin.close()


@dataclass
class Throttle:
    """A running throttle process."""

    endpoint: str
    _input: IO[str]
    _output: IO[str]

    def counts(self) -> dict[str, float]:
        """Return bytes `up` and `down` so far, and the throttle's own CPU seconds."""
        self._input.write("\n")
        self._input.flush()
        return json.loads(self._output.readline())


def main() -> None:
    upstream = urlsplit(sys.argv[1])
    rate = float(sys.argv[2]) * (1 << 20)
    up, down = Pace(rate), Pace(rate)
    listener = socket.create_server(("127.0.0.1", 0), backlog=128)
    address = (upstream.hostname or "127.0.0.1", upstream.port or 80)
    threading.Thread(target=_serve, args=(listener, address, up, down), daemon=True).start()
    print(f"http://127.0.0.1:{listener.getsockname()[1]}", flush=True)
    for _ in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        counts = {"up": up.bytes, "down": down.bytes, "cpu": used.ru_utime + used.ru_stime}
        print(json.dumps(counts), flush=True)


class Pace:
    """Rate limit of one direction, shared by its connections."""

    def __init__(self, rate: float) -> None:
        self._rate = rate
        self._lock = threading.Lock()
        self._free_at = 0.0
        self.bytes = 0

    def pay(self, count: int) -> None:
        """Sleep for as long as the rate limit requires before `count` more bytes."""
        with self._lock:
            self.bytes += count
            self._free_at = max(self._free_at, time.monotonic() - BURST) + count / self._rate
            wait = self._free_at - time.monotonic()
        if wait > 0:
            time.sleep(wait)


def _serve(listener: socket.socket, upstream: tuple[str, int], up: Pace, down: Pace) -> None:
    while True:
        client, _ = listener.accept()
        try:
            server = socket.create_connection(upstream)
        except OSError:
            client.close()
            continue
        for each in (client, server):
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        threading.Thread(target=_both_ways, args=(client, server, up, down), daemon=True).start()


def _both_ways(client: socket.socket, server: socket.socket, up: Pace, down: Pace) -> None:
    with client, server:
        other = threading.Thread(target=_pump, args=(server, client, down), daemon=True)
        other.start()
        _pump(client, server, up)
        other.join()


def _pump(source: socket.socket, target: socket.socket, pace: Pace) -> None:
    """Copy socket to socket through a pipe, then shut down the target's input."""
    reading, writing = os.pipe()
    fcntl.fcntl(writing, fcntl.F_SETPIPE_SZ, CHUNK)
    try:
        with contextlib.suppress(OSError):
            while count := os.splice(source.fileno(), writing, CHUNK):
                pace.pay(count)
                while count:
                    count -= os.splice(reading, target.fileno(), count)
        with contextlib.suppress(OSError):
            target.shutdown(socket.SHUT_WR)
    finally:
        os.close(reading)
        os.close(writing)


if __name__ == "__main__":
    main()
