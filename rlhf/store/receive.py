"""Getting one file of an artifact, and telling what is wrong with those that are stored."""

from __future__ import annotations

import os
from collections.abc import Iterable
from pathlib import Path

from rlhf.store.backend import SMALL, Backend, Sink, in_parallel
from rlhf.store.manifest import FileEntry, blob_key

#: A bit that flips on the way is not there the next time.
ATTEMPTS = 3


def download(backend: Backend, entry: FileEntry, sink: Sink) -> None:
    """Write a file's bytes into the sink, whatever they are: who called compares the sha256."""
    key = blob_key(entry.sha256)
    if entry.size <= SMALL:
        sink.write(backend.get_bytes(key, SMALL))
    else:
        backend.get_file(key, sink)


def problems(backend: Backend, files: Iterable[FileEntry], deep: bool) -> list[str]:
    """A line for each blob that is missing or of another size, or, if `deep`, of other bytes."""

    def problem(entry: FileEntry) -> str | None:
        key = blob_key(entry.sha256)
        what = f"{backend.uri}: {key} ({entry.path})"
        found = backend.find(key)
        if found is None:
            return f"{what} is missing"
        if found.size != entry.size:
            return f"{what} has {found.size} bytes instead of {entry.size}"
        if deep and not _reads_right(backend, entry):
            return f"{what} does not have the sha256 in its name"
        return None

    blobs = {entry.sha256: entry for entry in files}.values()
    return [found for found in in_parallel(problem, blobs) if found]


def _reads_right(backend: Backend, entry: FileEntry) -> bool:
    for _ in range(ATTEMPTS):
        with Path(os.devnull).open("wb") as nowhere:
            sink = Sink(nowhere, lambda _: None)
            download(backend, entry, sink)
        if sink.sha256 == entry.sha256:
            return True
    return False
