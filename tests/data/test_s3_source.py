"""Data sources in object storage, read from a real S3 server."""

from __future__ import annotations

import gzip
import json
import uuid
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.prepare import prepare_data
from rlhf.data.sources import source_digest
from rlhf.errors import ArtifactMissing, ConfigError, DataError, StoreConfigError, StoreError
from rlhf.store.s3 import S3Backend
from tests.ceph import CephServer, free_ports
from tests.data.helpers import digest, message, read, rows
from tests.servers import client_of

BUCKET = "sources"
LINES = "".join(json.dumps(row) + "\n" for row in rows()).encode()
pytestmark = pytest.mark.s3


@pytest.fixture(scope="module")
def client(s3_server: CephServer) -> Iterator[Any]:
    with client_of(s3_server, BUCKET) as client:
        yield client


@pytest.fixture
def put(client: Any, s3_server: CephServer, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """Writes an object below a prefix of the test's own and returns the prefix's URI."""
    for name, value in s3_server.environment.items():
        monkeypatch.setenv(name, value)
    prefix = uuid.uuid4().hex

    def write(name: str = "", data: bytes = LINES) -> str:
        if name:
            client.put_object(Bucket=BUCKET, Key=f"{prefix}/{name}", Body=data)
        return f"s3://{BUCKET}/{prefix}"

    return write


def test_one_object(put):
    put("other.jsonl", b"broken")
    put("pairs.jsonl.copy.jsonl", b"broken")
    assert read(put("pairs.jsonl") + "/pairs.jsonl") == rows()
    assert read(put("ü b+c%20 .jsonl.gz", gzip.compress(LINES)) + "/ü b+c%20 .jsonl.gz") == rows()


def test_all_objects_under_a_prefix(put):
    data = rows(3)
    for name, row in (("b.jsonl", data[1]), ("a.jsonl", data[0]), ("c/a.jsonl", data[2])):
        put(f"train/{name}", json.dumps(row).encode())
    put("train-old/a.jsonl", b"broken")
    put("train/", b"")
    put("train/.tmp/x.jsonl", b"broken")
    put("train/README.md", b"notes")
    for uri in (put() + "/train", put() + "/train/"):
        assert read(uri) == data


def test_a_whole_bucket(client, put):
    put()
    client.create_bucket(Bucket="whole-bucket")
    client.put_object(Bucket="whole-bucket", Key="a.jsonl", Body=LINES)
    assert read("s3://whole-bucket") == read("s3://whole-bucket/") == rows()


def test_a_large_object_of_many_parts(put):
    long = {"prompt": "p", "chosen": "x" * 40_000_000, "rejected": "r"}
    assert read(put("big.jsonl", json.dumps(long).encode()), max_row_mb=64) == [long]


def test_options_of_the_store_are_used(put, s3_server, monkeypatch):
    uri = put("a.jsonl")
    monkeypatch.delenv("AWS_ENDPOINT_URL")
    options = StoreConfig(endpoint_url=s3_server.tls_endpoint, ca_bundle=s3_server.ca_bundle)
    assert read(uri, options) == rows()


def test_identity_follows_content_size_and_names(put):
    uri = put("a.jsonl")
    first = digest(uri)
    put("notes.txt", b"no part of the data")
    put("a.jsonl")
    assert digest(uri) == first == digest(uri + "/")
    put("a.jsonl", LINES.replace(b"good", b"best"))
    changed = digest(uri)
    assert changed != first
    put("b.jsonl")
    assert digest(uri) not in (first, changed)


def test_prepare_data_from_s3(put, tmp_path):
    uri = put("a.jsonl", "".join(json.dumps(row) + "\n" for row in rows(20)).encode())
    metrics = prepare_data(DataConfig(source=uri), tmp_path).metrics
    assert (metrics["source"], metrics["pairs_train"], metrics["pairs_eval"]) == (uri, 17, 3)


@pytest.mark.parametrize("call", [read, digest])
def test_missing_bucket_and_key(put, call):
    put()
    assert message(StoreConfigError, call, "s3://no-such-bucket/a.jsonl") == (
        "data.source = 's3://no-such-bucket/a.jsonl': can't list a.jsonl: there is no bucket "
        "'no-such-bucket'; create it or correct the URI"
    )
    uri = put("pairs.jsonl") + "/pair"
    assert message(ConfigError, call, uri) == (
        f"data.source = {uri!r}: bucket 'sources' holds no object of this name, and none under "
        "it; correct the key"
    )


@pytest.mark.parametrize("call", [read, digest])
def test_nothing_to_read_and_mixed_formats(put, call):
    uri = put("README.md", b"x")
    assert "holds no file that can be read" in message(ConfigError, call, uri)
    put("a.csv")
    uri = put("a.jsonl")
    text = f"data.source = {uri!r}: mixes .csv, .jsonl; keep one format"
    assert message(ConfigError, call, uri) == text


def test_broken_and_empty_objects_name_the_key(put, tmp_path):
    uri = put("a.jsonl", b"\xff")
    key = uri.removeprefix(f"s3://{BUCKET}/") + "/a.jsonl"
    assert f"can't be parsed ({key}: line 1: not UTF-8" in message(DataError, read, uri)
    put("a.jsonl", b"")
    config = DataConfig(source=uri)
    text = message(DataError, prepare_data, config, tmp_path)
    assert text.endswith("holds no rows; give a file with pairs")
    put("a.jsonl", b'{"q": 1}')
    assert f"(in {key};" in message(ConfigError, prepare_data, config, tmp_path)


@pytest.mark.parametrize("call", [read, digest])
def test_denied(put, call, s3_server, monkeypatch):
    uri = put("a.jsonl")
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.other_access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.other_secret_key)
    text = message(StoreConfigError, call, uri)
    assert text.startswith(f"data.source = {uri!r}: can't list ")
    assert "access denied (AccessDenied); check the AWS credentials" in text


@pytest.mark.parametrize("call", [read, digest])
def test_unreachable_can_be_tried_again(put, call, monkeypatch):
    uri = put("a.jsonl")
    (port,) = free_ports(1)
    monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
    text = message(StoreError, call, uri)
    assert text.startswith(f"data.source = {uri!r}: can't list ")
    assert f"no answer from http://127.0.0.1:{port}" in text


def test_options_that_no_client_can_have(put):
    put()
    config, options = DataConfig(source="s3://b/a.jsonl"), StoreConfig(profile="no-such-profile")
    calls = (lambda: read(config.source, options), lambda: source_digest(config, options))
    for call in calls:
        text = message(StoreConfigError, call)
        assert text.startswith("data.source = 's3://b/a.jsonl': can't open: ")
        assert "no-such-profile" in text


def test_object_that_goes_away_while_it_is_read(put, client, monkeypatch):
    uri = put("a.jsonl")
    key = uri.removeprefix(f"s3://{BUCKET}/") + "/a.jsonl"
    download = S3Backend.get_file

    def late(self, name, path):
        client.delete_object(Bucket=BUCKET, Key=key)
        download(self, name, path)

    monkeypatch.setattr(S3Backend, "get_file", late)
    expected = f"data.source = {uri!r}: there is no {key}"
    assert message(ArtifactMissing, read, uri) == expected
