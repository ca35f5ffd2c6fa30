"""Changing keys, wrong clocks, encryption at rest, and secrets in logs."""

from __future__ import annotations

import datetime
import json
import logging
import os
import sys

import botocore.auth
import pytest
import urllib3
from botocore.compat import get_current_datetime

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import StoreConfigError
from rlhf.store import open_store
from rlhf.store.redact import redact
from tests.ceph import CephServer
from tests.store.conftest import BUCKET
from tests.store.faulty import (
    LARGE,
    SECRETS,
    SMALL,
    complaint,
    impatient,
    make_folder,
    nothing_half,
    unfinished,
)
from tests.store.test_artifacts import contents, put

pytestmark = pytest.mark.s3
FIRST = {"AccessKeyId": CephServer.access_key, "SecretAccessKey": CephServer.secret_key}
SECOND = {
    "AccessKeyId": CephServer.second_access_key,
    "SecretAccessKey": CephServer.second_secret_key,
}


class Vault:
    """Keys that the `credential_process` of an AWS configuration file prints."""

    def __init__(self, folder) -> None:
        self.file = folder / "now.json"
        self.config = folder / "aws config"
        program = f"{sys.executable} -c 'print(open(\"{self.file}\").read())'"
        self.config.write_text(f"[default]\ncredential_process = {program}\n")
        self.give(FIRST)

    def give(self, keys: dict[str, str]) -> None:
        self.file.write_text(json.dumps({"Version": 1, **keys}))


@pytest.fixture
def vault(s3_place, tmp_path, monkeypatch):
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY"):
        monkeypatch.delenv(name)
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    vault = Vault(tmp_path)
    monkeypatch.setenv("AWS_CONFIG_FILE", str(vault.config))
    return vault


@pytest.fixture
def store(s3_place, faults, tmp_path):
    return impatient(s3_place.uri, faults.endpoint, tmp_path / "cache", 5)


def expire(faults, method: str, part: str, after: int, then=lambda: None) -> list[int]:
    """Refuse the first key after so many requests of a kind."""
    counts = [0, 0]

    def refuse(its_method: str, path: str, headers: dict[str, str]):
        counts[0] += its_method == method and part in path
        if counts[0] <= after or FIRST["AccessKeyId"] not in headers["Authorization"]:
            return None
        then()
        counts[1] += 1
        return (400, "ExpiredToken")

    faults.refuse = refuse
    return counts


@pytest.mark.parametrize(
    ("size", "part", "after"), [(SMALL, "/blobs/", 0), (LARGE, "partNumber", 1)]
)
def test_keys_that_expire_in_mid_transfer(
    store, vault, faults, s3_place, s3_client, tmp_path, producer, size, part, after
):
    folder = make_folder(tmp_path / "new", size)
    up = expire(faults, "PUT", part, after, lambda: vault.give(SECOND))
    ref = put(store, folder, producer)
    assert up[1] > 0
    assert unfinished(s3_client, s3_place.uri) == []
    vault.give(FIRST)
    other = impatient(s3_place.uri, faults.endpoint, tmp_path / "cache", 5)
    down = expire(faults, "GET", "/blobs/", after, lambda: vault.give(SECOND))
    assert contents(other.fetch(ref)) == contents(folder)
    assert down[1] > 0


def test_token_that_is_not_renewed(store, vault, faults, s3_place, tmp_path, producer):
    folder = make_folder(tmp_path / "new", LARGE)
    expire(faults, "PUT", "partNumber", 1)
    error = complaint(
        lambda: put(store, folder, producer), store.uri, "can't write blobs/",
        "the session token has expired", "check the AWS credentials",
    )  # fmt: skip
    assert not error.retriable
    assert s3_place.objects() == {}
    # Once there are fresh ones, the same client goes on.
    vault.give(SECOND)
    assert contents(store.fetch(put(store, folder, producer))) == contents(folder)


@pytest.mark.parametrize("minutes", [-16, 16])
def test_clock_that_is_wrong(s3_place, monkeypatch, folder, producer, minutes):
    store = s3_place.open()
    ref = put(store, folder, producer)
    offset = datetime.timedelta(minutes=minutes)
    with monkeypatch.context() as patch:
        patch.setattr(
            botocore.auth, "get_current_datetime", lambda *a: get_current_datetime(*a) + offset
        )
        for work in (lambda: store.fetch(ref), store.history.names, store.check):
            error = complaint(work, store.uri, "clock", "RequestTimeTooSkewed", "NTP")
            assert isinstance(error, StoreConfigError)
    assert contents(store.fetch(ref)) == contents(folder)


def test_rights_that_are_taken_away(store, faults, s3_client, s3_place, tmp_path, producer):
    """Rights are lost in mid-transfer; the next try, with them, succeeds."""
    folder = make_folder(tmp_path / "new", LARGE)
    faults.refuse = lambda _method, path, _: (
        (403, "AccessDenied") if "partNumber=2" in path else None
    )
    complaint(lambda: put(store, folder, producer), "can't write", "access denied", repr(BUCKET))
    assert unfinished(s3_client, s3_place.uri) == []
    faults.refuse = lambda *_: None
    ref = put(store, folder, producer)
    faults.refuse = lambda method, path, headers: (
        (403, "AccessDenied") if method == "GET" and "bytes=8388608" in str(headers) else None
    )
    complaint(lambda: store.fetch(ref), "can't read blobs/", "access denied", repr(BUCKET))
    nothing_half(tmp_path / "cache")
    faults.refuse = lambda *_: None
    assert contents(store.fetch(ref)) == contents(folder)


