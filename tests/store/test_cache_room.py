"""The size limit of the cache: least recently used first, none in use."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from rlhf.store import Store, open_store
from rlhf.store.cache import Cache
from tests.store.test_artifacts import contents, put

SIZE = 100_000


@pytest.fixture
def artifacts(folder_place, producer, tmp_path):
    """Four artifacts of 100 kB, which share one more file of 50 kB."""
    store, refs = folder_place.open(), []
    for number in range(4):
        folder = tmp_path / f"in-{number}"
        folder.mkdir()
        (folder / "own.json").write_bytes(bytes([number]) * SIZE)
        (folder / "shared.json").write_bytes(b"s" * (SIZE // 2))
        refs.append(put(store, folder, producer))
    return refs


@pytest.fixture
def opened(folder_place, tmp_path):
    def opened(limit: int) -> Store:
        return open_store(folder_place.uri, cache_dir=tmp_path / "small", cache_bytes=limit)

    return opened


def cached(tmp_path: Path) -> set[str]:
    return {
        path.name
        for path in (tmp_path / "small" / "cache" / "artifacts").iterdir()
        if path.is_dir()
    }


def bytes_used(tmp_path: Path) -> int:
    """Return the bytes of all files; hard links count once."""
    files = [p.stat() for p in (tmp_path / "small" / "cache").rglob("*") if p.is_file()]
    return sum({state.st_ino: state.st_size for state in files}.values())


def fetch_and_forget(opened, ref, limit: int) -> None:
    """Fetch as a process does that ends then."""
    opened(limit).fetch(ref)


def test_what_was_used_longest_ago_goes(artifacts, opened, tmp_path):
    limit = 3 * SIZE
    for ref in (*artifacts[:2], artifacts[0]):
        fetch_and_forget(opened, ref, limit)
    assert cached(tmp_path) == {artifacts[0].digest, artifacts[1].digest}
    # Two of their own and the shared one are there already.
    assert bytes_used(tmp_path) == 2 * SIZE + SIZE // 2
    # By the clock of files, one second may hold all of this.
    lock = tmp_path / "small" / "cache" / "artifacts" / f".{artifacts[1].digest}.lock"
    os.utime(lock, (1, 1))
    fetch_and_forget(opened, artifacts[2], limit)
    assert cached(tmp_path) == {artifacts[0].digest, artifacts[2].digest}
    assert bytes_used(tmp_path) <= limit
    assert not lock.exists()
    assert list((tmp_path / "small" / "cache" / "locks").iterdir()) == []
    assert list((tmp_path / "small" / "cache" / "tmp").iterdir()) == []


def test_what_is_in_use_stays(artifacts, opened, tmp_path):
    first = opened(SIZE)
    folder = first.fetch(artifacts[0])
    before = contents(folder)
    for ref in artifacts[1:]:
        fetch_and_forget(opened, ref, SIZE)
    assert cached(tmp_path) == {artifacts[0].digest, artifacts[3].digest}
    assert contents(folder) == before
    del first
    fetch_and_forget(opened, artifacts[1], SIZE)
    assert cached(tmp_path) == {artifacts[1].digest}


def test_what_another_process_uses_stays(artifacts, opened, folder_place, tmp_path):
    code = (
        "import sys; from pathlib import Path; from rlhf.store import open_store\n"
        "store = open_store(sys.argv[1], cache_dir=Path(sys.argv[2]))\n"
        "print(store.fetch(sys.argv[3]), flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, folder_place.uri, tmp_path / "small"]
    with subprocess.Popen(
        [*command, artifacts[0].digest], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        folder = Path(process.stdout.readline().strip())
        fetch_and_forget(opened, artifacts[1], SIZE)
        assert (folder / "own.json").read_bytes() == bytes(SIZE)
        process.kill()
        process.wait()
    fetch_and_forget(opened, artifacts[2], SIZE)
    assert cached(tmp_path) == {artifacts[2].digest}


def test_files_of_several_artifacts_are_stored_once(artifacts, opened, tmp_path):
    store = opened(10 * SIZE)
    folders = [store.fetch(ref) for ref in artifacts]
    assert len({(folder / "shared.json").stat().st_ino for folder in folders}) == 1
    assert bytes_used(tmp_path) == 4 * SIZE + SIZE // 2


def test_without_hard_links_there_are_copies(artifacts, opened, tmp_path, monkeypatch):
    def forbidden(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    store = opened(10 * SIZE)
    monkeypatch.setattr("rlhf.store.cache.os.link", forbidden)
    folder = store.fetch(artifacts[0])
    assert (folder / "own.json").read_bytes() == bytes(SIZE)
    assert store.fetch(artifacts[0]) == folder
    fetch_and_forget(opened, artifacts[1], SIZE)
    assert artifacts[0].digest in cached(tmp_path)


def test_an_artifact_larger_than_the_limit_is_fetched(artifacts, opened):
    assert (opened(1).fetch(artifacts[0]) / "own.json").stat().st_size == SIZE
    assert Cache(Path("/nowhere"))._limit == 50 * 10**9
