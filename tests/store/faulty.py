"""Helpers for tests of failing networks: impatient stores and cleanup checks."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import StoreError
from rlhf.store import Store
from rlhf.store.cache import Cache
from rlhf.store.s3 import S3Backend
from tests.ceph import CephServer
from tests.store.conftest import BUCKET

SMALL = 1 << 20
#: Two parts up, three ranges down.
LARGE = 20 << 20
SECRETS = (CephServer.secret_key, CephServer.second_secret_key, CephServer.other_secret_key)


def impatient(
    uri: str, endpoint: str, cache: Path, seconds: float = 1.0, attempts: int = 3, **options: Any
) -> Store:
    """Open an S3 store with this timeout in seconds."""
    chosen = StoreConfig(endpoint_url=endpoint, **options)
    backend = S3Backend(
        uri, chosen, connect_timeout=seconds, read_timeout=seconds, attempts=attempts
    )
    return Store(backend, Cache(cache))


def make_folder(path: Path, size: int) -> Path:
    """Make a folder with one file of random bytes."""
    path.mkdir()
    (path / "model.safetensors").write_bytes(os.urandom(size))
    return path


def complaint(work: Callable[[], object], *parts: str, within: float = 30) -> StoreError:
    """Return the StoreError that `work` raises, after the checks common to all."""
    begin = time.monotonic()
    with pytest.raises(StoreError) as caught:
        work()
    assert time.monotonic() - begin < within
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 500
    assert not any(secret in message for secret in SECRETS)
    for part in parts:
        assert part in message
    # After the semicolon: what to do about it.
    assert len(message.rpartition("; ")[2]) > 5
    assert caught.value.__cause__ is None
    return caught.value


def nothing_half(cache: Path) -> None:
    """Check that the cache holds no partial folder and no temporary file."""
    root = cache / "cache"
    assert [path for name in ("tmp", "locks") for path in (root / name).glob("*")] == []
    assert [path for path in (root / "artifacts").glob("*") if path.is_dir()] == []


def unfinished(client: Any, uri: str) -> list[str]:
    """Return the keys of multipart uploads neither completed nor aborted."""
    prefix = uri.removeprefix(f"s3://{BUCKET}/")
    answer = client.list_multipart_uploads(Bucket=BUCKET, Prefix=prefix)
    return [upload["Key"] for upload in answer.get("Uploads", ())]
