"""Flipped bits in transfers of both directions: detected and repeated."""

from __future__ import annotations

import json
import math
import random

import pytest

from benchmarks.storage import flips
from rlhf.errors import ArtifactCorrupt
from rlhf.store.s3_errors import failed
from rlhf.store.s3_reading import date_of
from tests.store.faulty import (
    LARGE,
    SMALL,
    complaint,
    impatient,
    make_folder,
    nothing_half,
    unfinished,
)
from tests.store.test_artifacts import contents, put

pytestmark = pytest.mark.s3


@pytest.fixture
def store(s3_place, line, tmp_path):
    return impatient(s3_place.uri, line.endpoint, tmp_path / "cache", 5)


def carried(line, method: str, part: str) -> int:
    return len([r for r in line.seen if r.method == method and part in r.path])


@pytest.mark.parametrize(("size", "at"), [(SMALL, 0), (SMALL, SMALL - 1), (LARGE, 5 << 20)])
@pytest.mark.parametrize("direction", ["down", "up"])
def test_flip_in_a_file(store, line, s3_place, s3_client, tmp_path, producer, size, at, direction):
    folder = make_folder(tmp_path / "new", size)
    method = "PUT" if direction == "up" else "GET"
    fault = line.arm("flip", direction, at, bit=3, method=method, path="/blobs/")
    ref = put(store, folder, producer)
    assert contents(store.fetch(ref)) == contents(folder)
    assert fault.struck == 1
    ((digest, _),) = [(file.sha256, file.path) for file in store.manifest(ref).files]
    assert s3_place.read(f"blobs/sha256/{digest[:2]}/{digest}") == next(
        iter(contents(folder).values())
    )
    # Two parts and one again; three ranges, and all of them again.
    requests = {"up": (2, 3), "down": (2, 6)}[direction][size == LARGE]
    assert carried(line, method, "/blobs/") == requests
    assert unfinished(s3_client, s3_place.uri) == []


@pytest.mark.parametrize("direction", ["down", "up"])
@pytest.mark.parametrize("part", ["/manifests/", "/refs/"])
def test_flip_in_what_is_written_last(store, line, s3_place, folder, producer, direction, part):
    method = "PUT" if direction == "up" else "GET"
    fault = line.arm("flip", direction, 20, bit=5, method=method, path=part)
    ref = put(store, folder, producer)
    store.history.append("a", {"digest": ref.digest})
    assert store.history.entries("a") == [{"digest": ref.digest}]
    assert contents(store.fetch(ref)) == contents(folder)
    assert fault.struck == 1
    assert json.loads(s3_place.read("refs/a/000001.json"))["payload"] == {"digest": ref.digest}
    assert s3_place.read(f"manifests/{ref.digest}.json") == store.manifest(ref).encode()


@pytest.mark.parametrize("size", [SMALL, LARGE])
def test_flip_in_every_upload(store, line, s3_place, s3_client, tmp_path, producer, size):
    """Sent three times, then an error; nothing damaged is stored."""
    folder = make_folder(tmp_path / "new", size)
    fault = line.arm("flip", "up", 9, method="PUT", path="/blobs/", times=math.inf)
    complaint(
        lambda: put(store, folder, producer), store.uri, "can't write blobs/",
        "it arrived damaged, again and again (XAmzContentSHA256Mismatch)", "check the network",
    )  # fmt: skip
    assert 3 <= fault.struck <= (3 if size == SMALL else 6)
    assert s3_place.objects() == {}
    assert unfinished(s3_client, s3_place.uri) == []
    line.clear()
    assert contents(store.fetch(put(store, folder, producer))) == contents(folder)


@pytest.mark.parametrize("part", ["/manifests/", "/blobs/", "/refs/"])
def test_flip_in_every_download(store, line, folder, producer, part):
    ref = put(store, folder, producer)
    store.history.append("a", {"x": 1})
    line.arm("flip", "down", 9, method="GET", path=part, times=math.inf)
    work = store.history.entries if part == "/refs/" else lambda _: store.fetch(ref)
    error = complaint(lambda: work("a"), store.uri, part.strip("/"), "delete")
    assert isinstance(error, ArtifactCorrupt)
    line.clear()
    assert store.history.entries("a") == [{"x": 1}]
    assert contents(store.fetch(ref)) == contents(folder)


