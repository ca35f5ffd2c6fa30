"""Folder stores that are no folders, can't be read, or hold something else in an object's place."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from flows import artifacts
from rlhf.errors import ArtifactCorrupt, StoreConfigError, StoreError
from rlhf.store import Store, open_store
from tests.store.test_artifacts import put

NOBODY = 65534
ALIENS = {
    "folder": lambda path: path.mkdir(),
    "full folder": lambda path: (path / "x").mkdir(parents=True),
    "pipe": os.mkfifo,
    "link to nothing": lambda path: path.symlink_to("/nowhere/at/all"),
    "link to a folder": lambda path: path.symlink_to("/etc"),
    "link to itself": lambda path: path.symlink_to(path),
}


def replace(path: Path, alien: str) -> None:
    path.unlink()
    ALIENS[alien](path)


def all_commands(uri: str) -> list[list[str]]:
    refs = [["show"], ["lineage"], ["verify"], ["pull"], ["rm"]]
    commands = [[name[0], "abcdef01", *(["copy"] if name == ["pull"] else [])] for name in refs]
    commands += [["ls"], ["verify"], ["gc"], ["gc", "--delete"], ["unpin", "x"]]
    return [[*command, "--store", uri] for command in commands]


@pytest.mark.parametrize("below", ["", "/below"])
def test_a_file_is_no_empty_store(tmp_path, monkeypatch, below):
    """`ls` printed an empty table, and `verify` that nothing is broken."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    for command in all_commands(f"{tmp_path}/file{below}"):
        with pytest.raises(StoreError, match=r"Not a directory.* make "):
            artifacts.app(
                command, exit_on_error=False, print_error=False, result_action="return_value"
            )


@pytest.mark.parametrize("alien", ALIENS)
def test_something_else_in_a_manifests_place(store: Store, place, folder, producer, alien):
    """It was not listed, so that `verify` called the rest of the store whole."""
    ref = put(store, folder, producer)
    (folder / "config.json").write_text("{}")
    other = put(store, folder, producer)
    replace(place.root / f"manifests/{ref.digest}.json", alien)
    assert ref.digest in store.digests()
    assert store.problems(other) == []
    (line,) = store.problems(ref)
    assert f"manifests/{ref.digest}.json" in line
    assert not store.exists(ref)
    with pytest.raises(StoreError):
        store.manifest(ref)


@pytest.mark.parametrize("alien", ALIENS)
def test_something_else_in_a_blobs_place(store: Store, place, folder, producer, tmp_path, alien):
    ref = put(store, folder, producer)
    entry = next(e for e in store.manifest(ref).files if e.path == "config.json")
    key = f"blobs/sha256/{entry.sha256[:2]}/{entry.sha256}"
    replace(place.root / key, alien)
    for deep in (False, True):
        (line,) = store.problems(ref, deep)
        assert key in line
    with pytest.raises(StoreError, match=key):
        store.fetch(ref)


@pytest.mark.parametrize("alien", ALIENS)
def test_something_else_in_an_entrys_place(store: Store, place, alien):
    """Passed over, the entry before it would be the champion."""
    for number in (1, 2):
        store.history.append("champion/ours", {"policy": str(number)})
    replace(place.root / "refs/champion/ours/000002.json", alien)
    with pytest.raises(StoreError, match=r"000002\.json"):
        store.history.latest("champion/ours")


@pytest.fixture
def nobodys(tmp_path) -> Iterator[Path]:
    """A folder of a user to whom permissions apply, outside of pytest's, which only root enters."""
    with tempfile.TemporaryDirectory() as folder:
        if os.geteuid() == 0:
            os.chown(folder, NOBODY, -1)
        yield Path(folder)


@pytest.mark.parametrize("prefix", ["refs", "refs/records", "manifests", "blobs/sha256"])
def test_a_folder_that_can_not_be_read_is_no_empty_one(nobodys, folder, producer, prefix):
    """Records that a collection can't see would make all that they keep garbage."""
    is_root = os.geteuid() == 0
    store = open_store(str(nobodys / "store"), cache_dir=nobodys)
    try:
        if is_root:
            os.seteuid(NOBODY)
        (nobodys / "new").mkdir()
        (nobodys / "new/a.json").write_text("{}")
        ref = put(store, nobodys / "new", producer)
        store.history.append("records/a/b", {"artifact": ref.digest})
        (nobodys / "store" / prefix).chmod(0)
        with pytest.raises(StoreConfigError, match="Permission denied"):
            store.collect()
        (nobodys / "store" / prefix).chmod(0o755)
        assert store.collect(grace=0.0).artifacts == []
    finally:
        if is_root:
            os.seteuid(0)


def test_parts_of_a_store_on_another_disk(store: Store, place, tmp_path, folder, producer):
    """Linked folders are walked: what lies in them is used, and no garbage."""
    ref = put(store, folder, producer)
    store.history.append("records/a/b", {"artifact": ref.digest})
    for name in ("refs/records", "blobs/sha256"):
        shutil.move(place.root / name, tmp_path / "disk" / name)
        (place.root / name).symlink_to(tmp_path / "disk" / name)
    assert store.collect(grace=0.0).artifacts == []
    assert store.problems(ref, deep=True) == []
    assert store.history.latest("records/a/b") == {"artifact": ref.digest}
    (place.root / "refs/records/loop").symlink_to(place.root / "refs")
    with pytest.raises(StoreConfigError, match="symbolic links"):
        store.collect()


def test_writing_where_a_folder_is(store: Store, place):
    (place.root / "refs/a/000001.json").mkdir(parents=True)
    with pytest.raises(ArtifactCorrupt, match="is a folder, where an object belongs; remove it"):
        store._backend.put("refs/a/000001.json", b"{}")
    assert open_store(place.uri, cache_dir=place.root / "c")._backend.list("tmp/") == {}
