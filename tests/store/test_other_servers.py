"""Buckets and servers that differ from plain S3: found out, worked around, or said before work."""

from __future__ import annotations

import logging
import uuid

import pytest

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import StoreConfigError, StoreError
from rlhf.store import Store, open_store
from tests.store.faulty import LARGE, complaint, make_folder
from tests.store.test_artifacts import contents, put

pytestmark = pytest.mark.s3
#: What AWS says to a write into a bucket with object lock.
WANTED = (
    "Content-MD5 OR x-amz-checksum- HTTP header is required for Put Object requests with Object "
    "Lock parameters"
)


@pytest.fixture
def store(s3_place, faults, tmp_path) -> Store:
    options = StoreConfig(endpoint_url=faults.endpoint)
    return open_store(s3_place.uri, options=options, cache_dir=tmp_path / "cache")


@pytest.mark.parametrize("checks_first", [True, False])
def test_object_lock(faults, s3_place, s3_client, tmp_path, producer, folder, checks_first):
    """A real bucket with object lock, behind a proxy that asks for the digest as AWS does."""
    bucket = f"locked-{uuid.uuid4().hex[:8]}"
    s3_client.create_bucket(Bucket=bucket, ObjectLockEnabledForBucket=True)
    refusals = []

    def refuse(method: str, path: str, headers: dict[str, str]):
        if method != "PUT" or "Content-MD5" in headers:
            return None
        refusals.append(path)
        return (400, "InvalidRequest", WANTED)

    faults.refuse = refuse
    options = StoreConfig(endpoint_url=faults.endpoint)
    store = open_store(f"s3://{bucket}/x", options=options, cache_dir=tmp_path / "cache")
    if checks_first:
        store.check()
        assert len(refusals) == 1
    large = make_folder(tmp_path / "large", LARGE)
    assert contents(store.fetch(put(store, large, producer))) == contents(large)
    ref = put(store, folder, producer)
    assert contents(store.fetch(ref)) == contents(folder)
    assert [store.history.append("a", {"x": n}) for n in range(3)] == [1, 2, 3]
    assert store.child("checkpoints/x").history.append("b", {}) == 1
    if checks_first:
        assert len(refusals) == 1
    said = store._backend.versions()
    assert f"bucket {bucket} has versioning enabled" in said
    assert "object lock has ended" in said


@pytest.mark.parametrize(
    "answer",
    [
        (501, "NotImplemented", "POST ?delete is not implemented for objects."),  # Google
        (400, "MissingContentMD5", "Missing required header for this request: Content-Md5."),
        (400, "InvalidRequest", "Improper network request received."),
        (400, "MalformedXML"),
        (405, "MethodNotAllowed"),
    ],
    ids=lambda answer: answer[1],
)
def test_server_that_removes_one_by_one(store, s3_place, faults, folder, producer, answer):
    asked = []

    def refuse(method: str, path: str, _headers: dict[str, str]):
        if method == "POST" and "delete" in path:
            asked.append(path)
            return answer
        return None

    faults.refuse = refuse
    put(store, folder, producer)
    for _ in range(2):
        keys = [*s3_place.objects()]
        store._backend.delete(keys[:3])
        assert [*s3_place.objects()] == keys[3:]
    # Found out once, and known since.
    assert len(asked) == 1


def test_removals_that_are_refused(store, s3_place, faults, folder, producer):
    """One by one would not help against lacking rights, and nothing says `removed`."""
    ref = put(store, folder, producer)
    faults.refuse = lambda method, path, _: (
        (403, "AccessDenied") if method == "DELETE" or "delete" in path else None
    )
    complaint(lambda: store.delete(ref), "can't delete manifests/", "access denied")
    assert store.exists(ref)
    assert not any(method == "DELETE" for method, _ in faults.seen)
    store.check()  # a bucket that forbids deletion holds artifacts all the same


def test_removals_that_do_nothing_are_named(store, faults, caplog):
    faults.refuse = lambda method, path, _: 200 if method == "POST" and "delete" in path else None
    with caplog.at_level(logging.WARNING, "rlhf.store"):
        store.check()
    assert "says that it removed probe/" in caplog.text


