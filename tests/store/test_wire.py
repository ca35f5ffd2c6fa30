"""Faults of the wire proxy: each has only its intended effect."""

from __future__ import annotations

import math
import os
import socket
import subprocess
import sys
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from http.client import IncompleteRead, RemoteDisconnected
from pathlib import Path

import pytest

from tests.store.objects import DATA, Client, Objects, flipped, received, soon
from tests.store.wire import wire


@pytest.fixture(scope="module")
def objects():
    with Objects() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def server(objects):
    objects.objects = {"/data": DATA}
    objects.broken.clear()
    return objects


@pytest.fixture
def line(server):
    with wire(server.endpoint) as line:
        yield line


@pytest.fixture
def client(line):
    with Client(line.endpoint) as client:
        yield client


def test_nothing_changes_without_a_fault(server, line):
    def work(number: int) -> None:
        data = os.urandom(8 << 20)
        with Client(line.endpoint) as client:
            for path in (f"/a/{number}", f"/b/{number}"):
                assert client.ask("PUT", path, data) == b""
                assert server.objects[path] == data
                assert client.ask("GET", path) == data

    before = server.connections
    line.arm("flip", path="/c/", times=math.inf)
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))
    assert server.connections - before == 4
    assert line.body_bytes("up") == line.body_bytes("down") == 64 << 20
    assert line.body_bytes("up", "PUT", "/a/") == 32 << 20
    assert line.body_bytes("up", "GET") == line.body_bytes("down", "PUT") == 0


