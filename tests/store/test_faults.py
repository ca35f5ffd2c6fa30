"""Failing requests, by a proxy in front of the real server."""

from __future__ import annotations

import os

import pytest

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import ArtifactCorrupt, StoreError
from rlhf.store import PublishError, Store, open_store
from rlhf.store.objects import Source
from tests.store.test_artifacts import contents, put

pytestmark = pytest.mark.s3


@pytest.fixture
def store(s3_place, faults, tmp_path) -> Store:
    options = StoreConfig(endpoint_url=faults.endpoint)
    return open_store(s3_place.uri, options=options, cache_dir=tmp_path / "cache")


class Once:
    """True for the first `times` requests that match."""

    def __init__(self, method: str, part: str, times: int = 1) -> None:
        self.method, self.part, self.left = method, part, times

    def __call__(self, method: str, path: str) -> bool:
        if method == self.method and self.part in path and self.left > 0:
            self.left -= 1
            return True
        return False


def test_proxy_itself_is_transparent(store, folder, producer):
    assert contents(store.fetch(put(store, folder, producer))) == contents(folder)


@pytest.mark.parametrize("method", ["PUT", "GET", "HEAD"])
def test_busy_server_is_asked_again(store, faults, folder, producer, method):
    busy = Once(method, "/blobs/")
    faults.refuse = lambda method, path, _: 503 if busy(method, path) else None
    assert contents(store.fetch(put(store, folder, producer))) == contents(folder)
    assert busy.left == 0


def test_server_that_stays_busy_is_worth_a_later_retry(store, faults):
    faults.refuse = lambda *_: 503
    with pytest.raises(StoreError, match=r"answered 503 .*try again later") as caught:
        store.history.append("a", {})
    assert caught.value.retriable
    assert type(caught.value) is StoreError


def test_flip_on_the_way_down_is_fetched_again(store, faults, folder, producer):
    ref = put(store, folder, producer)
    flip = Once("GET", "/blobs/")
    faults.mangle = lambda method, path, body: (
        bytes([body[0] ^ 1]) + body[1:] if body and flip(method, path) else body
    )
    assert contents(store.fetch(ref)) == contents(folder)
    assert flip.left == 0


def test_flip_on_every_way_down_is_an_error(store, faults, folder, producer, tmp_path):
    ref = put(store, folder, producer)
    faults.mangle = lambda method, path, body: (
        bytes([body[0] ^ 1]) + body[1:] if body and "/blobs/" in path else body
    )
    with pytest.raises(ArtifactCorrupt, match="does not have the sha256"):
        store.fetch(ref)
    cache = tmp_path / "cache" / "cache"
    assert [path.name for path in (cache / "artifacts").iterdir()] == [f".{ref.digest}.lock"]
    assert not [path for path in cache.rglob("*") if path.is_file() and path.stat().st_size]


@pytest.mark.parametrize("part", ["/blobs/", "/manifests/"])
def test_cut_download_goes_on(store, faults, folder, producer, part):
    ref = put(store, folder, producer)
    cut = Once("GET", part)
    faults.mangle = lambda method, path, body: body[:5] if cut(method, path) else body
    assert contents(store.fetch(ref)) == contents(folder)
    assert cut.left == 0


def test_download_that_is_always_cut(store, faults, folder, producer):
    ref = put(store, folder, producer)
    faults.mangle = lambda method, _path, body: body[:5] if method == "GET" else body
    for work in (store.manifest, store.fetch):
        with pytest.raises(
            StoreError, match=r"can't read manifests/.* the transfer broke"
        ) as caught:
            work(ref)
        assert caught.value.retriable
    faults.mangle = lambda _method, path, body: body[:5] if "/blobs/" in path else body
    with pytest.raises(StoreError, match=r"can't read blobs/.* the transfer broke") as caught:
        store.fetch(ref)
    assert caught.value.retriable


def test_lost_answer_is_no_lost_race(store, faults):
    """boto3 repeats the PUT and gets 412 from its own object: append only once."""
    lose = Once("PUT", "/refs/")
    faults.lose_answer = lose
    assert store.history.append("a", {"x": 1}) == 1
    assert lose.left == 0
    assert store.history.entries("a") == [{"x": 1}]


