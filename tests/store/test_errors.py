"""Errors of unusable stores: one line, quickly, without secrets."""

from __future__ import annotations

import contextlib
import os
import pickle
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import ConfigError, StoreConfigError, StoreError
from rlhf.store import open_store
from rlhf.store import store as store_module
from tests.ceph import CephServer, free_ports
from tests.store.conftest import BUCKET
from tests.store.test_artifacts import put

# Linux's file that is always full.
FULL = Path("/dev/full")
SECRETS = ("a-secret-that-is-wrong", CephServer.secret_key, CephServer.other_secret_key)


def problem(uri: str, cache: Path, options: StoreConfig | None = None) -> str:
    """Return the message of `check`, after checks that hold for each."""
    with pytest.raises(StoreConfigError) as caught:
        open_store(uri, options=options, cache_dir=cache).check()
    message = str(caught.value)
    assert isinstance(caught.value, ConfigError)
    assert not caught.value.retriable
    assert "\n" not in message
    assert not any(secret in message for secret in SECRETS)
    assert len(message) < 400
    assert str(pickle.loads(pickle.dumps(caught.value))) == message
    return message


def test_check_leaves_nothing(each_place, each_store):
    each_store.check()
    assert each_place.objects() == {}


def test_opening_does_nothing(tmp_path):
    store = open_store(str(tmp_path / "store"), cache_dir=tmp_path / "cache")
    assert store.uri == (tmp_path / "store").as_uri()
    assert list(tmp_path.iterdir()) == []


def test_relative_path_and_home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    expected = (tmp_path / "a b").as_uri()
    for uri in ("a b", "./a b", "~/a b", expected, f"{tmp_path}/x/../a b"):
        assert open_store(uri, cache_dir=tmp_path).uri == expected


@pytest.mark.parametrize(
    "uri", ["", "gs://bucket", "s3://", "s3:///x", "file://host/x", "file://", "~no.such.user/x"]
)
def test_unknown_uri(tmp_path, uri):
    with pytest.raises(StoreConfigError, match=r"^(the store's URI|store = ).*; (write|use) "):
        open_store(uri, cache_dir=tmp_path)


def test_user_info_is_refused_and_not_repeated(tmp_path):
    with pytest.raises(StoreConfigError) as caught:
        open_store("s3://key:hunter2@bucket/prefix", cache_dir=tmp_path)
    assert "hunter2" not in str(caught.value)


def test_file_where_the_folder_should_be(tmp_path):
    (tmp_path / "file").write_text("")
    for name in ("file", "file/below"):
        message = problem(str(tmp_path / name), tmp_path / "cache")
        assert (tmp_path / name).as_uri() in message
        assert "Not a directory" in message
        assert "make" in message


def test_unwritable_folder(tmp_path):
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o555)
    root = os.geteuid() == 0
    try:
        if root:
            os.seteuid(65534)
        message = problem(str(locked / "store"), tmp_path / "cache")
    finally:
        if root:
            os.seteuid(0)
    assert "Permission denied" in message
    assert "this user can write" in message


def test_unreachable_endpoint(s3_place, tmp_path):
    (port,) = free_ports(1)
    options = StoreConfig(endpoint_url=f"http://127.0.0.1:{port}")
    begin = time.monotonic()
    message = problem("s3://bucket/prefix", tmp_path, options)
    assert time.monotonic() - begin < 15
    assert "s3://bucket/prefix" in message
    assert f"no answer from http://127.0.0.1:{port}" in message
    # In the middle of a run the same may heal: worth a retry.
    with pytest.raises(StoreError) as caught:
        open_store("s3://bucket/prefix", options=options, cache_dir=tmp_path).history.names()
    assert caught.value.retriable
    assert not isinstance(caught.value, StoreConfigError)


@pytest.mark.parametrize("waiting", [0, 2])
def test_silent_endpoint(s3_place, tmp_path, waiting, monkeypatch):
    """The server connects but never answers, or does not even connect (full queue)."""
    # Two tries of 1 s; an ordinary client makes five, of 10 s to connect and 60 s to read each.
    assert store_module._PROBE_SECONDS == 5
    monkeypatch.setattr(store_module, "_PROBE_SECONDS", 1)
    with contextlib.ExitStack() as stack:
        server = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(waiting):
            queued = stack.enter_context(socket.socket())
            queued.setblocking(False)
            queued.connect_ex(server.getsockname())
        begin = time.monotonic()
        endpoint = f"http://127.0.0.1:{server.getsockname()[1]}"
        message = problem("s3://bucket/prefix", tmp_path, StoreConfig(endpoint_url=endpoint))
    assert f"no answer from {endpoint}" in message
    assert time.monotonic() - begin < 40


def test_missing_bucket(s3_place, tmp_path):
    message = problem("s3://no-such-bucket/prefix", tmp_path)
    assert "there is no bucket 'no-such-bucket'; create it" in message


def test_wrong_keys(s3_place, s3_server, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "a-secret-that-is-wrong")
    assert "the secret key does not belong" in problem(s3_place.uri, tmp_path)
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "NOBODY")
    assert "does not know this access key" in problem(s3_place.uri, tmp_path)


def test_foreign_bucket(s3_place, s3_server, tmp_path, monkeypatch):
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", s3_server.other_access_key)
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", s3_server.other_secret_key)
    message = problem(s3_place.uri, tmp_path)
    assert "access denied" in message
    assert repr(BUCKET) in message


def test_no_credentials(s3_place, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.delenv("AWS_SECRET_ACCESS_KEY")
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(StoreConfigError, match="no AWS credentials; set AWS_ACCESS_KEY_ID"):
        s3_place.open().check()


@pytest.mark.parametrize(
    ("uri", "options", "reason"),
    [
        ("s3://bucket", {"profile": "nobody"}, "nobody"),
        ("s3://bucket", {"ca_bundle": "/nowhere.pem"}, "ca_bundle /nowhere.pem is not a file"),
        ("s3://not a bucket", {}, "names a bucket that can't be one"),
    ],
)
def test_unusable_options(s3_place, tmp_path, uri, options, reason):
    assert reason in problem(uri, tmp_path, StoreConfig(**options))


def test_encrypted_connection(s3_place, s3_server, folder, producer, tmp_path, monkeypatch):
    monkeypatch.delenv("AWS_CA_BUNDLE", raising=False)
    uri, endpoint = s3_place.uri, s3_server.tls_endpoint
    assert "TLS" in problem(uri, tmp_path, StoreConfig(endpoint_url=endpoint))
    options = StoreConfig(endpoint_url=endpoint, ca_bundle=s3_server.ca_bundle)
    store = open_store(uri, options=options, cache_dir=tmp_path / "cache")
    store.check()
    (folder / "large.safetensors").write_bytes(os.urandom(9 << 20))
    assert (store.fetch(put(store, folder, producer)) / "large.safetensors").exists()


def test_folder_needs_no_boto3_and_no_torch():
    heavy = ("boto3", "botocore", "torch", "prefect", "transformers")
    code = (
        "import sys, pathlib; from rlhf.store import open_store; "
        "open_store('/tmp/none', cache_dir=pathlib.Path('/tmp/none')); "
        f"print([name for name in {heavy} if name in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
