"""Full disks, for downloads and for folder stores, on a small tmpfs."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from rlhf.store import open_store
from tests.store.faulty import SMALL, complaint, make_folder, nothing_half
from tests.store.test_artifacts import contents, put

SIZES = pytest.mark.parametrize("size", [SMALL, 20 << 20], ids=["small", "large"])


@pytest.fixture
def disk(tmp_path) -> Iterator[Path]:
    """24 MiB, of which a file `ballast` takes 23.5."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "rlhf-test", str(folder)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True, check=False).returncode:
        (pytest.fail if os.environ.get("CI") else pytest.skip)("can't mount a tmpfs")
    try:
        (folder / "ballast").write_bytes(bytes(47 << 19))
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True)


@SIZES
def test_full_disk_on_the_way_down(each_place, disk, tmp_path, producer, size):
    folder = make_folder(tmp_path / "new", size)
    ref = put(each_place.open(), folder, producer)
    store = open_store(each_place.uri, cache_dir=disk)
    error = complaint(
        lambda: store.fetch(ref), f"artifact cache {disk}/cache", "No space left",
        "make room, lower runtime.cache_gb, or set runtime.work_dir to a larger disk",
    )  # fmt: skip
    assert error.retriable
    nothing_half(disk)
    assert not list((disk / "cache").glob("blobs/*/*"))
    (disk / "ballast").unlink()
    assert contents(store.fetch(ref)) == contents(folder)


@SIZES
def test_full_disk_of_a_folder_store(disk, tmp_path, producer, size):
    folder = make_folder(tmp_path / "new", size)
    root = disk / "the store"
    store = open_store(str(root), cache_dir=tmp_path / "cache")
    error = complaint(
        lambda: put(store, folder, producer), store.uri, "can't write blobs/", "No space left",
        "make room",
    )  # fmt: skip
    assert error.retriable
    assert [path for path in root.rglob("*") if path.is_file()] == []
    (disk / "ballast").unlink()
    assert contents(store.fetch(put(store, folder, producer))) == contents(folder)
