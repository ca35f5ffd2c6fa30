"""Garbage collection, alone and beside publishers."""

from __future__ import annotations

import os
import threading
import time
from pathlib import Path

import pytest

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import ArtifactCorrupt, ArtifactMissing, ConfigError
from rlhf.store import open_store
from rlhf.store import publish as publish_module
from rlhf.store.gc import GRACE
from rlhf.store.retention import ABANDONED
from tests.store.test_artifacts import blobs, put

DAY = 24 * 3600.0


@pytest.fixture
def age(folder_place):
    """A function that makes files of the folder older by so many seconds."""

    def make_older(seconds: float, part: str = "") -> None:
        for path in (p for p in folder_place.root.rglob("*") if p.is_file() and part in str(p)):
            then = path.stat().st_mtime - seconds
            os.utime(path, (then, then))

    return make_older


def change(folder: Path, text: str) -> None:
    (folder / "config.json").write_text(text)


def test_only_what_nothing_leads_to_goes(folder_place, folder, producer, age):
    place, store = folder_place, folder_place.open()
    data = put(store, folder, producer)
    change(folder, "1")
    policy = put(store, folder, producer, data=data)
    change(folder, "2")
    pinned = put(store, folder, producer)
    change(folder, "3")
    orphan = put(store, folder, producer, data=data)
    store.history.append("champion/default", {"policy": policy.digest})
    store.pins.add("keep", pinned)
    age(2 * DAY)
    change(folder, "4")
    young = put(store, folder, producer)
    before = place.objects()
    garbage = store.collect()
    assert (garbage.artifacts, garbage.kept, garbage.removed) == ([orphan.digest], 4, False)
    assert place.objects() == before
    # Its manifest and its own config.json; the weights are those of the others too.
    size = place.objects, (place.root / f"manifests/{orphan.digest}.json").stat().st_size
    assert (len(garbage.keys), garbage.size) == (2, size[1] + 1)
    garbage = store.collect(dry_run=False)
    assert garbage.removed
    assert set(before) - set(place.objects()) == set(garbage.keys)
    for ref in (data, policy, pinned, young):
        assert store.problems(ref, deep=True) == []
    assert not store.exists(orphan)
    assert store.collect().keys == []
    store.pins.remove("keep")
    age(2 * DAY, pinned.digest)
    assert store.collect().artifacts == [pinned.digest]


def test_records_keep_artifacts(each_place, each_store, folder, producer):
    recorded = put(each_store, folder, producer)
    each_store.history.append("records/train-sft/" + "0" * 64, recorded.model_dump(mode="json"))
    change(folder, "other")
    orphan = put(each_store, folder, producer)
    time.sleep(2.1)  # S3 tells seconds
    garbage = each_store.collect(grace=0.0, dry_run=False)
    assert garbage.artifacts == [orphan.digest]
    assert each_store.problems(recorded, deep=True) == []
    assert len(blobs(each_place)) == 3
    # Only the trace of the collection, for publishers to see.
    left = [key for key in each_place.objects() if key.startswith(("gc/", "probe/"))]
    assert [key.rpartition(".")[2] for key in left] == ["ended"]


def test_grace_is_measured_by_the_stores_clock(folder_place, folder, producer, age):
    """New objects count as new even if the store's clock is days behind."""
    store = folder_place.open()
    put(store, folder, producer)
    backend, real = store._backend, store._backend.put

    def put_behind(key, data):
        real(key, data)
        then = time.time() - 3 * DAY
        os.utime(folder_place.root / key, (then, then))

    backend.put = put_behind
    age(3 * DAY)
    assert store.collect().keys == []
    age(GRACE + 60)
    assert len(store.collect().keys) == 4


def test_manifest_that_can_not_be_read_stops_it(folder_place, folder, producer, age):
    store = folder_place.open()
    ref = put(store, folder, producer)
    store.history.append("champion/default", {"policy": ref.digest})
    age(2 * DAY)
    folder_place.write(f"manifests/{ref.digest}.json", b"{}")
    before = set(folder_place.objects())
    with pytest.raises(ArtifactCorrupt, match=ref.digest):
        store.collect(dry_run=False)
    assert before <= set(folder_place.objects())


