"""Histories: append-only, no entry lost, with concurrent writers."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf.errors import ArtifactCorrupt
from rlhf.store import PublishError


def test_append_latest_history(store):
    assert store.history.latest("champions/default") is None
    assert store.history.entries("champions/default") == []
    assert [store.history.append("champions/default", {"n": n}) for n in range(3)] == [1, 2, 3]
    assert store.history.latest("champions/default") == {"n": 2}
    assert store.history.entries("champions/default") == [{"n": 0}, {"n": 1}, {"n": 2}]


def test_names(store):
    for name in ("stages/b", "stages/a", "stages/a/deeper", "champions/x"):
        store.history.append(name, {"name": name})
    assert store.history.names("stages/") == ["stages/a", "stages/a/deeper", "stages/b"]
    assert store.history.names() == ["champions/x", "stages/a", "stages/a/deeper", "stages/b"]
    assert store.history.names("none") == []
    # A name below is a name of its own.
    assert store.history.entries("stages/a") == [{"name": "stages/a"}]
    assert store.history.append("stages/a", {}) == 2


def test_eight_writers_lose_nothing(place):
    stores = [place.open() for _ in range(8)]
    barrier = threading.Barrier(8)

    def write(writer: int) -> list[int]:
        barrier.wait()
        return [stores[writer].history.append("race", {"writer": writer, "i": i}) for i in range(3)]

    with ThreadPoolExecutor(8) as pool:
        numbers = [number for got in pool.map(write, range(8)) for number in got]
    assert sorted(numbers) == list(range(1, 25))
    entries = stores[0].history.entries("race")
    assert sorted((e["writer"], e["i"]) for e in entries) == [
        (writer, i) for writer in range(8) for i in range(3)
    ]


def test_of_writers_that_decide_by_the_same_entry_one_wins(place):
    stores = [place.open() for _ in range(8)]
    for after in range(3):
        line = threading.Barrier(8)

        def advance(writer: int, after: int = after, line: threading.Barrier = line) -> bool:
            line.wait()
            return stores[writer].history.advance("champion/x", {"writer": writer}, after)

        with ThreadPoolExecutor(8) as pool:
            won = list(pool.map(advance, range(8)))
        assert won.count(True) == 1
        entries = stores[0].history.numbered("champion/x")
        assert list(entries) == list(range(1, after + 2))
        assert entries[after + 1] == {"writer": won.index(True)}
    # Who looked long ago is late, too.
    assert not stores[0].history.advance("champion/x", {}, 0)
    assert stores[0].history.numbered("champion") == {}


@pytest.mark.parametrize("name", ["", "/a", "a/", "a//b", "../a", "a/..", ".a", "a b", "a\nb", "ä"])
def test_hostile_names(folder_place, name):
    place, store = folder_place, folder_place.open()
    for work in (lambda: store.history.append(name, {}), lambda: store.history.latest(name)):
        with pytest.raises(PublishError, match="not valid"):
            work()
    assert place.objects() == {}


@pytest.mark.parametrize("payload", [{"x": float("nan")}, {"x": object()}, {"x": "é" * 3_000_000}])
def test_payload_must_be_small_json(folder_place, payload):
    place, store = folder_place, folder_place.open()
    with pytest.raises(PublishError, match="can't write"):
        store.history.append("a", payload)
    assert place.objects() == {}


@pytest.mark.parametrize(
    "data", [b"[1]", b"{", b"\xff", b'{"payload":{"x":2},"sha256":"' + b"0" * 64 + b'"}']
)
def test_broken_entry(place, store, data):
    place.write("refs/a/000001.json", data)
    with pytest.raises(ArtifactCorrupt, match=r"refs/a/000001\.json is not an entry"):
        store.history.latest("a")


def test_strangers_are_ignored(place, store):
    store.history.append("a", {"x": 1})
    place.write("refs/a/notes.txt", b"hello")
    place.write("refs/a/7.json", b"{}")
    assert store.history.latest("a") == {"x": 1}
    assert store.history.names() == ["a"]


def test_latest_entry_is_not_hidden_by_a_flipped_listing(folder_place):
    store = folder_place.open()
    for number in range(3):
        store.history.append("champion/default", {"number": number})
    real = store._backend.list
    store._backend.list = lambda prefix: {k: f for k, f in real(prefix).items() if "3" not in k}
    assert store.history.latest("champion/default") == {"number": 2}
    assert store.history.numbered("champion/default") == {n + 1: {"number": n} for n in range(3)}