def test_all_kinds_of_bodies(server, line, client):
    """A wrong end of one body would shift the next on the same connection."""
    assert client.ask("GET", "/data?chunked") == DATA
    assert client.ask("HEAD", "/data") == b""
    assert client.ask("GET", "/absent") == b""
    client.raw(b"PUT /e HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
    assert client.sock.recv(999) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert client.raw(b"abc").recv(999).startswith(b"HTTP/1.1 204")
    assert client.ask("GET", "/e") == b"abc"
    client.raw(b"PUT /unwanted HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 9\r\n\r\n")
    assert client.sock.recv(999).startswith(b"HTTP/1.1 417")
    assert client.ask("GET", "/data") == DATA
    assert client.ask("GET", "/data?close") == DATA
    chunked = len(DATA) + len(b"a;x=y\r\n\r\nffff6;x=y\r\n\r\n0\r\nA-Trailer: 1\r\n\r\n")
    assert [(r.path, *r.body.values()) for r in line.seen] == [
        ("/data?chunked", 0, chunked),
        ("/data", 0, 0),
        ("/absent", 0, 0),
        ("/e", 3, 0),
        ("/e", 0, 3),
        ("/unwanted", 0, 0),
        ("/data", 0, len(DATA)),
        ("/data?close", 0, len(DATA)),
    ]


def test_what_is_not_http_passes_too():
    with (
        socket.create_server(("127.0.0.1", 0)) as listener,
        wire(f"http://127.0.0.1:{listener.getsockname()[1]}") as line,
        Client(line.endpoint) as client,
        listener.accept()[0] as server,
    ):
        client.raw(DATA).shutdown(socket.SHUT_WR)
        assert received(server) == (DATA, "FIN")
        server.sendall(b"no end of a head")
        server.shutdown(socket.SHUT_WR)
        assert received(client.sock) == (b"no end of a head", "FIN")


@pytest.mark.parametrize("byte", [0, 70_000, len(DATA) - 1])
def test_flip_in_a_body(server, line, client, byte):
    up = line.arm("flip", "up", byte, method="PUT", path="/blobs/", bit=7)
    down = line.arm("flip", "down", byte, method="GET", path="/blobs/", times=2)
    for path in ("/other", "/blobs/short", "/blobs/x", "/blobs/y"):
        client.ask("PUT", path, DATA[:byte] if "short" in path else DATA)
    assert server.objects["/blobs/x"] == flipped(DATA, byte, 7)
    assert server.objects["/other"] == server.objects["/blobs/y"] == DATA
    assert client.ask("GET", "/other") == DATA
    assert [client.ask("GET", "/blobs/y") for _ in range(3)] == [flipped(DATA, byte)] * 2 + [DATA]
    assert (up.struck, down.struck) == (1, 2)


def test_flip_in_a_head(server, line, client):
    """In "PUT /a", byte 5 is the a; its bit 1 makes it a c."""
    server.objects["/a"] = b"a"
    line.arm("flip", "up", 5, where="message", method="PUT", path="/a", bit=1)
    assert client.ask("GET", "/a") == b"a"
    client.ask("PUT", "/b", DATA)
    client.ask("PUT", "/a", DATA)
    assert (server.objects["/c"], server.objects["/a"]) == (DATA, b"a")


def test_flip_anywhere_in_the_stream(server, line, client):
    first = b"PUT /1 HTTP/1.1\r\nContent-Length: 2\r\n\r\nab"
    second = b"PUT /2 HTTP/1.1\r\nContent-Length: 3\r\n\r\nabc"
    flip = line.arm("flip", "up", len(first + second) - 1, where="stream", times=math.inf)
    for request in (first, second, first):
        assert client.raw(request).recv(999).startswith(b"HTTP/1.1 204")
    assert (server.objects["/1"], server.objects["/2"], flip.struck) == (b"ab", b"abb", 1)
    with Client(line.endpoint) as another:
        another.raw(first, second)
        assert soon(lambda: flip.struck == 2)


@pytest.mark.parametrize(("kind", "end"), [("cut", "FIN"), ("reset", "RST")])
@pytest.mark.parametrize("at", [0, 1, 300_000, len(DATA)])
def test_broken_download(line, client, kind, end, at):
    """The client has received all bytes before the fault."""
    fault = line.arm(kind, "down", at, path="/data")
    client.request("GET", "/data")
    got, how = received(client.sock)
    assert (got.partition(b"\r\n\r\n")[2], how) == (DATA[:at], end)
    assert fault.struck == 1
    with Client(line.endpoint) as again:
        assert again.ask("GET", "/data") == DATA


@pytest.mark.parametrize(("kind", "end"), [("cut", "FIN"), ("reset", "RST")])
@pytest.mark.parametrize("at", [1, 300_000])
def test_broken_upload(server, line, client, kind, end, at):
    """The server has received all bytes before the fault."""
    line.arm(kind, "up", at, path="/x")
    with pytest.raises(RemoteDisconnected if kind == "cut" else ConnectionError) as caught:
        client.ask("PUT", "/x", DATA * 16)
    assert isinstance(caught.value, RemoteDisconnected) == (kind == "cut")
    assert soon(lambda: server.broken == [(at, end)])
    assert line.body_bytes("up") == at


def test_lost_answer(server, line, client):
    """The whole request arrives, and only "100 Continue" comes back."""
    line.arm("reset", "down", where="message", method="PUT")
    client.raw(b"PUT /x HTTP/1.1\r\nExpect: 100-continue\r\nContent-Length: 3\r\n\r\n")
    assert client.sock.recv(999) == b"HTTP/1.1 100 Continue\r\n\r\n"
    assert received(client.raw(b"abc")) == (b"", "RST")
    assert server.objects["/x"] == b"abc"


@pytest.mark.parametrize("direction", ["up", "down"])
def test_stall_for_a_time(line, client, direction):
    line.arm("stall", direction, 300_000, seconds=0.5)
    with Client(line.endpoint) as other:
        began = time.monotonic()
        client.request(*(("PUT", "/x", DATA) if direction == "up" else ("GET", "/data")))
        time.sleep(0.1)
        assert other.ask("GET", "/data") == DATA
        assert time.monotonic() - began < 0.4
        client.getresponse().read()
        assert 0.5 <= time.monotonic() - began < 2


def test_stall_until_released_and_a_new_fault_meanwhile(line, client):
    stall = line.arm("stall", "down", 300_000)
    client.request("GET", "/data")
    answer = client.getresponse()
    assert soon(lambda: stall.struck)
    line.arm("cut", "down", 400_000)
    assert line.body_bytes("down") == 300_000
    stall.released = True
    with pytest.raises(IncompleteRead, match="400000 bytes read"):
        answer.read()


def test_bursts_end_and_faults_that_hold_are_cleared(line):
    def fails() -> bool:
        try:
            with Client(line.endpoint) as client:
                return client.ask("GET", "/data") != DATA
        except OSError:
            return True

    burst = line.arm("reset", "down", 5, times=3)
    assert [fails() for _ in range(5)] == [True] * 3 + [False] * 2
    line.arm("reset", "down", 5, times=math.inf)
    assert [fails() for _ in range(5)] == [True] * 5
    assert burst.struck == 3
    stall = line.arm("stall", path="/x", times=math.inf)
    with Client(line.endpoint) as client:
        client.request("PUT", "/x", DATA)
        assert soon(lambda: stall.struck)
        line.clear()
        assert client.getresponse().read() == b""
    assert not fails()


def test_refuse_keeps_the_port(line, client):
    for _ in range(2):
        assert client.ask("GET", "/data") == DATA  # so it is accepted
        line.refuse()
        with pytest.raises(ConnectionRefusedError):
            Client(line.endpoint)
        assert client.ask("GET", "/data") == DATA
        line.listen()
        with Client(line.endpoint) as another:
            assert another.ask("GET", "/data") == DATA


def test_drop(line, client):
    client.ask("GET", "/data")
    line.drop()
    with pytest.raises(ConnectionError):
        client.ask("GET", "/data")
    assert soon(lambda: not line.links)


def test_hang_up(line, client):
    client.ask("GET", "/data")  # so it is accepted
    faults = [line.arm("hang up", times=2) for _ in range(2)]
    assert client.ask("GET", "/data") == DATA
    for _ in range(4):
        with Client(line.endpoint) as another:
            assert another.sock.recv(1) == b""
    with Client(line.endpoint) as another:
        assert another.ask("GET", "/data") == DATA
    assert [fault.struck for fault in faults] == [2, 2]


def test_throttle_is_shared_by_connections_but_not_by_directions(server):
    """2 MiB each way by two connections; 4 MiB/s: 0.5 s."""
    with wire(server.endpoint, 4 << 20) as line:

        def work(method: str) -> None:
            with Client(line.endpoint) as client:
                client.ask(method, "/data", DATA if method == "PUT" else None)

        began = time.monotonic()
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, ["PUT", "GET", "PUT", "GET"]))
        assert 0.49 < time.monotonic() - began < 0.9
        line.throttle["down"].rate = 0
        began = time.monotonic()
        work("GET")
        assert time.monotonic() - began < 0.2


def test_throttle_lets_nothing_pass_in_advance(server):
    """Bodies of 64 KiB after pauses, at 1 MiB/s."""
    with wire(server.endpoint, 1 << 20) as line, Client(line.endpoint) as client:
        server.objects["/small"] = DATA[: 1 << 16]
        for _ in range(3):
            time.sleep(0.1)
            began = time.monotonic()
            client.ask("GET", "/small")
            assert time.monotonic() - began > 0.06


def test_process_of_its_own(server):
    command = [sys.executable, "-m", "tests.store.wire", server.endpoint, "--mib-per-second", "8"]
    root = Path(__file__).parents[2]
    with subprocess.Popen(command, cwd=root, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout
        try:
            with Client(process.stdout.readline().strip()) as client:
                began = time.monotonic()
                assert client.ask("GET", "/data") == DATA
                assert time.monotonic() - began > 0.12
        finally:
            process.terminate()
        assert process.wait(5) == 0
