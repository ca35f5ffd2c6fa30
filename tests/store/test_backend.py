"""The contract of a backend, over a folder and over a real S3 server."""

from __future__ import annotations

import os
import threading
from concurrent.futures import ThreadPoolExecutor
from hashlib import sha256
from pathlib import Path

import pytest

from rlhf.errors import ArtifactCorrupt, ArtifactMissing, StoreError
from rlhf.store import PublishError
from rlhf.store.objects import SMALL, Backend, Sink, Source
from tests.store.conftest import Place

# Linux's file that is always full.
FULL = Path("/dev/full")
#: Two parts up, three ranges down.
LARGE = 20 << 20


@pytest.fixture
def backend(each_place: Place) -> Backend:
    return each_place.open()._backend


def read(backend: Backend, key: str, path: Path) -> Sink:
    with path.open("wb") as file:
        sink = Sink(file, lambda _: None)
        backend.get_file(key, sink)
    return sink


def test_put_and_get(backend, each_place):
    for data in (b"first", b"other", b""):
        backend.put("a/b.json", data)
        assert backend.get_bytes("a/b.json", 5) == each_place.read("a/b.json") == data
    assert [*each_place.objects()] == ["a/b.json"]


def test_get_refuses_more_than_the_limit(backend):
    backend.put("a/b.json", b"123456")
    assert backend.get_bytes("a/b.json", 6) == b"123456"
    with pytest.raises(ArtifactCorrupt, match=r"a/b\.json is larger than 5 bytes; delete it"):
        backend.get_bytes("a/b.json", 5)


def test_absent_object(backend, tmp_path):
    assert backend.find("a/b") is None
    message = f"^{backend.uri}: there is no a/b$"
    with pytest.raises(ArtifactMissing, match=message):
        backend.get_bytes("a/b", 5)
    with pytest.raises(ArtifactMissing, match=message):
        read(backend, "a/b", tmp_path / "got")


def test_create_only(backend, each_place):
    assert backend.put_new("a/b", b"first") is True
    assert backend.put_new("a/b", b"other") is False
    assert each_place.read("a/b") == b"first"
    backend.delete(["a/b"])
    assert backend.put_new("a/b", b"other") is True
    assert each_place.read("a/b") == b"other"


def test_create_only_has_one_winner(each_place):
    backends = [each_place.open()._backend for _ in range(8)]
    for key in ("race/1", "race/2", "race/3"):
        barrier = threading.Barrier(8)

        def write(writer: int, key: str = key, barrier: threading.Barrier = barrier) -> bool:
            barrier.wait()
            return backends[writer].put_new(key, str(writer).encode() * 1000)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(write, range(8)))
        assert won.count(True) == 1
        assert each_place.read(key) == str(won.index(True)).encode() * 1000


def test_create_only_that_is_held(backend, each_place):
    """The server has accepted the held write, but shows no object before its end."""
    held = []
    won = backend.put_new_held("a/b", b"whole", lambda: held.append(backend.find("a/b")))
    # On S3 nothing is held if the server takes a second to say that it reads the body.
    assert (won, held) in [(None, []), *([] if backend.atomic else [(True, [None])])]
    assert each_place.read("a/b") == b"whole"
    backend.put_new_held("a/b", b"other", lambda: None)
    assert each_place.read("a/b") == b"whole"


@pytest.mark.parametrize("size", [0, 1, SMALL + 1, LARGE])
def test_files(backend, each_place, tmp_path, size):
    data, path, sent = os.urandom(size), tmp_path / "file", []
    path.write_bytes(data)
    if size:
        with path.open("rb") as file:
            backend.put_file("a/b", Source(file, "file", sent.append))
        assert sum(sent) == size
    else:
        # A small file is put whole.
        backend.put("a/b", data)
    assert each_place.read("a/b") == data
    sink = read(backend, "a/b", tmp_path / "got")
    assert (tmp_path / "got").read_bytes() == data
    assert (sink.size, sink.sha256) == (size, sha256(data).hexdigest())
    assert [*each_place.objects()] == ["a/b"]


def test_file_that_changes_while_it_is_put(backend, each_place, tmp_path):
    """The blob of a digest must never hold other bytes than those hashed."""
    for size in (10, SMALL + 10):
        path = tmp_path / "some.txt"
        path.write_bytes(b"x" * size)
        with path.open("rb") as file:
            source = Source(file, path.name, lambda _: None)
            source.sha256()
            path.write_bytes(b"y" * size)
            with pytest.raises(PublishError, match=r"some\.txt changed"):
                backend.put_file("blobs/x", source)
    assert each_place.objects() == {}


def test_find_and_list(backend):
    sizes = {"a/b": 3, "a/bc": 0, "a/c/d": 2, "b": 1}
    for key in ("b", "a/c/d", "a/bc", "a/b"):
        backend.put(key, bytes(sizes[key]))
    for key, size in sizes.items():
        info = backend.find(key)
        assert info
        assert info.size == size
        # Dates of S3 are cut off to seconds.
        assert -1 <= info.age < 60
    for prefix in ("", "a", "a/", "a/b", "a/c/", "b", "none", "none/"):
        listed = backend.list(prefix)
        assert [*listed] == sorted(key for key in sizes if key.startswith(prefix))
        assert {key: info.size for key, info in listed.items()}.items() <= sizes.items()
        assert all(-1 <= info.age < 60 for info in listed.values())


def test_delete(backend, each_place):
    for key in ("a/b", "a/c", "d"):
        backend.put(key, b"x")
    backend.delete([])
    backend.delete(["a/b", "d", "none"])
    assert [*each_place.objects()] == ["a/c"]
    backend.delete(key for key in ("a/b", "a/c"))
    assert each_place.objects() == {}


def test_nothing_to_sweep(backend):
    backend.put("a", b"x")
    assert backend.sweep(0) == 0
    assert backend.get_bytes("a", 1) == b"x"


def test_child(backend, each_place):
    child = backend.child("some/name")
    assert child.uri == f"{backend.uri}/some/name"
    child.put("a/b", b"child")
    backend.put("a/b", b"parent")
    assert each_place.read("some/name/a/b") == child.get_bytes("a/b", 5) == b"child"
    assert [*child.list("")] == ["a/b"]
    assert child.put_new("a/b", b"other") is False


def test_hurried_and_closed(backend):
    hurried = backend.hurried(5)
    assert hurried.uri == backend.uri
    hurried.put("a", b"x")
    hurried.close()
    backend.close()
    assert backend.get_bytes("a", 1) == hurried.get_bytes("a", 1) == b"x"


def test_trouble_on_this_machine_is_worth_a_retry(backend):
    backend.put("some", b"x")
    with (
        FULL.open("wb", buffering=0) as full,
        pytest.raises(StoreError, match=r"can't read some: No space") as caught,
    ):
        backend.get_file("some", Sink(full, lambda _: None))
    assert caught.value.retriable
