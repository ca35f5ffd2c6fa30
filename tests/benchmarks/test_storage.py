"""`benchmarks.storage`: its report, networks and servers, and a tiny real case."""

from __future__ import annotations

import socket
import threading
import time

import boto3
import pytest
from boto3.s3.transfer import TransferConfig

from benchmarks.storage.faults import TRIALS, Trial
from benchmarks.storage.methods import MIB, SIDES
from benchmarks.storage.report import Table, against, fastest, in_turn, seconds, verdict
from benchmarks.storage.runs import Run, SideFailed, Site, delivered, random_files
from benchmarks.storage.speed import everyone, moved, sink
from benchmarks.storage.throttle import throttled
from benchmarks.storage.wire import CHUNK, Once, cut, during, flip, reset, wire


def test_a_value_beside_its_bar():
    assert against(0.9, 0.9) == "**0.90** (≥ 0.9 ✓)"
    assert against(0.899, 0.9) == "**0.90** (≥ 0.9 **missed**)"
    assert against(301, 300, most=True, digits=0) == "**301** (≤ 300 **missed**)"


def test_medians_decide_who_is_fastest():
    runs = {
        "a": [Run(s, 0, 0, "") for s in (1.0, 9.0, 9.0)],
        "b": [Run(s, 0, 0, "") for s in (8.0, 8.0, 8.0)],
    }
    assert fastest(runs) == "b"
    assert seconds(runs["a"]) == 9.0
    assert [in_turn("ab", n) for n in range(3)] == [["a", "b"], ["b", "a"], ["a", "b"]]


def test_verdicts():
    assert verdict(None, "right") == "survives"
    assert verdict(None, "wrong") == verdict(None, "nothing") == "**silently wrong**"
    assert verdict("an error", "nothing") == verdict("an error", "right") == "fails cleanly"
    assert verdict("an error", "wrong") == "fails, **wrong files left**"


def test_tables_are_markdown():
    table = Table("Title", ["", "s"], [["a|b", "1"]], ["A note."])
    assert table.markdown() == "**Title**\n\n|  | s |\n|---|---|\n| a\\|b | 1 |\n\nA note.\n"
    # 8 files in 2 and in 4 seconds.
    runs = {"put": {"ours": [Run(2, 0.5, 60, "")]}, "get": {"ours": [Run(4, 1, 70, "")]}}
    assert everyone("", runs, 8, "files").rows == [
        ["ours", "2.00", "4", "0.50", "60", "4.00", "2", "1.00", "70"]
    ]


def test_what_was_delivered(tmp_path):
    a, b = (random_files(tmp_path / name, [3, 5]) for name in "ab")
    assert [path.stat().st_size for path in sorted(a.iterdir())] == [3, 5]
    assert delivered(a, a) == delivered(a, b, a) == "right"
    (b / "0000.safetensors").write_bytes((a / "0000.safetensors").read_bytes())
    assert delivered(b, a) == "wrong"  # a mixture
    (a / "0001.safetensors").unlink()
    assert delivered(a, b) == "wrong"  # a part
    (tmp_path / "c").mkdir()
    assert delivered(tmp_path / "c", a) == "nothing"


@pytest.fixture
def received():
    return bytearray()