def test_server_without_conditions(store, faults, folder, producer):
    faults.refuse = lambda _method, _path, headers: 501 if "If-None-Match" in headers else None
    ref = put(store, folder, producer)
    assert put(store, folder, producer) == ref
    assert [store.history.append("a", {}) for _ in range(2)] == [1, 2]
    assert store._backend.put_new("refs/a/000002.json", b"other") is False


def test_conflict_is_tried_again(store, faults):
    conflict = Once("PUT", "/refs/", times=2)
    faults.refuse = lambda method, path, _: 409 if conflict(method, path) else None
    assert store.history.append("a", {}) == 1
    assert conflict.left == 0


def test_conflict_for_ever(store, faults):
    faults.refuse = lambda method, _path, _headers: 409 if method == "PUT" else None
    with pytest.raises(StoreError, match="being written by others") as caught:
        store.history.append("a", {})
    assert caught.value.retriable


def test_refusal_is_final(store, faults):
    faults.refuse = lambda *_: 400
    with pytest.raises(StoreError, match="check endpoint and region") as caught:
        store.history.names()
    assert not caught.value.retriable


def test_publishing_again_sends_no_blob(store, faults, folder, producer):
    put(store, folder, producer)
    faults.seen.clear()
    put(store, folder, producer)
    writes = [path for method, path in faults.seen if method in ("PUT", "POST")]
    assert len(writes) == 1
    assert "/manifests/" in writes[0]


def test_manifest_is_written_last(store, faults, folder, producer):
    put(store, folder, producer)
    writes = [path for method, path in faults.seen if method == "PUT"]
    assert len(writes) == 4
    assert "/manifests/" in writes[-1]
    faults.refuse = lambda method, path, _: 403 if method == "PUT" and "/blobs/" in path else None
    (folder / "new.json").write_text("{}")
    faults.seen.clear()
    with pytest.raises(StoreError, match="access denied"):
        put(store, folder, producer)
    assert not [path for _, path in faults.seen if "/manifests/" in path]


def test_bucket_that_forbids_deletion_is_fine(store, faults):
    faults.refuse = lambda method, *_: 403 if method == "DELETE" else None
    store.check()


@pytest.mark.slow
def test_large_file_in_parts(store, faults, folder, producer):
    """33 MiB are two parts, one of which is refused once."""
    (folder / "large.safetensors").write_bytes(os.urandom(33 << 20))
    busy = Once("PUT", "partNumber=2")
    faults.refuse = lambda method, path, _: 503 if busy(method, path) else None
    ref = put(store, folder, producer)
    assert busy.left == 0
    assert contents(store.fetch(ref)) == contents(folder)
    faults.refuse = lambda method, path, _: 403 if "partNumber" in path else None
    (folder / "large.safetensors").write_bytes(os.urandom(33 << 20))
    with pytest.raises(StoreError, match="access denied"):
        put(store, folder, producer)


@pytest.mark.parametrize("moment", ["before", "while"])
def test_large_file_that_changes(store, s3_place, faults, tmp_path, moment):
    """The sent bytes are unknown then, so no blob may stay under that digest."""
    path = tmp_path / "large.safetensors"
    path.write_bytes(b"a" * (129 << 20))

    def touch(method: str, _path: str, _headers: dict[str, str]) -> None:
        if method == "PUT":
            os.utime(path, ns=(0, 0))

    with path.open("rb") as file:
        source = Source(file, path.name, lambda _: None)
        if moment == "before":
            with path.open("ab") as other:
                other.write(b"b")
        else:
            faults.refuse = touch
        with pytest.raises(PublishError, match="changed while"):
            store._backend.put_file("blobs/x", source)
    assert "uploads" in faults.seen[0][1]
    assert s3_place.objects() == {}
    assert store.sweep(0) == 0


def test_unreadable_answer_to_head(store, faults):
    faults.refuse = lambda method, *_: 403 if method == "HEAD" else None
    with pytest.raises(StoreError, match="access denied"):
        store._backend.find("blobs/x")
