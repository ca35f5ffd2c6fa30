"""Broken connections to the real server: resets, cuts, stalls, refusals."""

from __future__ import annotations

import math
import threading
import time

import pytest

from tests.store.faulty import LARGE, SMALL, complaint, impatient, make_folder, nothing_half
from tests.store.faulty import unfinished as unfinished_uploads
from tests.store.proxy import fault_proxy
from tests.store.test_artifacts import contents, put
from tests.store.wire import Wire

pytestmark = pytest.mark.s3
KINDS = ["reset", "cut", "stall"]
SIZES = pytest.mark.parametrize("size", [SMALL, LARGE], ids=["small", "large"])


@pytest.fixture
def store(s3_place, line, tmp_path):
    return impatient(s3_place.uri, line.endpoint, tmp_path / "cache", 1, attempts=2)


@pytest.fixture
def unfinished(s3_client, s3_place):
    return lambda: unfinished_uploads(s3_client, s3_place.uri)


def manifests(place) -> list[str]:
    return [key for key in place.objects() if key.startswith("manifests/")]


@SIZES
@pytest.mark.parametrize("kind", KINDS)
def test_broken_once(store, line, tmp_path, producer, size, kind, unfinished):
    folder = make_folder(tmp_path / "new", size)
    up = line.arm(kind, "up", size // 8, method="PUT", path="/blobs/")
    ref = put(store, folder, producer)
    down = line.arm(kind, "down", size // 8, method="GET", path="/blobs/")
    assert contents(store.fetch(ref)) == contents(folder)
    assert (up.struck, down.struck) == (1, 1)
    # An upload whose first answer came too late (a second here) was begun twice: swept, not lost.
    assert store.sweep(0) <= 1
    assert unfinished() == []


@pytest.mark.parametrize(("kind", "size"), [("reset", LARGE), ("cut", SMALL), ("stall", LARGE)])
def test_upload_that_always_breaks(
    store, line, s3_place, tmp_path, producer, size, kind, unfinished
):
    folder = make_folder(tmp_path / "new", size)
    fault = line.arm(kind, "up", size // 8, method="PUT", path="/blobs/", times=math.inf)
    error = complaint(lambda: put(store, folder, producer), store.uri, "can't write blobs/")
    assert error.retriable
    # Each part of a large one is tried twice.
    assert fault.struck == 2 if size == SMALL else 2 <= fault.struck <= 4
    assert s3_place.objects() == {}
    assert unfinished() == []
    line.clear()
    assert contents(store.fetch(put(store, folder, producer))) == contents(folder)


@pytest.mark.parametrize(("kind", "size"), [("reset", SMALL), ("cut", LARGE), ("stall", LARGE)])
def test_download_that_always_breaks(store, line, tmp_path, producer, size, kind):
    folder = make_folder(tmp_path / "new", size)
    ref = put(store, folder, producer)
    line.arm(kind, "down", size // 16, method="GET", path="/blobs/", times=math.inf)
    error = complaint(lambda: store.fetch(ref), store.uri, "can't read blobs/", within=60)
    assert error.retriable
    nothing_half(tmp_path / "cache")
    line.clear()
    assert contents(store.fetch(ref)) == contents(folder)


def later(seconds: float, work) -> threading.Timer:
    timer = threading.Timer(seconds, work)
    timer.start()
    return timer


def test_refused_for_a_second(s3_place, line, tmp_path, folder, producer):
    store = impatient(s3_place.uri, line.endpoint, tmp_path / "cache", attempts=8)
    line.refuse()
    timer = later(1, line.listen)
    ref = put(store, folder, producer)
    timer.join()
    line.refuse()
    line.drop()
    timer = later(1, line.listen)
    assert contents(store.fetch(ref)) == contents(folder)
    timer.join()


def test_refused_for_ever(store, s3_place, line, tmp_path, folder, producer):
    ref = put(store, folder, producer)
    line.refuse()
    line.drop()
    where = f"no answer from {line.endpoint}"
    complaint(lambda: put(store, folder, producer), store.uri, where, "check the endpoint")
    complaint(lambda: store.fetch(ref), store.uri, f"manifests/{ref.digest}", where)
    line.listen()
    assert contents(store.fetch(ref)) == contents(folder)


def test_refused_from_the_middle_of_an_upload(
    store, s3_place, line, tmp_path, producer, unfinished
):
    """An upload that can't be aborted stays until `sweep`, and does no harm."""
    folder = make_folder(tmp_path / "new", LARGE)
    line.throttle["up"].rate = 20 << 20

    def break_down() -> None:
        while line.body_bytes("up", "PUT", "partNumber") < 8 << 20:
            time.sleep(0.01)
        line.refuse()
        line.drop()

    timer = later(0, break_down)
    complaint(lambda: put(store, folder, producer), store.uri, "can't write blobs/")
    timer.join()
    assert s3_place.objects() == {}
    # On a busy machine the request that begins one may itself have been repeated.
    begun = len(unfinished())
    assert begun >= 1
    line.throttle["up"].rate = 0
    line.listen()
    assert contents(store.fetch(put(store, folder, producer))) == contents(folder)
    assert store.sweep(0) == begun
    assert unfinished() == []


def test_refused_from_the_middle_of_a_download(store, line, tmp_path, producer):
    folder = make_folder(tmp_path / "new", LARGE)
    ref = put(store, folder, producer)
    line.throttle["down"].rate = 20 << 20

    def break_down() -> None:
        while line.body_bytes("down", "GET", "/blobs/") < 8 << 20:
            time.sleep(0.01)
        line.refuse()
        line.drop()

    timer = later(0, break_down)
    complaint(lambda: store.fetch(ref), store.uri, "can't read blobs/", "no answer from")
    timer.join()
    nothing_half(tmp_path / "cache")
    line.throttle["down"].rate = 0
    line.listen()
    assert contents(store.fetch(ref)) == contents(folder)


@pytest.mark.parametrize("times", [1, math.inf])
def test_hung_up_on(store, line: Wire, s3_place, tmp_path, folder, producer, times):
    ref = put(store, folder, producer)
    # One without connections in store: each that was reset would count as a try.
    store = impatient(s3_place.uri, line.endpoint, tmp_path / "other", 1, attempts=2)
    fault = line.arm("hang up", times=times)
    if times == 1:
        assert contents(store.fetch(ref)) == contents(folder)
        assert fault.struck == 1
    else:
        complaint(lambda: store.fetch(ref), store.uri, f"manifests/{ref.digest}")
        # The request was tried twice, and not again by what waits for a body.
        assert fault.struck == 2


def test_silence_is_waited_for_once(store, line, folder, producer):
    """A server that never answers is not retried by three nested loops."""
    ref = put(store, folder, producer)
    for path in ("/manifests/", "/blobs/"):
        fault = line.arm("stall", "down", where="message", method="GET", path=path, times=math.inf)
        begin = time.monotonic()
        complaint(
            lambda: store.fetch(ref),
            store.uri,
            f"no answer from {line.endpoint} (ReadTimeoutError)",
        )
        # Two tries of a second each for a manifest; for three blobs the cache makes it six.
        assert time.monotonic() - begin < 12
        assert fault.struck <= 2 * 3 * 3
        line.clear()
    assert contents(store.fetch(ref)) == contents(folder)


def test_busy_in_bursts(s3_place, s3_server, tmp_path, producer):
    """Every fourth request is refused."""
    folder = make_folder(tmp_path / "new", LARGE)
    with fault_proxy(s3_server.endpoint) as faults:
        store = impatient(s3_place.uri, faults.endpoint, tmp_path / "cache", 5, attempts=6)
        faults.refuse = lambda *_: (503, "SlowDown") if len(faults.seen) % 4 == 2 else None
        assert contents(store.fetch(put(store, folder, producer))) == contents(folder)


def test_busy_for_ever(s3_place, s3_server, tmp_path, producer, unfinished):
    folder = make_folder(tmp_path / "new", LARGE)
    with fault_proxy(s3_server.endpoint) as faults:
        store = impatient(s3_place.uri, faults.endpoint, tmp_path / "cache", 5, attempts=2)
        faults.refuse = lambda method, path, _: (
            (503, "SlowDown") if method in ("PUT", "GET") and "/blobs/" in path else None
        )
        for work in (
            lambda: put(store, folder, producer),
            lambda: store.fetch(put(s3_place.open(), folder, producer)),
        ):
            error = complaint(work, store.uri, "blobs/", "503", "SlowDown", "try again later")
            assert error.retriable
            assert unfinished() == []
        nothing_half(tmp_path / "cache")
        faults.refuse = lambda *_: None
        assert contents(store.fetch(put(store, folder, producer))) == contents(folder)
