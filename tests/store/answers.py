"""A server that gives one answer to every request, as other services than S3 do."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from tests.store.proxy import serving

#: Secret key that no message may repeat.
SECRET = "a-secret-that-is-wrong"


@dataclass
class Answer:
    """The answer, and the requests that got it."""

    endpoint: str = ""
    status: int = 200
    body: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)


class _Server(ThreadingHTTPServer):
    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore clients that hang up."""


@contextlib.contextmanager
def answering() -> Iterator[Answer]:
    """Serve on a free port until the block ends."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            self.rfile.read(int(self.headers.get("Content-Length", 0)))
            answer.requests.append(self.command)
            body = b"" if self.command == "HEAD" else answer.body.encode()
            self.send_response(answer.status)
            for name, value in {**answer.headers, "Content-Length": str(len(body))}.items():
                self.send_header(name, value)
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_any  # noqa: N815

        def log_message(self, format: str, *args: object) -> None:
            del format, args

    with serving(_Server(("127.0.0.1", 0), Handler)) as endpoint:
        answer = Answer(endpoint)
        yield answer


def error(code: str, message: str = "", **more: str) -> str:
    """Return S3's XML for an error."""
    rest = "".join(f"<{name}>{value}</{name}>" for name, value in more.items())
    return f"<Error><Code>{code}</Code><Message>{message}</Message>{rest}</Error>"


def is_one_line_with_a_cure(message: str, *parts: str) -> None:
    """Assert that a message is one line with these parts and a cure, without the secret."""
    assert message.isprintable()
    assert len(message) < 500
    assert SECRET not in message
    for part in parts:
        assert part in message
    assert len(message.rpartition("; ")[2]) > 5
