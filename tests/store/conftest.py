"""Fixtures of the store's tests: stores in a folder and on a real S3 server.

`Store` itself is tested over a folder; the contract of its backends, and everything that
depends on S3, over both (`each_place`).
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from rlhf.store import Producer, Store, open_store
from tests.ceph import CephServer
from tests.servers import client_of
from tests.store.proxy import Faults, fault_proxy
from tests.store.wire import Wire, wire

BUCKET = "artifacts"
#: True if the tests connect over TLS; those with a proxy or a wire never do.
TLS = os.environ.get("RLHF_TEST_TLS") == "1"


class Place(Protocol):
    """Direct access to a store's objects, past the store's own code."""

    uri: str

    def open(self) -> Store: ...
    def read(self, key: str) -> bytes: ...
    def write(self, key: str, data: bytes) -> None: ...
    def remove(self, key: str) -> None: ...
    def objects(self) -> dict[str, Any]: ...


class Folder:
    """A store in a local folder."""

    def __init__(self, tmp_path: Path) -> None:
        self.root = tmp_path / "the store"
        self.uri = self.root.as_uri()
        self._cache = tmp_path / "cache"

    def open(self) -> Store:
        return open_store(self.uri, cache_dir=self._cache)

    def read(self, key: str) -> bytes:
        return (self.root / key).read_bytes()

    def write(self, key: str, data: bytes) -> None:
        (self.root / key).parent.mkdir(parents=True, exist_ok=True)
        (self.root / key).write_bytes(data)

    def remove(self, key: str) -> None:
        (self.root / key).unlink()

    def objects(self) -> dict[str, Any]:
        files = [path for path in self.root.rglob("*") if path.is_file()]
        return {p.relative_to(self.root).as_posix(): p.stat().st_mtime_ns for p in files}


class Bucket:
    """A store in a bucket of the test server, under a prefix of its own."""

    def __init__(self, tmp_path: Path, client: Any) -> None:
        self._client = client
        self._prefix = f"test/{uuid.uuid4().hex}"
        self.uri = f"s3://{BUCKET}/{self._prefix}"
        self._cache = tmp_path / "cache"

    def open(self) -> Store:
        return open_store(self.uri, cache_dir=self._cache)

    def read(self, key: str) -> bytes:
        return self._client.get_object(Bucket=BUCKET, Key=f"{self._prefix}/{key}")["Body"].read()

    def write(self, key: str, data: bytes) -> None:
        self._client.put_object(Bucket=BUCKET, Key=f"{self._prefix}/{key}", Body=data)

    def remove(self, key: str) -> None:
        self._client.delete_object(Bucket=BUCKET, Key=f"{self._prefix}/{key}")

    def objects(self) -> dict[str, Any]:
        pages = self._client.get_paginator("list_objects_v2").paginate(
            Bucket=BUCKET, Prefix=f"{self._prefix}/"
        )
        items = [item for page in pages for item in page.get("Contents", ())]
        return {i["Key"].removeprefix(f"{self._prefix}/"): i["LastModified"] for i in items}


@pytest.fixture(scope="session")
def s3_client(s3_server: CephServer) -> Iterator[Any]:
    """A boto3 client independent of the store's code; creates the bucket."""
    with client_of(s3_server, BUCKET) as client:
        yield client


@pytest.fixture
def s3_place(
    tmp_path: Path, s3_client: Any, s3_server: CephServer, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Bucket]:
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    if TLS:
        use_tls(s3_server, monkeypatch)
    bucket = Bucket(tmp_path, s3_client)
    yield bucket
    # The server keeps all in memory.
    for key in bucket.objects():
        bucket.remove(key)


def use_tls(server: CephServer, monkeypatch: pytest.MonkeyPatch) -> None:
    """Point the standard chain at the server's TLS port and self-signed certificate."""
    monkeypatch.setenv("AWS_ENDPOINT_URL", server.tls_endpoint)
    monkeypatch.setenv("AWS_CA_BUNDLE", server.ca_bundle)


@pytest.fixture
def folder_place(tmp_path: Path) -> Folder:
    return Folder(tmp_path)


@pytest.fixture
def place(folder_place: Folder) -> Place:
    return folder_place


@pytest.fixture
def store(place: Place) -> Store:
    return place.open()


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def each_place(request: pytest.FixtureRequest) -> Place:
    return request.getfixturevalue(f"{request.param}_place")


@pytest.fixture
def each_store(each_place: Place) -> Store:
    return each_place.open()


@pytest.fixture
def producer() -> Producer:
    return Producer(
        stage="train_sft",
        code_version="0.1.0",
        config={"learning_rate": 1e-3, "lora": None},
        seed=7,
        versions={"torch": "2.8.0"},
    )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A small model: two equal files, one nested, one empty."""
    root = tmp_path / "out"
    (root / "model").mkdir(parents=True)
    (root / "model" / "weights.safetensors").write_bytes(bytes(range(256)) * 40)
    (root / "model" / "copy.safetensors").write_bytes(bytes(range(256)) * 40)
    (root / "config.json").write_text('{"vocab": 61, "name": "größe"}', encoding="utf-8")
    (root / "empty.txt").touch()
    return root


@pytest.fixture(autouse=True)
def small_and_quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Use small parts and short retry pauses.

    Files of 20 MiB are uploaded in two parts; larger ones would only cost time and memory.
    """
    monkeypatch.setattr("rlhf.store.s3.PAUSE", 0.01)
    monkeypatch.setattr("rlhf.store.s3_reading.PAUSE", 0.01)
    monkeypatch.setattr("rlhf.store.s3._PART", 16 << 20)


@pytest.fixture
def line(s3_server: CephServer) -> Iterator[Wire]:
    """A wire to the server, for faults of connections."""
    with wire(s3_server.endpoint) as opened:
        yield opened


@pytest.fixture
def faults(s3_server: CephServer) -> Iterator[Faults]:
    """An HTTP proxy to the server, for refused requests and damaged bodies."""
    with fault_proxy(s3_server.endpoint) as opened:
        yield opened
