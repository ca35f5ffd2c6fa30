"""Environments in which no command can do its work, and servers that are none of Prefect's."""

from __future__ import annotations

import contextlib
import http.server
import socket
import threading
import time
from collections.abc import Iterator, Mapping

from benchmarks.bad_inputs.cases import Case

#: Answers of servers that are no Prefect server: status, type and body.
_ANSWERS: Mapping[str, tuple[int, str, bytes]] = {
    "html": (200, "text/html", b"<html><body>Welcome to nginx!</body></html>"),
    "error": (500, "text/plain", b"Traceback (most recent call last):\n  File x\nBoom"),
    "json": (200, "application/json", b'{"hello": "world"}'),
    "list": (200, "application/json", b"[1, 2, 3]"),
    "null": (200, "application/json", b"null"),
    "refused": (403, "application/json", b'{"detail": "Forbidden"}'),
    "moved": (302, "text/html", b""),
    "binary": (200, "application/octet-stream", bytes(range(256))),
    "deep": (200, "application/json", b"[" * 100_000),
}


@contextlib.contextmanager
def bad_servers() -> Iterator[Mapping[str, str]]:
    """Start servers that answer as Prefect's does not; yield their addresses by name."""
    with contextlib.ExitStack() as stack:
        found: dict[str, str] = {}
        for name, (status, kind, body) in _ANSWERS.items():
            handler = type("Handler", (_Handler,), {"answer": (status, kind, body)})
            server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
            stack.callback(server.server_close)
            stack.callback(server.shutdown)
            threading.Thread(target=server.serve_forever, daemon=True).start()
            found[name] = f"http://127.0.0.1:{server.server_port}/api"
        closing = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=_close_each, args=(closing,), daemon=True).start()
        found["closing"] = f"http://127.0.0.1:{closing.getsockname()[1]}/api"
        free = socket.create_server(("127.0.0.1", 0))
        found["nothing"] = f"http://127.0.0.1:{free.getsockname()[1]}/api"
        free.close()
        yield found


class _Handler(http.server.BaseHTTPRequestHandler):
    answer = (200, "text/plain", b"")

    def do_GET(self) -> None:
        status, kind, body = self.answer
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if status == 302:
            self.send_header("Location", self.path)
        self.end_headers()
        self.wfile.write(body)

    do_POST = do_GET  # noqa: N815  (the base class's names)

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing."""


def _close_each(server: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while True:
            connection, _ = server.accept()
            time.sleep(0.05)
            connection.close()


def cases(servers: Mapping[str, str]) -> Iterator[Case]:
    """Yield a command in each bad environment."""
    show, ls = ("config", "show", "plain.yaml"), ("artifacts", "ls", "--store", "stores/sound")
    for shell in (">&-", "2>&-", ">&- 2>&-", "<&-", ">/dev/full", "2>/dev/full", "| true",
                  "| head -c 10 >/dev/null"):  # fmt: skip
        for words in (show, ls, ("config", "show", "nothing.yaml")):
            yield Case("streams", words, shell=shell)
    for name, value in (
        ("HOME", None), ("HOME", ""), ("HOME", "/dev/null/x"), ("HOME", "/nothing"),
        ("TMPDIR", "/nothing"), ("TMPDIR", "/dev/null"), ("LC_ALL", "C"), ("LC_ALL", "nonsense"),
        ("PYTHONIOENCODING", "ascii"), ("PYTHONUTF8", "0"), ("COLUMNS", "1"), ("COLUMNS", "x"),
        ("COLUMNS", "0"), ("TERM", ""), ("NO_COLOR", "x"), ("TZ", "nonsense"), ("PATH", ""),
        ("RLHF_WORK_DIR", "/dev/null/x"), ("RLHF_CACHE_GB", "x"), ("RLHF_CACHE_GB", "-1"),
        ("RLHF_THREADS", "0"), ("RLHF_THREADS", "1e400"), ("RLHF_DEVICE", "[/x]"), ("USER", None),
        ("RLHF_PERMISSIONS", "/nothing"), ("PREFECT_HOME", "/dev/null/x"),
        ("PREFECT_LOGGING_LEVEL", "nonsense"), ("PREFECT_PROFILE", "nonsense"),
        ("PREFECT_API_REQUEST_TIMEOUT", "x"), ("AWS_ENDPOINT_URL", "nonsense"),
    ):  # fmt: skip
        words = ("runs",) if name.startswith("PREFECT") else ls
        yield Case("variables", words, environment={name: value})
    for url in ("", "x", "http://", "http://[::1", "http://127.0.0.1:99999/api", "ftp://x/api",
                "http://u:secret@127.0.0.1:1/api", "http://\u202e/api", "file:///etc/passwd",
                "http://nothing.invalid/api"):  # fmt: skip
        yield Case("servers", ("runs",), refused=True, environment={"PREFECT_API_URL": url})
    users = (("status", "x"), ("approve", "x"), ("preflight",), ("run", "plain.yaml"))
    for n, url in enumerate(servers.values()):
        for words in (("runs",), users[n % len(users)]):
            yield Case("servers", words, refused=True, environment={"PREFECT_API_URL": url})
    gone = "mkdir gone; cd gone; rmdir ../gone"
    limits = (
        ("ulimit -n 12", ls), ("ulimit -f 0", ("artifacts", "pull", "<policy>", "pulled", "--store",
                                              "stores/sound")),
        ("ulimit -v 300000", ls), ("ulimit -s 256", show), ("cd /proc", ("runs",)),
        ("cd /proc", ("artifacts", "ls")), (gone, ("artifacts", "ls")), (gone, show),
    )  # fmt: skip
    for before, words in limits:
        yield Case("limits", words, before=before)