@pytest.fixture
def echo(received):
    """The address of a server that returns every byte."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve(connection: socket.socket) -> None:
        with connection:
            try:
                while data := connection.recv(1 << 16):
                    received.extend(data)
                    connection.sendall(data)
            except OSError:
                return

    def accept() -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=serve, args=(connection,), daemon=True).start()

    thread = threading.Thread(target=accept)
    thread.start()
    yield f"http://127.0.0.1:{listener.getsockname()[1]}"
    listener.shutdown(socket.SHUT_RDWR)
    thread.join()
    listener.close()


def through(endpoint: str, data: bytes) -> bytes:
    """Send and receive at once, until all has come back or the connection ends."""
    host, _, port = endpoint.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as client:
        sender = threading.Thread(target=client.sendall, args=(data,))
        sender.start()
        found = bytearray()
        while len(found) < len(data) and (chunk := client.recv(1 << 16)):
            found += chunk
        sender.join()
    return bytes(found)


def test_throttle_keeps_its_rate_and_counts(echo):
    data = bytes(4 * MIB)
    with throttled(echo, 8) as line:
        started = time.monotonic()
        assert through(line.endpoint, data) == data
        # 4 MiB at 8 MiB/s, less the 10 ms that may be made up for.
        assert time.monotonic() - started > 0.48
        counts = line.counts()
    assert (counts["up"], counts["down"]) == (4 * MIB, 4 * MIB)
    assert counts["cpu"] > 0


@pytest.mark.parametrize("direction", ["up", "down"])
def test_wire_flips_one_bit(echo, received, direction):
    data = bytes(MIB)
    once = Once(direction, MIB // 2, flip)
    with wire(echo, once) as endpoint:
        found = through(endpoint, data)
    assert once.done
    changed = [number for number, byte in enumerate(found) if byte]
    assert len(changed) == 1
    assert changed[0] > MIB // 2 - CHUNK
    assert found[changed[0]] == 1
    assert any(received) == (direction == "up")


def test_wire_ends_connections(echo):
    with wire(echo, Once("down", MIB // 2, cut)) as endpoint:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        assert 0 < len(asked(host, int(port))) < 31 * (32 << 10)
    with wire(echo, Once("down", MIB // 2, reset)) as endpoint:
        host, _, port = endpoint.removeprefix("http://").partition(":")
        with pytest.raises(ConnectionResetError):
            asked(host, int(port))


def asked(host: str, port: int) -> bytes:
    """A little less than 1 MiB in pieces, each answered before the next."""
    found = bytearray()
    with socket.create_connection((host, port)) as client:
        for _ in range(31):
            client.sendall(bytes(32 << 10))
            got = 0
            while got < 32 << 10:
                chunk = client.recv(1 << 16)
                if not chunk:
                    return bytes(found)
                got += len(chunk)
                found += chunk
    return bytes(found)


def test_wire_waits_for_what_is_done_meanwhile(echo):
    done: list[int] = []
    with wire(echo, Once("up", 1, during(lambda: done.append(1)))) as endpoint:
        assert through(endpoint, bytes(MIB)) == bytes(MIB)
    assert done == [1]


def test_sink_serves_what_it_kept(tmp_path):
    """A block of its own, then zeros: in one request, in parts, in ranges."""
    path = tmp_path / "large"
    with path.open("wb") as file:
        file.write(b"x" * 4096)
        file.truncate(12 * MIB + 7)
    parts = TransferConfig(multipart_threshold=5 * MIB, multipart_chunksize=5 * MIB)
    with sink() as endpoint:
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            aws_access_key_id="a",
            aws_secret_access_key="b",
            region_name="us-east-1",
        )
        client.upload_file(str(path), "bucket", "k/parts", Config=parts)
        client.upload_file(str(path), "bucket", "k/one", Config=TransferConfig(10**9))
        for key in ("k/parts", "k/one"):
            client.download_file("bucket", key, str(tmp_path / "found"), Config=parts)
            assert (tmp_path / "found").read_bytes() == path.read_bytes()
        client.put_object(Bucket="bucket", Key="k/s", Body=b"s", Metadata={"writer": "w"})
        assert client.head_object(Bucket="bucket", Key="k/s")["Metadata"] == {"writer": "w"}
        with pytest.raises(client.exceptions.ClientError, match="PreconditionFailed"):
            client.put_object(Bucket="bucket", Key="k/s", Body=b"t", IfNoneMatch="*")
        client.delete_object(Bucket="bucket", Key="k/one")
        with pytest.raises(client.exceptions.NoSuchKey):
            client.get_object(Bucket="bucket", Key="k/one")
        listed = client.list_objects_v2(Bucket="bucket", Prefix="k/")["Contents"]
        assert [(o["Key"], o["Size"]) for o in listed] == [("k/parts", 12 * MIB + 7), ("k/s", 1)]
        client.close()


@pytest.fixture
def site(s3_server, tmp_path):
    site = Site(s3_server, tmp_path)
    yield site
    site.client.close()


@pytest.mark.s3
def test_a_tiny_race(site, tmp_path):
    folder = random_files(tmp_path / "in", [1000, 2000])
    sides = [side for side in SIDES if side in ("ours", "s3transfer, a loop", "boto3, 8 threads")]
    runs = moved(site, folder, sides, 1)
    assert list(runs["get"]) == sides
    for operation in ("put", "get"):
        for (run,) in runs[operation].values():
            assert 0 < run.seconds < 30
            assert 20 < run.peak < 300
            assert run.cpu > 0
    assert "Contents" not in site.client.list_objects_v2(Bucket="bench")
    with pytest.raises(SideFailed, match=r"NoSuchBucket|there is no bucket"):
        site.run("ours", "put", str(folder), "no-such-bucket/x")


@pytest.mark.s3
@pytest.mark.parametrize(
    "name", ["a bit flips on the way down", "two writers of one name, one overtakes"]
)
def test_a_fault(site, tmp_path, name):
    sizes = [64 << 10] * 20
    a, b = (random_files(tmp_path / which, sizes) for which in "ab")
    assert TRIALS[name](Trial(site, "ours", a, b, sum(sizes))) == "survives"
