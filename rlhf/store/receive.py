"""Download of one file of an artifact."""

from __future__ import annotations

from rlhf.store.backend import SMALL, Backend, Sink
from rlhf.store.manifest import FileEntry, blob_key

#: A bit that flips on the way is not flipped again the next time.
ATTEMPTS = 3


def download(backend: Backend, entry: FileEntry, sink: Sink) -> None:
    """Write a file's bytes into the sink, unverified: the caller compares the sha256."""
    key = blob_key(entry.sha256)
    if entry.size <= SMALL:
        sink.write(backend.get_bytes(key, SMALL))
    else:
        backend.get_file(key, sink)
