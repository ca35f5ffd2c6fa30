"""Publishing a folder as an artifact: checks first, then blobs, the manifest last."""

from __future__ import annotations

import os
import stat
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from rlhf.errors import ArtifactCorrupt, ArtifactMissing
from rlhf.files import is_dir
from rlhf.store.coordination import FRESH, collected_since
from rlhf.store.manifest import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    ArtifactRef,
    FileEntry,
    Metric,
    Producer,
    PublishError,
    blob_key,
    build_manifest,
    check_collisions,
    check_path,
    manifest_key,
    sha256_bytes,
)
from rlhf.store.objects import SMALL, Backend, Meter, Source, in_parallel

#: Large files hashed at a time: with all at once, the network would be idle meanwhile.
_HASHING = threading.BoundedSemaphore(2)


def publish(
    backend: Backend,
    folder: Path,
    kind: str,
    *,
    parents: Mapping[str, ArtifactRef],
    producer: Producer,
    metrics: Mapping[str, Metric],
    listener: Callable[[int, int], None] | None = None,
) -> ArtifactRef:
    """Send missing blobs, then the manifest; a crash leaves no partial artifact."""
    began = time.monotonic()
    sizes = scan(folder)
    # A draft, so that everything else is validated before a byte is sent.
    draft = [FileEntry(path=path, sha256="0" * 64, size=size) for path, size in sizes.items()]
    build_manifest(kind, draft, parents, producer, metrics)
    meter = Meter(sum(sizes.values()), listener)
    entries = in_parallel(_Sender(backend, folder, meter), sizes)
    manifest = build_manifest(kind, entries, parents, producer, metrics)
    data = manifest.encode()
    digest = sha256_bytes(data)
    key = manifest_key(digest)
    _put_manifest(backend, key, data)
    if collected_since(backend, began):
        _mend(backend, folder, entries, key, data)
        _check_parents(backend, parents)
    uri = f"{backend.uri}/{key}"
    return ArtifactRef(kind=kind, digest=digest, size=manifest.size, uri=uri)


def scan(folder: Path) -> dict[str, int]:
    """Return path and size of all files; PublishError if one is not allowed."""
    if not is_dir(folder):
        raise PublishError(f"can't publish {folder}: it is not a folder")
    sizes: dict[str, int] = {}
    for parent, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(parent) / name
            relative = path.relative_to(folder).as_posix()
            state = path.lstat()
            mode = state.st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                what = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
                raise PublishError(f"can't publish {folder}: {relative!r} is {what}; copy the file")
            if stat.S_ISREG(mode):
                sizes[relative] = state.st_size
    if not 0 < len(sizes) <= MAX_FILES:
        raise PublishError(
            f"can't publish {folder}: it holds {len(sizes)} files; 1 to {MAX_FILES} are allowed"
        )
    try:
        for path in sizes:
            check_path(path)
        check_collisions(sizes)
    except ValueError as error:
        raise PublishError(f"can't publish {folder}: {error}") from None
    return dict(sorted(sizes.items()))


class _Sender:
    """Sends the files of a folder; equal ones once."""

    def __init__(self, backend: Backend, folder: Path, meter: Meter) -> None:
        self._backend = backend
        self._folder = folder
        self._meter = meter
        self._locks: dict[str, threading.Lock] = {}

    def __call__(self, path: str) -> FileEntry:
        """Hash a file, and send it unless the store has it.

        A file of up to 16 MiB is read once. A larger one is read twice, the second time mostly from
        the page cache.
        """
        try:
            with (self._folder / path).open("rb") as file:
                source = Source(file, path, self._meter)
                if source.size <= SMALL:
                    data = source.read()
                    return self._send(path, sha256_bytes(data), source, data)
                with _HASHING:
                    sha256 = source.sha256()
                return self._send(path, sha256, source, None)
        except FileNotFoundError:
            raise PublishError(f"{path} changed while it was being published") from None

    def _send(self, path: str, sha256: str, source: Source, data: bytes | None) -> FileEntry:
        entry = FileEntry(path=path, sha256=sha256, size=source.size)
        key = blob_key(sha256)
        with self._locks.setdefault(sha256, threading.Lock()):
            info = self._backend.find(key)
            # One that is archived is sent again, as it can't be read.
            if info is not None and info.size == entry.size and not info.archived:
                self._meter(entry.size)
                return entry
            if data is None:
                self._backend.put_file(key, source)
            else:
                self._backend.put(key, data)
                self._meter(entry.size)
            return entry


def _put_manifest(backend: Backend, key: str, data: bytes) -> None:
    """Create the manifest; rewrite one older than `FRESH`, so that gc keeps it."""
    if backend.put_new(key, data):
        return
    if backend.get_bytes(key, MAX_MANIFEST_BYTES) != data:
        raise ArtifactCorrupt(
            f"{backend.uri}: {key} does not have the sha256 in its name; "
            "delete that object and publish the artifact again"
        )
    info = backend.find(key)
    if info is None or info.age > FRESH:
        backend.put(key, data)


def _mend(
    backend: Backend, folder: Path, entries: Sequence[FileEntry], key: str, data: bytes
) -> None:
    """Send again what a garbage collection has removed (see `coordination`).

    Blobs that were sent just now are checked, too: one may have replaced an older object that a
    collection had listed, a damaged one, or one that another collection removed first.
    """
    sender = _Sender(backend, folder, Meter(0, None))
    blobs = list({entry.sha256: entry for entry in entries}.values())
    stored = in_parallel(lambda entry: backend.find(blob_key(entry.sha256)), blobs)
    for entry, info in zip(blobs, stored, strict=True):
        if info is None and sender(entry.path) != entry:
            raise PublishError(f"{entry.path} changed while it was being published")
    if backend.find(key) is None:
        backend.put(key, data)


def _check_parents(backend: Backend, parents: Mapping[str, ArtifactRef]) -> None:
    """Raise ArtifactMissing if a parent was collected as garbage meanwhile."""
    for role, ref in parents.items():
        if backend.find(manifest_key(ref.digest)) is None:
            raise ArtifactMissing(
                f"{backend.uri}: {role} {ref.short} was collected as garbage while something was "
                "made from it; make it again"
            )
