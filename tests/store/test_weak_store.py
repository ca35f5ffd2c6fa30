"""A server on which several writers of one name win: nothing is lost there either."""

from __future__ import annotations

import threading
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest

from rlhf.store import Store, coordination, open_store
from tests.servers import client_of
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
    assert weak.append("champion/x", {"policy": ref.digest}) == 1
    assert weak.latest("champion/x") == {"policy": ref.digest}
    assert weak._backend.list("claims/") == weak._backend.list("probe/") == {}


def test_writers_at_once_lose_nothing(weak):
    weak.check()
    line = threading.Barrier(6)

    def write(writer: int) -> int:
        line.wait()
        return weak.append("race", {"writer": writer})

    with ThreadPoolExecutor(6) as pool:
        numbers = list(pool.map(write, range(6)))
    assert sorted(numbers) == [1, 2, 3, 4, 5, 6]
    history = weak.history("race")
    assert [history[number - 1]["writer"] for number in numbers] == list(range(6))


def test_of_writers_that_decide_by_the_same_entry_one_wins(weak):
    line = threading.Barrier(6)

    def advance(writer: int) -> bool:
        line.wait()
        return weak.advance("champion/x", {"writer": writer}, 0)

    with ThreadPoolExecutor(6) as pool:
        won = list(pool.map(advance, range(6)))
    assert won.count(True) == 1
    assert weak.numbered("champion/x") == {1: {"writer": won.index(True)}}


def test_strong_server_is_not_slowed_down(s3_place, monkeypatch, caplog):
    monkeypatch.setattr(coordination, "_known", {})
    store = s3_place.open()
    store.check()
    assert coordination.is_atomic(store._backend) is True
    assert not caplog.records
    assert not s3_place.objects()