@pytest.mark.parametrize(("sse", "key"), [("AES256", None), ("aws:kms", "our-key"), (None, None)])
def test_encryption_at_rest_is_asked_for(s3_place, faults, tmp_path, producer, sse, key):
    """Check the request headers: Ceph refuses encryption over plain HTTP."""
    asked: dict[str, tuple[str | None, str | None]] = {}

    def record(method: str, path: str, headers: dict[str, str]) -> None:
        names = {name.lower(): value for name, value in headers.items()}
        begun = "x-amz-server-side-encryption"
        if (method == "PUT" and "partNumber" not in path) or path.endswith("uploads"):
            asked[path] = names.get(begun), names.get(f"{begun}-aws-kms-key-id")

    faults.refuse = record
    store = impatient(
        s3_place.uri, faults.endpoint, tmp_path / "cache", 5, sse=sse, sse_kms_key_id=key
    )
    for size in (SMALL, LARGE):
        folder = make_folder(tmp_path / str(size), size)
        if sse:
            work = lambda folder=folder: put(store, folder, producer)  # noqa: E731
            complaint(work, "can't write blobs/", "(InvalidRequest)", "sse")
        else:
            put(store, folder, producer)
    assert set(asked.values()) == {(sse, key)}
    assert len([path for path in asked if path.endswith("uploads")]) == 1


def test_encryption_that_is_ignored(s3_place, s3_server, tmp_path):
    """Ceph without a key server accepts AES256 over TLS, and stores plain bytes."""
    options = StoreConfig(
        endpoint_url=s3_server.tls_endpoint, ca_bundle=s3_server.ca_bundle, sse="AES256"
    )
    store = open_store(s3_place.uri, options=options, cache_dir=tmp_path / "cache")
    for work in (store.check, lambda: store.history.append("a", {})):
        error = complaint(work, store.uri, "does not say that it encrypts", "remove sse")
        assert not error.retriable


class Records(logging.Handler):
    """A handler that keeps all log records as text, with tracebacks."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(self.format(record))


@pytest.fixture
def logged():
    records, root = Records(), logging.getLogger()
    level = root.level
    root.addHandler(records)
    root.setLevel(logging.DEBUG)
    yield records.lines
    root.setLevel(level)
    root.removeHandler(records)


def test_debug_logs_hold_no_secrets(s3_place, s3_server, tmp_path, folder, producer, logged):
    (folder / "large.safetensors").write_bytes(os.urandom(17 << 20))
    store = open_store(s3_place.uri, cache_dir=tmp_path / "cache")
    signatures: list[str] = []
    client = store._backend._client
    client.meta.events.register(
        "before-send.s3", lambda request, **_: signatures.append(_signature(request.headers))
    )
    store.fetch(put(store, folder, producer))
    store.history.append("a", {})
    text = "\n".join(logged)
    assert "CanonicalRequest" in text
    assert len(signatures) > 10
    assert [each for each in signatures if each in text] == []
    assert [secret for secret in SECRETS if secret in text] == []
    assert "AWS4-HMAC-SHA256 Credential=" not in text


def test_session_token_is_not_logged(s3_place, faults, tmp_path, monkeypatch, logged):
    """Ceph ignores the token."""
    token = "a-session-token/which+is=secret=="
    monkeypatch.setenv("AWS_SESSION_TOKEN", token)
    store = impatient(s3_place.uri, faults.endpoint, tmp_path / "cache", 5)
    store.history.names()
    url = store._backend._client.generate_presigned_url(
        "get_object", Params={"Bucket": BUCKET, "Key": "x"}
    )
    monkeypatch.delenv("AWS_SESSION_TOKEN")
    logging.getLogger("rlhf.store").warning("this is %s", url)
    text = "\n".join(logged)
    assert "x-amz-security-token" in text.lower()
    for secret in (token, token.replace("/", "%2F").replace("+", "%2B").replace("=", "%3D")):
        assert secret not in text


def test_presigned_url_is_not_logged(s3_place, s3_server, logged):
    store = s3_place.open()
    store.history.append("a", {"x": 1})
    client, prefix = store._backend._client, s3_place.uri.removeprefix(f"s3://{BUCKET}/")
    url = client.generate_presigned_url(
        "get_object", Params={"Bucket": BUCKET, "Key": f"{prefix}/refs/a/000001.json"}
    )
    logging.getLogger("rlhf.store.some.child").info("fetching %s", {"url": url})
    with urllib3.PoolManager(ca_certs=s3_server.ca_bundle) as pool:
        assert b'"x":1' in pool.request("GET", url).data
    # Of version 2, which is boto3's choice for these without a region.
    signature = url.partition("&Signature=")[2].partition("&")[0]
    text = "\n".join(logged)
    assert len(signature) > 20
    assert "&Signature=***" in text
    assert signature not in text
    assert signature not in redact(url)


def _signature(headers) -> str:
    value = headers["Authorization"]
    text = value.decode() if isinstance(value, bytes) else value
    return text.rpartition("Signature=")[2]