@pytest.mark.parametrize(
    ("method", "part", "answer", "said"),
    [
        (
            "POST",
            "uploads",
            (501, "NotImplemented"),
            "no such function (NotImplemented); ",
        ),
        ("PUT", "partNumber", (413, ""), "no body this large"),
        ("POST", "uploadId", (500, "InternalError"), "500 InternalError"),
        ("PUT", "probe/", (403, "QuotaExceeded"), "is full"),
        ("GET", "list-type", (403, "AccessDenied"), "access denied"),
    ],
    ids=range(5),
)
def test_what_is_lacking_is_said_before_any_work(store, faults, method, part, answer, said):
    """As large files in parts: otherwise the first model to be published would show it."""
    faults.refuse = lambda its, path, _: answer if its == method and part in path else None
    with pytest.raises(StoreConfigError) as caught:
        store.check()
    assert said in str(caught.value)


def test_server_without_ranges(store, s3_place, faults, tmp_path):
    """It would answer each range by the whole file."""
    faults.without = "Range"
    with pytest.raises(StoreConfigError, match="can't read probe/"):
        store.check()


@pytest.mark.parametrize(("status", "code"), [(400, "InvalidArgument"), (501, "NotImplemented")])
def test_server_without_conditions(store, faults, folder, producer, caplog, status, code):
    """Names are claimed then; without the probe a writer could replace another's entry."""
    faults.refuse = lambda _method, _path, headers: (
        (status, code) if "If-None-Match" in headers else None
    )
    with caplog.at_level(logging.WARNING, "rlhf.store"):
        store.check()
    assert "names are claimed before they are written" in caplog.text
    ref = put(store, folder, producer)
    assert put(store, folder, producer) == ref
    assert [store.history.append("a", {}) for _ in range(2)] == [1, 2]
    assert store._backend.put_new("refs/a/000002.json", b"other") is False


@pytest.mark.parametrize("status", [400, 501])
def test_a_proven_server_never_loses_its_conditions(store, faults, status):
    """A refusal of one write is no reason to replace what others wrote."""
    assert store.history.append("a", {}) == 1
    faults.refuse = lambda _method, _path, headers: (
        (status, "NotImplemented") if "If-None-Match" in headers else None
    )
    with pytest.raises(StoreError, match="no such function"):
        store.history.append("a", {})
    faults.refuse = lambda *_: None
    assert store.history.append("a", {}) == 2
    assert store._backend.atomic is True


def test_archived_objects(store, faults, tmp_path, folder, producer, s3_place):
    """Named by `verify` and before a stage relies on them; sent again if they are made again."""
    ref = put(store, folder, producer)
    classes = {"x-amz-storage-class": "GLACIER"}
    is_archived = [True]
    faults.headers = lambda _, path: classes if "/blobs/" in path and is_archived[0] else {}
    faults.refuse = lambda method, path, _: (
        (403, "InvalidObjectState") if method == "GET" and "/blobs/" in path else None
    )
    lines = store.problems(ref)
    assert len(lines) == len({entry.sha256 for entry in store.manifest(ref).files})
    assert all("is archived and can't be read; restore it" in line for line in lines)
    with pytest.raises(StoreConfigError, match="is archived"):
        store.exists(ref)
    complaint(lambda: store.fetch(ref), "can't read blobs/", "archived", "restore-object")
    faults.seen.clear()
    assert put(store, folder, producer) == ref
    sent = [path for method, path in faults.seen if method == "PUT" and "/blobs/" in path]
    assert len({*sent}) == len(lines)
    # A copy that was restored can be read.
    faults.refuse = lambda *_: None
    classes["x-amz-restore"] = 'ongoing-request="true"'
    assert store.problems(ref) == lines
    classes["x-amz-restore"] = 'ongoing-request="false", expiry-date="Fri, 21 Dec 2035 00:00:00"'
    assert store.problems(ref) == []
    assert store.exists(ref)
    assert contents(store.fetch(ref)) == contents(folder)


def test_tls_is_told_apart(s3_place, s3_server, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    plain = s3_server.endpoint.replace("http:", "https:")
    other = s3_server.tls_endpoint.replace("127.0.0.1", "localhost")
    for endpoint, said in (
        (plain, "does not speak TLS there; write http://"),
        (other, "certificate for another name; use that name"),
        (s3_server.tls_endpoint, "does not prove its identity (TLS); set ca_bundle"),
    ):
        bundle = s3_server.ca_bundle if endpoint == other else None
        options = StoreConfig(endpoint_url=endpoint, ca_bundle=bundle)
        store = open_store(s3_place.uri, options=options, cache_dir=tmp_path)
        complaint(store.check, endpoint, said)
