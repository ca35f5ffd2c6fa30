"""An S3 server that discards content: `python -m benchmarks.storage.sink`.

For artifacts larger than memory. Objects over 1 MiB are stored as their length and first 4 KiB; the
rest is served as zeros, as in the benchmark's sparse files. It checks no signatures and implements
only the requests of uploads, downloads and listings. Its first line of output is its address; it
ends at the end of its standard input.
"""

from __future__ import annotations

import hashlib
import re
import sys
import threading
import uuid
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit
from xml.sax.saxutils import escape

WHOLE, HEAD, BLOCK = 1 << 20, 4 << 10, 1 << 20
DATE = "2026-01-01T00:00:00.000Z"
HTTP_DATE = "Thu, 01 Jan 2026 00:00:00 GMT"


@dataclass
class Stored:
    """The stored rest of an object or part: length and first bytes, zeros after them."""

    size: int
    head: bytes
    meta: dict[str, str] = field(default_factory=dict)

    @property
    def etag(self) -> str:
        """Return a hash of the length and the stored bytes."""
        return f'"{hashlib.sha256(b"%d " % self.size + self.head).hexdigest()[:32]}"'


OBJECTS: dict[str, Stored] = {}
UPLOADS: dict[str, dict[int, Stored]] = {}
LOCK = threading.Lock()


def main() -> None:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    print(f"http://127.0.0.1:{server.server_address[1]}", flush=True)
    sys.stdin.read()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = BLOCK

    def handle_expect_100(self) -> bool:
        """Answer `100 Continue`, which clients await before they send a body."""
        self.send_response_only(100)
        self.end_headers()
        self.wfile.flush()
        return True

    def do_PUT(self) -> None:
        key, query = self._target()
        stored = self._take()
        if "uploadId" in query:
            UPLOADS[query["uploadId"]][int(query["partNumber"])] = stored
            return self._answer(200, {"ETag": stored.etag})
        with LOCK:
            if self.headers.get("If-None-Match") == "*" and key in OBJECTS:
                return self._refuse(412, "PreconditionFailed")
            OBJECTS[key] = stored
        return self._answer(200, {"ETag": stored.etag})

    def do_POST(self) -> None:
        key, query = self._target()
        stored = self._take()
        if "uploads" in query:
            upload = uuid.uuid4().hex
            UPLOADS[upload] = {0: stored}
            return self._xml("InitiateMultipartUploadResult", f"<UploadId>{upload}</UploadId>")
        if "uploadId" not in query:
            return self._refuse(501, "NotImplemented")
        parts = UPLOADS.pop(query["uploadId"])
        meta = parts.pop(0).meta
        first = parts[min(parts)]
        whole = OBJECTS[key] = Stored(sum(p.size for p in parts.values()), first.head, meta)
        return self._xml("CompleteMultipartUploadResult", f"<ETag>{escape(whole.etag)}</ETag>")

    def do_DELETE(self) -> None:
        key, query = self._target()
        if "uploadId" in query:
            UPLOADS.pop(query["uploadId"], None)
        else:
            OBJECTS.pop(key, None)
        self._answer(204, {})

    def do_HEAD(self) -> None:
        self._give(body=False)

    def do_GET(self) -> None:
        key, query = self._target()
        if "/" in key and "uploadId" not in query:
            return self._give(body=True)
        if "uploads" in query:
            return self._xml("ListMultipartUploadsResult", "<IsTruncated>false</IsTruncated>")
        if "uploadId" in query:
            return self._refuse(404, "NoSuchUpload")
        prefix = f"{key}/{query.get('prefix', '')}"
        items = "".join(
            f"<Contents><Key>{escape(name.partition('/')[2])}</Key><Size>{stored.size}</Size>"
            f"<ETag>{escape(stored.etag)}</ETag><LastModified>{DATE}</LastModified></Contents>"
            for name, stored in sorted(OBJECTS.items())
            if name.startswith(prefix)
        )
        return self._xml("ListBucketResult", f"<IsTruncated>false</IsTruncated>{items}")

    def _target(self) -> tuple[str, dict[str, str]]:
        parts = urlsplit(self.path)
        query = parse_qs(parts.query, keep_blank_values=True)
        return unquote(parts.path).strip("/"), {name: v[0] for name, v in query.items()}

    def _take(self) -> Stored:
        """Read the body and discard all but its head."""
        size = int(self.headers.get("Content-Length", 0))
        meta = {n: v for n, v in self.headers.items() if n.lower().startswith("x-amz-meta-")}
        head = self.rfile.read(size if size <= WHOLE else HEAD)
        left, buffer = size - len(head), memoryview(bytearray(BLOCK))
        while left > 0:
            count = self.rfile.readinto(buffer[: min(left, BLOCK)])
            if not count:
                raise ConnectionError("the body ended early")
            left -= count
        return Stored(size, head, meta)

    def _give(self, body: bool) -> None:
        stored = OBJECTS.get(self._target()[0])
        if stored is None:
            return self._refuse(404, "NoSuchKey")
        first, last = 0, stored.size - 1
        byte_range = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        headers = {"ETag": stored.etag, "Last-Modified": HTTP_DATE, **stored.meta}
        if byte_range:
            first, last = int(byte_range[1]), min(last, int(byte_range[2] or last))
            headers["Content-Range"] = f"bytes {first}-{last}/{stored.size}"
        self._answer(206 if byte_range else 200, headers, last + 1 - first)
        if not body:
            return None
        self.wfile.write(stored.head[first : last + 1])
        left, zeros = last + 1 - max(first, len(stored.head)), memoryview(bytes(BLOCK))
        while left > 0:
            self.wfile.write(zeros[: min(left, BLOCK)])
            left -= BLOCK
        return self.wfile.flush()

    def _xml(self, name: str, inside: str, status: int = 200) -> None:
        body = f'<?xml version="1.0" encoding="UTF-8"?><{name}>{inside}</{name}>'.encode()
        self._answer(status, {"Content-Type": "application/xml"}, len(body))
        self.wfile.write(body)
        self.wfile.flush()

    def _refuse(self, status: int, code: str) -> None:
        if self.command == "HEAD":
            return self._answer(status, {})
        return self._xml("Error", f"<Code>{code}</Code>", status)

    def _answer(self, status: int, headers: dict[str, str], length: int = 0) -> None:
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(length)}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.flush()

    def log_message(self, format: str, *args: object) -> None:
        del format, args


if __name__ == "__main__":
    main()
