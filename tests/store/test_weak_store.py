"""A server with weak conditional writes, and the probe that detects it."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf.config.pipeline import StoreConfig
from rlhf.store import Store, coordination, open_store
from rlhf.store.cache import Cache
from rlhf.store.s3 import S3Backend
from tests.servers import client_of
from tests.store.conftest import Place
from tests.store.objects import soon
from tests.store.test_artifacts import contents, put

pytestmark = pytest.mark.s3


@pytest.fixture
def weak(s3_weak_server, tmp_path, monkeypatch) -> Store:
    for name, value in s3_weak_server.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(coordination, "_known", {})
    bucket = f"weak-{uuid.uuid4().hex[:8]}"
    with client_of(s3_weak_server, bucket):
        return open_store(f"s3://{bucket}/store", cache_dir=tmp_path / "cache")


def test_weakness_is_named_once_and_artifacts_work(weak, folder, producer, caplog):
    weak.check()
    weak.check()
    (warning,) = [r for r in caplog.records if "weak conditional writes" in r.message]
    assert weak.uri in warning.getMessage()
    assert weak._backend.atomic is None  # of the probe's own client; ours finds it known
    assert coordination.is_atomic(weak._backend) is False
    ref = put(weak, folder, producer)
    assert contents(weak.fetch(ref)) == contents(folder)
    assert weak.history.append("champion/x", {"policy": ref.digest}) == 1
    assert weak.history.latest("champion/x") == {"policy": ref.digest}
    assert weak._backend.list("claims/") == weak._backend.list("probe/") == {}


def test_another_server_with_a_bucket_of_that_name_is_probed_too(
    weak, s3_server, tmp_path, monkeypatch
):
    bucket = weak.uri.removeprefix("s3://").partition("/")[0]
    with monkeypatch.context() as patch, client_of(s3_server, bucket):
        for name, value in s3_server.environment.items():
            patch.setenv(name, value)
        strong = open_store(weak.uri, cache_dir=tmp_path / "strong")
        assert strong.uri == weak.uri
        assert coordination.is_atomic(strong._backend) is True
    assert coordination.is_atomic(weak._backend) is False


def test_writers_at_once_lose_nothing(weak):
    weak.check()
    line = threading.Barrier(6)

    def write(writer: int) -> int:
        line.wait()
        return weak.history.append("race", {"writer": writer})

    with ThreadPoolExecutor(6) as pool:
        numbers = list(pool.map(write, range(6)))
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]
    history = weak.history.entries("race")
    assert [history[number - 1]["writer"] for number in numbers] == list(range(6))


def test_of_writers_that_decide_by_the_same_entry_one_wins(weak):
    line = threading.Barrier(6)

    def advance(writer: int) -> bool:
        line.wait()
        return weak.history.advance("champion/x", {"writer": writer}, 0)

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(advance, range(6)))
    assert won.count(True) == 1
    assert weak.history.numbered("champion/x") == {1: {"writer": won.index(True)}}


def test_two_overlapping_writes_win(weak):
    """By construction: the second write completes before the first one's body."""
    assert overlapping_winners(weak) == 2


def test_strong_server_is_not_slowed_down(s3_place, line, monkeypatch, caplog):
    monkeypatch.setattr(coordination, "_known", {})
    threads = {*threading.enumerate()}
    store = at(s3_place, line.endpoint)
    assert overlapping_winners(store) == 1
    store.check()
    assert coordination.is_atomic(store._backend) is True
    assert not caplog.records
    assert not s3_place.objects()
    store._backend.close()
    assert soon(lambda: not line.links)
    line.close()
    assert {*threading.enumerate()} <= threads


@pytest.mark.parametrize(
    "answer", [(409, "ConditionalRequestConflict"), (412, "PreconditionFailed")]
)
def test_refusal_of_the_first_write_is_strong(s3_place, faults, monkeypatch, caplog, answer):
    """AWS answers one of these to the write that was overtaken."""
    monkeypatch.setattr(coordination, "_known", {})
    complete = []

    def refuse(method: str, path: str, _: object) -> tuple[int, str] | None:
        if method != "PUT":
            return None
        # The proxy calls this when a body is complete: the held one is the second.
        complete.append(path)
        return answer if len(complete) == 2 else None

    faults.refuse = refuse
    assert coordination.is_atomic(at(s3_place, faults.endpoint)._backend)
    assert complete[0] == complete[1] != complete[2]
    assert not caplog.records
    assert not s3_place.objects()


def test_what_is_not_proven_strong_is_weak(s3_place, faults, monkeypatch, caplog):
    """Without "100 Continue" nothing proves which write came first."""
    monkeypatch.setattr(coordination, "_known", {})
    monkeypatch.setattr(coordination, "_PROBE_SECONDS", 0.1)
    monkeypatch.setattr(coordination, "ROUNDS", 1)
    faults.continues = False
    store = at(s3_place, faults.endpoint)
    assert not coordination.is_atomic(store._backend)
    assert ["could not be proven" in r.message for r in caplog.records] == [True]
    assert store.history.append("a", {"x": 1}) == 1
    assert store.history.entries("a") == [{"x": 1}]


def test_second_write_that_waits_for_the_first_ends_in_time(s3_place, faults, monkeypatch):
    """A server that locks the key: the first write goes on, and nothing is proven."""
    monkeypatch.setattr(coordination, "_HOLD_SECONDS", 0.2)
    first_is_complete = threading.Event()
    complete = []

    def wait(method: str, path: str, _: object) -> None:
        if method == "PUT":
            complete.append(path)
            if len(complete) == 1:
                assert first_is_complete.wait(20)
            first_is_complete.set()

    faults.refuse = wait
    assert coordination.overlapping_winners(at(s3_place, faults.endpoint)._backend) is None
    assert len(complete) == 2
    assert not s3_place.objects()


def overlapping_winners(store: Store) -> int | None:
    """Probe until the result is proven; a busy server may take too long for one."""
    for _ in range(20):
        if winners := coordination.overlapping_winners(store._backend):
            return winners
    return None


def at(place: Place, endpoint: str) -> Store:
    return Store(S3Backend(place.uri, StoreConfig(endpoint_url=endpoint)), Cache(Path("/nowhere")))
