"""A Hugging Face hub on loopback, with one dataset or model."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

COMMIT = "c0ffee" * 6 + "c0ff"
DATASET = "acme/pairs"


@contextlib.contextmanager
def fake_hub(
    files: dict[str, bytes],
    commit: str | None = COMMIT,
    delay: float = 0,
    broken: str = "",
    repo: str = f"datasets/{DATASET}",
) -> Iterator[Any]:
    """Serve the files of a repository; the broken one gets 503.

    `server.asked` lists the requests for the repository, without the client's own, which it sends
    once per process: they would make a test depend on its neighbours.
    """
    api = f"/api/{repo}"
    folder = repo.removeprefix("models/")

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.server.over.wait(delay)  # type: ignore[attr-defined]
            path = self.path.partition("?")[0]
            if folder in path:
                self.server.asked.append(path)  # type: ignore[attr-defined]
            name = re.sub(rf"^/{folder}/resolve/({COMMIT}|main|v1)/", "", path)
            if path in (api, f"{api}/revision/{COMMIT}", f"{api}/revision/v1"):
                self.answer(json.dumps({"id": DATASET, "sha": commit}).encode())
            elif path == f"{api}/tree/{COMMIT}":
                tree = [
                    {"type": "file", "path": name, "size": len(data), "oid": "0"}
                    for name, data in files.items()
                ]
                self.answer(json.dumps(tree).encode())
            elif name == broken:
                self.answer(b"", 503)
            elif name in files:
                self.answer(files[name], ETag=f'"{hashlib.sha1(files[name]).hexdigest()}"')
            else:
                self.answer(b"{}", 404, **{"X-Error-Code": "RepoNotFound"})

        do_HEAD = do_GET  # noqa: N815

        def answer(self, body: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"X-Repo-Commit": COMMIT, **headers}.items():
                self.send_header(key, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command == "GET":
                with contextlib.suppress(OSError):
                    self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            """Log nothing."""

    server: Any = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.asked, server.over = [], threading.Event()
    server.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.over.set()
        server.shutdown()
        thread.join()
        server.server_close()
