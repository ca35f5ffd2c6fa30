"""An HTTP proxy in front of the real server, with faults that a test chooses.

SigV4 signatures stay valid: the signed host header is the proxy's, and is forwarded unchanged.
"""

from __future__ import annotations

import contextlib
import http.client
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlsplit


@dataclass
class Faults:
    """The faults of a proxy; none by default."""

    endpoint: str
    refuse: Callable[
        [str, str, dict[str, str]], int | tuple[int, str] | tuple[int, str, str] | None
    ] = lambda *_: None
    """Answer with this status, S3's code and its message, without forwarding."""
    headers: Callable[[str, str], dict[str, str]] = lambda *_: {}
    """Headers to add to an answer."""
    lose_answer: Callable[[str, str], bool] = lambda *_: False
    """Forward the request, then close the connection without an answer."""
    mangle: Callable[[str, str, bytes], bytes] = lambda _method, _path, body: body
    """Change the body of an answer; a shorter one is a cut connection."""
    without: str = ""
    """Leave this header of requests out."""
    continues: bool = True
    """Answer "100 Continue" to clients that wait for it."""
    seen: list[tuple[str, str]] = field(default_factory=list)
    """Method and path of every request."""


@contextlib.contextmanager
def fault_proxy(upstream: str) -> Iterator[Faults]:
    """Serve on a free port until the block ends."""
    host = urlsplit(upstream).netloc

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_expect_100(self) -> bool:
            return super().handle_expect_100() if faults.continues else True

        def handle_any(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            faults.seen.append((self.command, self.path))
            refusal = faults.refuse(self.command, self.path, dict(self.headers))
            if refusal is not None:
                status, *said = refusal if isinstance(refusal, tuple) else (refusal,)
                code, text = (*map(str, said), "", "")[:2]
                error = f"<Error><Code>{code}</Code><Message>{text}</Message></Error>".encode()
                error = error if code else b""
                if self.command == "HEAD":
                    error = b""
                return self.answer(status, [("Content-Length", str(len(error)))], error)
            connection = http.client.HTTPConnection(host, timeout=30)
            headers = {
                k: v
                for k, v in self.headers.items()
                if k.lower() not in ("expect", faults.without.lower())
            }
            connection.request(self.command, self.path, body, headers)
            response = connection.getresponse()
            data = response.read()
            connection.close()
            if faults.lose_answer(self.command, self.path):
                self.close_connection = True
                return None
            kept = [h for h in response.getheaders() if h[0].lower() not in SKIPPED]
            kept += faults.headers(self.command, self.path).items()
            length = response.getheader("Content-Length") or str(len(data))
            succeeded = response.status < 300
            sent = faults.mangle(self.command, self.path, data) if succeeded else data
            return self.answer(response.status, [*kept, ("Content-Length", length)], sent)

        def answer(self, status: int, headers: list[tuple[str, str]], body: bytes) -> None:
            self.send_response(status)
            for name, value in headers or [("Content-Length", "0")]:
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)
            length = dict(headers).get("Content-Length", "0")
            if self.command != "HEAD" and len(body) < int(length):
                self.close_connection = True

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with serving(ThreadingHTTPServer(("127.0.0.1", 0), Handler)) as endpoint:
        faults = Faults(endpoint)
        yield faults


SKIPPED = {"content-length", "transfer-encoding", "connection", "keep-alive"}


@contextlib.contextmanager
def serving(server: ThreadingHTTPServer) -> Iterator[str]:
    """Serve in a thread until the block ends; yields the address."""
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