@pytest.mark.parametrize(
    ("method", "path", "start", "end"),
    [("HEAD", "/blobs/", 0, 240), ("GET", "/blobs/", 0, 240), ("GET", "list-type", 0, 500)],
)
def test_flip_in_an_answer(s3_place, line, tmp_path, folder, producer, method, path, start, end):
    """In a status, length, date or listing: a StoreError, or the right bytes."""
    rng = random.Random(f"{method} {path}")
    store = impatient(s3_place.uri, line.endpoint, tmp_path / "cache", 0.5, attempts=2)
    ref = put(store, folder, producer)
    for number in range(3):
        at, bit = rng.randrange(start, end), rng.randrange(8)
        line.arm("flip", "down", at, where="message", bit=bit, method=method, path=path)
        cache = tmp_path / str(number)
        other = impatient(s3_place.uri, line.endpoint, cache, 0.5, attempts=2)
        outcome = flips.one(lambda _, s=other: judge(s, ref, folder, producer), cache)
        assert outcome in ("", "clear error"), (at, bit)
        line.clear()
    assert contents(store.fetch(ref)) == contents(folder)


def test_flip_in_a_date_or_a_length():
    """An age of zero, so that nothing looks old; no complaint about options."""
    for date in ("Mon, 23 Nov 2026 19x05:32 GMT", "Mon, 23 \x0eov 2026 19:05:32 GMT", "\x00"):
        assert date_of({"ResponseMetadata": {"HTTPHeaders": {"date": date}}}) is None
    error = failed("what", "endpoint", ValueError("invalid literal for int()"), opening=False)
    assert error.retriable
    assert "try again" in str(error)


@pytest.mark.parametrize("path", ["/manifests/", "/blobs/"])
def test_flip_in_the_name_of_a_header(store, line, folder, producer, path):
    """Without a Content-Length an answer is read again, or a clear error."""
    ref = put(store, folder, producer)
    for method in ("GET", "HEAD"):
        # "HTTP/1.1 200 OK" and the end of that line are 17 bytes.
        line.arm("flip", "down", 22, where="message", method=method, path=path, times=math.inf)
        work = store.exists if method == "HEAD" and path == "/blobs/" else store.fetch
        if method == "GET" or work == store.exists:
            error = complaint(lambda work=work: work(ref), store.uri, path.strip("/"), "try again")
            assert error.retriable
        line.clear()
    assert contents(store.fetch(ref)) == contents(folder)


@pytest.mark.parametrize("told", ["0-9/60971520", "0-9/9971520", "0-9/*", "x", None])
@pytest.mark.parametrize("times", [1, math.inf])
def test_flip_in_the_length_of_a_whole(store, s3_place, tmp_path, producer, told, times):
    """The first range's answer holds the total size; damage to it is detected."""
    folder = make_folder(tmp_path / "new", LARGE)
    ref = put(store, folder, producer)
    told_so_far = []

    def lie(parsed, **_):
        if parsed.get("ContentRange", "").startswith("bytes 0-") and len(told_so_far) < times:
            told_so_far.append(parsed.pop("ContentRange"))
            if told:
                parsed["ContentRange"] = told

    store._backend._client.meta.events.register("after-call.s3.GetObject", lie)
    if times == 1:
        assert contents(store.fetch(ref)) == contents(folder)
    else:
        complaint(lambda: store.fetch(ref), s3_place.uri, "blobs/")
        nothing_half(tmp_path / "cache")
    assert told_so_far


def judge(store, ref, folder, producer) -> str:
    assert put(store, folder, producer) == ref
    return "" if contents(store.fetch(ref)) == contents(folder) else "delivered wrong"


def test_sample_of_the_campaign(s3_server, tmp_path, s3_place):
    """20 flips of `python -m benchmarks.storage.flips`, which does 1500."""
    with flips.opened(s3_server, tmp_path) as bench:
        for name, count in (("body, down", 10), ("body, up", 5), ("anywhere", 5)):
            found = flips.campaign(bench, name, count, seed=7)
            assert found["flips"] == count
            assert [found[column] for column in flips.BAD] == [0, 0, 0]
            if name != "anywhere":
                assert found["repaired or harmless"] == count
