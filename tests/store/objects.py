"""A small object server and its client, for the tests of the wire."""

from __future__ import annotations

import os
import socket
import time
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

DATA = os.urandom(1 << 20)


class Objects(ThreadingHTTPServer):
    """A server that keeps PUT bodies; `broken` lists partial ones and how they ended."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.objects: dict[str, bytes] = {"/data": DATA}
        self.broken: list[tuple[int, str]] = []
        self.connections = 0

    def process_request(self, request, client_address):
        self.connections += 1
        super().process_request(request, client_address)

    def handle_error(self, request, client_address):
        """Ignore errors: the faults are intended."""


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Objects  # pyright: ignore[reportIncompatibleVariableOverride]

    def do_PUT(self):
        body, size, end = bytearray(), int(self.headers["Content-Length"]), "FIN"
        try:
            while len(body) < size and (data := self.rfile.read1(size - len(body))):
                body += data
        except ConnectionResetError:
            end = "RST"
        if len(body) < size:
            self.close_connection = True
            return self.server.broken.append((len(body), end))
        self.server.objects[self.path] = bytes(body)
        return self.answer(204)

    def do_GET(self):
        data = self.server.objects.get(self.path.partition("?")[0], b"")
        if "chunked" in self.path:
            self.answer(200, **{"Transfer-Encoding": "chunked"})
            for part in (data[:10], data[10:]):
                self.wfile.write(b"%x;x=y\r\n%s\r\n" % (len(part), part))
            self.wfile.write(b"0\r\nA-Trailer: 1\r\n\r\n")
        elif "close" in self.path:
            self.answer(200, Connection="close")
            self.wfile.write(data)
        else:
            self.answer(200 if data else 404, **{"Content-Length": str(len(data))})
            self.wfile.write(data)

    def do_HEAD(self):
        self.answer(200, **{"Content-Length": str(len(self.server.objects[self.path]))})

    def handle_expect_100(self):
        if "unwanted" not in self.path:
            return super().handle_expect_100()
        self.answer(417, **{"Content-Length": "0"})
        return False

    def answer(self, status, **headers):
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()

    def log_message(self, format, *args):
        pass


class Client(HTTPConnection):
    """One persistent connection, closed at the end of the test."""

    def __init__(self, endpoint: str):
        super().__init__(endpoint.removeprefix("http://"), timeout=10)
        # Not by itself again: the tests count connections.
        self.auto_open = 0
        self.connect()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def ask(self, method: str, path: str, body: bytes | None = None, **headers) -> bytes:
        self.request(method, path, body, headers)
        return self.getresponse().read()

    def raw(self, *parts: bytes) -> socket.socket:
        for part in parts:
            self.sock.sendall(part)
        return self.sock


def flipped(data: bytes, byte: int, bit: int = 0) -> bytes:
    return data[:byte] + bytes([data[byte] ^ (1 << bit)]) + data[byte + 1 :]


def received(sock: socket.socket) -> tuple[bytes, str]:
    """Receive until the end of the stream; returns the bytes and "FIN" or "RST"."""
    got = bytearray()
    try:
        while data := sock.recv(1 << 16):
            got += data
    except ConnectionResetError:
        return bytes(got), "RST"
    return bytes(got), "FIN"


def soon(condition) -> bool:
    end = time.monotonic() + 5
    while not condition() and time.monotonic() < end:
        time.sleep(0.005)
    return condition()
