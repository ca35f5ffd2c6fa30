"""The local cache: verified, atomic, shared by processes."""

from __future__ import annotations

import multiprocessing
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf.errors import ArtifactCorrupt, StoreConfigError
from rlhf.store import open_store
from tests.store.test_artifacts import contents, put


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[100] ^= 1
    path.write_bytes(bytes(data))


@pytest.fixture
def ref(store, folder, producer):
    return put(store, folder, producer)


WEIGHTS = "model/weights.safetensors"


def damage_flip(got: Path) -> None:
    flip(got / WEIGHTS)


def damage_quiet_flip(got: Path) -> None:
    """Flip a bit as a failing disk does: size and time stay."""
    state = (got / WEIGHTS).stat()
    flip(got / WEIGHTS)
    os.utime(got / WEIGHTS, ns=(state.st_atime_ns, state.st_mtime_ns))


def damage_truncate(got: Path) -> None:
    (got / WEIGHTS).write_bytes((got / WEIGHTS).read_bytes()[:-1])


def damage_delete(got: Path) -> None:
    (got / WEIGHTS).unlink()


def damage_add(got: Path) -> None:
    (got / "stranger.json").write_text("{}")


def damage_link(got: Path) -> None:
    (got / WEIGHTS).rename(got.parent / "moved")
    (got / WEIGHTS).symlink_to(got.parent / "moved")


def damage_link_folder(got: Path) -> None:
    (got / "stranger").symlink_to("/etc")


def damage_replace(got: Path) -> None:
    got.rename(got.parent / "moved")
    got.write_text("a file where the folder should be")


DAMAGES = [
    damage_flip,
    damage_truncate,
    damage_delete,
    damage_add,
    damage_link,
    damage_link_folder,
    damage_replace,
]


@pytest.mark.parametrize("damage", DAMAGES)
def test_damage_is_noticed_and_healed(store, folder, ref, damage):
    got = store.fetch(ref)
    damage(got)
    again = store.fetch(ref)
    assert contents(again) == contents(folder)
    assert not any(path.is_symlink() for path in again.rglob("*"))


@pytest.mark.parametrize("damage", [*DAMAGES, damage_quiet_flip])
def test_damage_is_noticed_by_the_next_process(place, store, folder, ref, damage):
    damage(store.fetch(ref))
    again = place.open().fetch(ref)
    assert contents(again) == contents(folder)
    assert not any(path.is_symlink() for path in again.rglob("*"))


def test_sound_copy_is_used_as_it_is(place, store, ref):
    got = store.fetch(ref)
    before = (got / WEIGHTS).stat()
    for again in (store, place.open()):
        assert again.fetch(ref) == got
    assert (got / WEIGHTS).stat().st_ino == before.st_ino


def test_selection_trusts_no_damaged_whole(store, folder, ref):
    whole = store.fetch(ref)
    flip(whole / WEIGHTS)
    part = store.fetch(ref, include=["model/w*"])
    assert part != whole
    assert (part / WEIGHTS).read_bytes() == (folder / WEIGHTS).read_bytes()


def test_failure_leaves_nothing_behind(place, store, ref, tmp_path):
    entry = store.manifest(ref).files[-1]
    place.write(f"blobs/sha256/{entry.sha256[:2]}/{entry.sha256}", b"x" * entry.size)
    with pytest.raises(ArtifactCorrupt):
        store.fetch(ref)
    cache = tmp_path / "cache" / "cache"
    assert [path.name for path in (cache / "artifacts").iterdir()] == [f".{ref.digest}.lock"]
    assert list((cache / "tmp").iterdir()) == list((cache / "locks").iterdir()) == []
    # What was sound is kept for the next try.
    assert not (cache / "blobs" / entry.sha256[:2] / entry.sha256).exists()
    assert not [key for key in place.objects() if key.startswith("tmp/")]


def test_leftovers_of_a_killed_process_are_replaced(store, folder, ref, tmp_path):
    left = tmp_path / "cache" / "cache" / "tmp"
    (left / "0123").mkdir(parents=True)
    (left / "0123" / "config.json").write_text("half")
    (left / "0123.lock").touch()
    assert contents(store.fetch(ref)) == contents(folder)
    assert list(left.iterdir()) == []


def test_threads_share_one_download(place, folder, ref):
    stores = [place.open() for _ in range(4)]
    barrier = threading.Barrier(4)

    def fetch(store):
        barrier.wait()
        got = store.fetch(ref)
        return got, (got / WEIGHTS).stat().st_ino

    with ThreadPoolExecutor(4) as pool:
        assert len(set(pool.map(fetch, stores))) == 1


def fetch_in_process(uri: str, cache_dir: Path, digest: str, results) -> None:
    got = open_store(uri, cache_dir=cache_dir).fetch(digest)
    results.put((got / WEIGHTS).stat().st_ino)


def test_processes_share_one_download(store, ref, tmp_path):
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    arguments = (store.uri, tmp_path / "cache", ref.digest, results)
    processes = [context.Process(target=fetch_in_process, args=arguments) for _ in range(3)]
    for process in processes:
        process.start()
    inodes = {results.get(timeout=60) for _ in processes}
    for process in processes:
        process.join()
    assert len(inodes) == 1


def test_unusable_cache_folder(place, ref, tmp_path):
    (tmp_path / "file").write_text("")
    store = open_store(place.uri, cache_dir=tmp_path / "file")
    with pytest.raises(StoreConfigError, match=r"artifact cache .*make it a folder"):
        store.fetch(ref)
