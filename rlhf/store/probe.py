"""The probe of a store: what is needed of it is tried before any work depends on it.

What it finds out about a server is used from then on: whether conditional writes are atomic
(`coordination`), whether writes need a checksum in their head, whether many objects can be removed
at once (`s3`).
"""

from __future__ import annotations

import logging
import tempfile
import uuid

from rlhf.errors import StoreConfigError, StoreError
from rlhf.store.coordination import PROBES, is_atomic
from rlhf.store.manifest import sha256_bytes
from rlhf.store.objects import Backend, Sink, Source

log = logging.getLogger("rlhf.store")
_DATA = b"probe"


def probe(backend: Backend) -> None:
    """Write, read and list an object, also in parts and ranges; create atomically; remove.

    A server whose conditional writes are weak is logged as a warning, and used with claims. A
    bucket may forbid deletion: it can still hold artifacts.

    Raises:
        StoreConfigError: The store can't be used, with the reason.
    """
    whole, parts = (f"{PROBES}{uuid.uuid4().hex}" for _ in range(2))
    try:
        backend.put(whole, _DATA)
        is_right = backend.get_bytes(whole, 100) == _DATA and whole in backend.list(whole)
        if not is_right or not _keeps_large_files(backend, parts):
            raise StoreConfigError(
                f"{backend.uri}: {whole} does not read as it was written; use another store"
            )
        is_atomic(backend)
        _remove(backend, [whole, parts])
    except StoreConfigError:
        raise
    except StoreError as error:
        raise StoreConfigError(str(error)) from None


def _keeps_large_files(backend: Backend, key: str) -> bool:
    """Return whether a file reads as it was written, both as large files are."""
    with tempfile.TemporaryFile() as sent, tempfile.TemporaryFile() as got:
        sent.write(_DATA)
        sent.flush()
        backend.put_file(key, Source(sent, key, lambda _: None))
        sink = Sink(got, lambda _: None)
        backend.get_file(key, sink)
    return sink.sha256 == sha256_bytes(_DATA)


def _remove(backend: Backend, keys: list[str]) -> None:
    try:
        backend.delete(keys)
    except StoreConfigError as error:
        log.debug("objects can't be removed: %s", error)
        return
    kept = [key for key in keys if backend.find(key) is not None]
    if kept:
        log.warning(
            "%s: the server says that it removed %s, and still has it; what `rlhf artifacts gc` "
            "removes may stay as well", backend.uri, kept[0],
        )  # fmt: skip