def test_traces_and_checkpoints(folder_place, age):
    store = folder_place.open()
    done, going = "train-policy-" + "a" * 16, "train-policy-" + "b" * 16
    store.history.append("records/train-policy/" + "a" * 64, {})
    for key in ("probe/1", "claims/x/1", "gc/1.json", f"checkpoints/{done}/blobs/1",
                f"checkpoints/{going}/blobs/1"):  # fmt: skip
        folder_place.write(key, b"x")
    folder_place.write("tmp/left", b"half")
    assert store.collect().keys == []
    age(2 * DAY, "/checkpoints/")
    age(2 * DAY, "/probe/")
    age(2 * DAY, "/claims/")
    age(2 * DAY, "/gc/")
    age(2 * DAY, "/tmp/")
    garbage = store.collect(dry_run=False)
    assert set(garbage.keys) == {
        "probe/1",
        "claims/x/1",
        "gc/1.json",
        f"checkpoints/{done}/blobs/1",
    }
    assert garbage.uploads == 1
    age(ABANDONED, "/checkpoints/")
    assert store.collect().keys == [f"checkpoints/{going}/blobs/1"]


def test_collection_between_the_look_and_the_manifest(
    folder_place, folder, producer, age, monkeypatch
):
    """Old blobs, which the publisher did not send again, are collected meanwhile."""
    store, collector = folder_place.open(), folder_place.open()
    store.delete(put(store, folder, producer))
    age(2 * DAY)
    real = publish_module._put_manifest
    removed = []

    def late(*args):
        removed.append(collector.collect(dry_run=False).keys)
        real(*args)

    monkeypatch.setattr(publish_module, "_put_manifest", late)
    ref = put(store, folder, producer)
    assert len(removed[0]) == 3
    assert store.problems(ref, deep=True) == []


def test_publisher_waits_for_a_collection_that_did_not_see_it(
    folder_place, folder, producer, age, caplog
):
    """The collection listed before the manifest was written, and removes after it."""
    caplog.set_level("INFO", "rlhf")
    store, collector = folder_place.open(), folder_place.open()
    store.delete(put(store, folder, producer))
    age(2 * DAY)
    looked, go_on = threading.Event(), threading.Event()
    real = collector._backend.delete

    def slow(keys):
        looked.set()
        assert go_on.wait(30)
        real(keys)

    collector._backend.delete = slow
    collecting = threading.Thread(target=lambda: collector.collect(dry_run=False))
    collecting.start()
    assert looked.wait(30)
    refs = []
    publishing = threading.Thread(target=lambda: refs.append(put(store, folder, producer)))
    publishing.start()
    end = time.monotonic() + 30
    while not any("waiting for it" in message for message in caplog.messages):
        assert time.monotonic() < end
        time.sleep(0.01)
    assert refs == []
    go_on.set()
    collecting.join()
    publishing.join()
    assert store.problems(refs[0], deep=True) == []


def test_old_manifest_is_made_young_when_published_again(folder_place, folder, producer, age):
    """Otherwise it could be collected before its record is written."""
    store = folder_place.open()
    ref = put(store, folder, producer)
    age(2 * DAY)
    assert store.collect().artifacts == [ref.digest]
    assert put(store, folder, producer) == ref
    assert store.collect().keys == []


def test_pins(store, folder, producer):
    ref = put(store, folder, producer)
    change(folder, "other")
    other = put(store, folder, producer)
    store.pins.add("good", ref)
    store.pins.add("good", ref)
    assert store.pins.by_name() == {"good": ref.digest}
    assert store.resolve("good") == ref
    with pytest.raises(ConfigError, match=r"pin 'good' is that of .*choose another name"):
        store.pins.add("good", other)
    for name in ("", "a/b", "../x", "abcdef", "x" * 129):
        with pytest.raises(ConfigError, match="not valid"):
            store.pins.add(name, ref)
    store.pins.remove("good")
    with pytest.raises(OSError, match="no pin 'good'"):
        store.pins.remove("good")
    assert store.pins.by_name() == {}


def test_problems_name_every_blob(place, store, folder, producer):
    ref = put(store, folder, producer)
    assert store.problems(ref) == store.problems(ref, deep=True) == []
    config, empty, _, weights = store.manifest(ref).files
    keys = {e.path: f"blobs/sha256/{e.sha256[:2]}/{e.sha256}" for e in (config, empty, weights)}
    place.write(keys[config.path], b"x" * config.size)
    place.remove(keys[empty.path])
    place.write(keys[weights.path], b"short")
    (missing, short) = store.problems(ref)
    assert missing == f"{store.uri}: {keys['empty.txt']} (empty.txt) is missing"
    assert short.endswith("has 5 bytes instead of 10240")
    flipped, *rest = store.problems(ref, deep=True)
    assert "(config.json) does not have the sha256" in flipped
    assert rest == [missing, short]
    store.delete(ref)
    (gone,) = store.problems(ref)
    assert "there is no manifests/" in gone


