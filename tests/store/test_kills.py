"""A few of the kills of `benchmarks.storage.kills`."""

from __future__ import annotations

import random
from pathlib import Path

import pytest

from benchmarks.storage.backends import BucketPlace, FolderPlace, write_files
from benchmarks.storage.kills import Publisher, Row, at_points, at_random, readers

LARGE = 17 * 1024 * 1024


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def publisher(request: pytest.FixtureRequest, tmp_path: Path) -> Publisher:
    work = tmp_path / "work"
    work.mkdir()
    write_files(work / "files", 7, LARGE)
    if request.param == "folder":
        return Publisher(FolderPlace(tmp_path / "store"), work / "files", work)
    request.getfixturevalue("s3_place")
    return Publisher(BucketPlace("Ceph", tmp_path.name), work / "files", work)


def test_killed_publishers_leave_nothing_half(publisher):
    points = publisher.undisturbed(1)
    # Around what makes an object appear, and half-way in the large file.
    wanted = {"after put_new 1", "inside put_file 1", "after put_file 1", "before link 1"}
    some = [point for point in points if point in wanted]
    row = Row("points", "")
    at_points(publisher, some, row)
    at_random(publisher, 1, random.Random(7), row)
    assert row.failures == []
    assert row.completed == len(some) + 1
    assert row.kills >= len(some) > 2


def test_killed_readers_leave_nothing(publisher):
    publisher.undisturbed(1)
    row = Row("fetch", "")
    readers(publisher, 2, random.Random(7), row)
    assert (row.failures, row.completed) == ([], 2)
