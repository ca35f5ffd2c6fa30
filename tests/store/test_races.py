"""Concurrent writers, publishers and garbage collections.

`benchmarks.storage.races` is the long form.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest

from benchmarks.storage.backends import BucketPlace, FolderPlace, Place
from benchmarks.storage.races import Row, appending, collecting, creating
from rlhf.errors import ArtifactMissing
from rlhf.store import Producer, Store
from rlhf.store.cache import Cache
from rlhf.store.coordination import is_atomic
from rlhf.store.local import LocalBackend

OLD = 7 * 24 * 3600


class Stopping(LocalBackend):
    """A backend that calls back before it removes garbage."""

    before: Callable[[], None] | None = None

    def delete(self, keys: Iterable[str]) -> None:
        keys = list(keys)
        if self.before and any(key.startswith("blobs/") for key in keys):
            call, self.before = self.before, None
            call()
        super().delete(keys)


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return tmp_path / "the store"


def open_stopping(root: Path, before: Callable[[], None] | None = None) -> Store:
    backend = Stopping(root)
    backend.before = before
    return Store(backend, Cache(root.parent / "cache"))


def make_old(root: Path) -> None:
    for path in root.rglob("*"):
        if path.is_file():
            os.utime(path, (time.time() - OLD, time.time() - OLD))


class Publishing:
    """A publisher in another thread, run up to where it waits for a collection."""

    def __init__(self, root: Path, folder: Path, producer: Producer) -> None:
        self.store = open_stopping(root)
        self._publish: Any = lambda: self.store.publish(
            folder, "data", parents={}, producer=producer, metrics={}
        )
        self._pool = ThreadPoolExecutor(1)
        self._waits = threading.Event()
        backend: Any = self.store._backend
        look = backend.list

        def listed(prefix: str) -> Any:
            found = look(prefix)
            self._waits.set()
            return found

        backend.list = listed

    def until_it_waits(self) -> None:
        self._waits.clear()
        self.future = self._pool.submit(self._publish)
        assert self._waits.wait(20)

    def problems(self) -> list[str]:
        """Return the problems of the published artifact."""
        ref = self.future.result(30)
        self._pool.shutdown()
        return self.store.problems(ref, deep=True)


@pytest.fixture
def publishing(root, folder, producer):
    """An artifact unreferenced for a week, and a publisher of it."""
    found = Publishing(root, folder, producer)
    found._publish()
    make_old(root)
    return found


def test_publish_while_garbage_is_collected(root, publishing):
    found = open_stopping(root, publishing.until_it_waits).collect(dry_run=False)
    assert len(found.artifacts) == 1
    assert publishing.problems() == []


def test_publish_mends_a_blob_while_it_is_collected(root, publishing):
    """A collector listed the damaged blob, and removes its replacement."""
    for blob in root.glob("blobs/*/*/*"):
        blob.write_bytes(b"damaged")
    make_old(root)
    open_stopping(root, publishing.until_it_waits).collect(dry_run=False)
    assert publishing.problems() == []


def test_publish_between_the_removals_of_two_collectors(root, publishing):
    """A second collector removes the blob again after it was sent anew."""

    def both() -> None:
        open_stopping(root).collect(dry_run=False)
        publishing.until_it_waits()

    open_stopping(root, both).collect(dry_run=False)
    assert publishing.problems() == []


def test_pin_while_the_artifact_is_collected(root, publishing):
    """A pin that is reported as created keeps the artifact."""
    store = publishing.store
    (digest,) = (artifact.ref.digest for artifact in store.list())
    publishing._publish = lambda: store.pins.add("keep", digest)
    open_stopping(root, publishing.until_it_waits).collect(dry_run=False)
    with pytest.raises(ArtifactMissing, match=f"can't pin {digest[:12]}"):
        publishing.future.result(30)
    assert store.pins.by_name() == {}


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def campaign_place(request, tmp_path) -> Place:
    if request.param == "folder":
        return FolderPlace(tmp_path / "store")
    request.getfixturevalue("s3_place")
    return BucketPlace("Ceph", tmp_path.name)


def test_one_writer_wins(campaign_place):
    row = Row("create", "")
    creating(campaign_place, 2, 4, 3, row)
    assert (row.won, row.failures, row.errors) == (3, [], 0)


def test_appended_entries_are_numbered(campaign_place):
    row = Row("append", "")
    appending(campaign_place, 2, 3, 1, row)
    assert (row.won, row.failures, row.errors) == (6, [], 0)


@pytest.mark.s3
def test_one_writer_wins_on_a_weak_server(s3_weak_server, monkeypatch, tmp_path):
    for name, value in s3_weak_server.environment.items():
        monkeypatch.setenv(name, value)
    place = BucketPlace("Swift", tmp_path.name)
    backend: Any = place.open(tmp_path)._backend
    assert not is_atomic(backend)
    row = Row("create", "")
    creating(place, 1, 6, 1, row)
    assert (row.won, row.failures, row.errors) == (1, [], 0)


def test_publishers_among_collectors(tmp_path):
    row = Row("collect", "")
    collecting(FolderPlace(tmp_path / "store"), 16, 2, 0.0, 0.0, 0, row)
    assert (row.won, row.failures) == (16, [])