def test_a_listing_with_a_flipped_bit_removes_nothing(folder_place, folder, producer, age):
    """One answer of the server holds a damaged key or date."""
    store = folder_place.open()
    ref = put(store, folder, producer)
    store.history.append("champion/default", {"policy": ref.digest})
    store.pins.add("good", ref)
    age(2 * DAY)
    change(folder, "young")
    young = put(store, folder, producer)
    before = set(folder_place.objects())
    backend, real_list, real_find = store._backend, store._backend.list, store._backend.find
    calls = 0

    def flipped_key(prefix):
        nonlocal calls
        calls += 1
        listed = real_list(prefix)
        return {(k[:-7] + "~" + k[-6:] if calls == bad else k): f for k, f in listed.items()}

    def flipped_date(prefix):
        nonlocal calls
        calls += 1
        listed = real_list(prefix)
        return {k: f._replace(age=f.age + 9e8) if calls == bad else f for k, f in listed.items()}

    for flipped in (flipped_key, flipped_date):
        backend.list = flipped
        for bad in range(1, 10):  # noqa: B007  (it is what `flipped` looks at)
            calls = 0
            store.collect(dry_run=False)
            assert {k for k in folder_place.objects() if not k.startswith("gc/")} == before
            for each in (ref, young):
                assert store.problems(each) == []
    backend.list = real_list
    finds = []

    def flipped_find(key):
        finds.append(key)
        info = real_find(key)
        return info._replace(age=info.age - 9e8) if info and len(finds) == 1 else info

    backend.find = flipped_find
    store.collect(dry_run=False)
    backend.find = real_find
    assert store.problems(young) == []


def test_parent_that_was_collected_is_named(folder_place, folder, producer, age, monkeypatch):
    store, collector = folder_place.open(), folder_place.open()
    parent = put(store, folder, producer)
    age(2 * DAY)
    change(folder, "child")
    real = publish_module._put_manifest

    def late(*args):
        collector.collect(dry_run=False)
        real(*args)

    monkeypatch.setattr(publish_module, "_put_manifest", late)
    with pytest.raises(ArtifactMissing, match=f"base {parent.short} was collected as garbage"):
        put(store, folder, producer, base=parent)


@pytest.mark.s3
@pytest.mark.parametrize("status", [None, "Enabled", "Suspended"])
def test_a_bucket_that_keeps_versions_is_named(s3_place, s3_client, tmp_path, producer, status):
    """`removed` would not be the truth."""
    bucket = f"versions-{status}".lower()
    s3_client.create_bucket(Bucket=bucket)
    if status:
        s3_client.put_bucket_versioning(Bucket=bucket, VersioningConfiguration={"Status": status})
    store = open_store(f"s3://{bucket}/x", cache_dir=tmp_path / "cache")
    (tmp_path / "new").mkdir()
    (tmp_path / "new/a.json").write_text("{}")
    ref = put(store, tmp_path / "new", producer)
    time.sleep(2.1)  # S3 tells seconds
    garbage = store.collect(grace=0.0, dry_run=False)
    assert garbage.artifacts == [ref.digest]
    versions = s3_client.list_object_versions(Bucket=bucket, Prefix="x/blobs/").get("Versions", [])
    assert len(versions) == (status == "Enabled")
    if status is None:
        assert garbage.versions == ""
    else:
        assert f"bucket {bucket} has versioning {status.lower()}" in garbage.versions
        assert "NoncurrentVersionExpiration" in garbage.versions


@pytest.mark.s3
def test_versions_that_may_not_be_read(s3_place, faults, tmp_path):
    options = StoreConfig(endpoint_url=faults.endpoint)
    store = open_store(s3_place.uri, options=options, cache_dir=tmp_path)
    answers = {"AccessDenied": 403, "NotImplemented": 501}
    said = []
    for code, status in answers.items():
        faults.refuse = lambda _, path, __, a=(status, code): a if "versioning" in path else None
        said.append(store.collect().versions)
    assert "s3:GetBucketVersioning" in said[0]
    assert said[1] == ""
