"""From a folder to blobs and a manifest: everything is checked before a byte is written."""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from pathlib import Path

from rlhf.errors import ArtifactCorrupt
from rlhf.store.backend import Backend, in_parallel
from rlhf.store.manifest import (
    MAX_FILES,
    MAX_MANIFEST_BYTES,
    ArtifactRef,
    FileEntry,
    Metric,
    Producer,
    PublishError,
    build_manifest,
    check_collisions,
    check_path,
    file_sha256,
    sha256_bytes,
)


def blob_key(sha256: str) -> str:
    """Where a blob lies; the two digits keep folders small."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def manifest_key(digest: str) -> str:
    """Where a manifest lies."""
    return f"manifests/{digest}.json"


def publish(
    backend: Backend,
    folder: Path,
    kind: str,
    *,
    parents: Mapping[str, ArtifactRef],
    producer: Producer,
    metrics: Mapping[str, Metric],
) -> ArtifactRef:
    """Send the blobs the store lacks, then the manifest: a crash leaves no half artifact."""
    paths = scan(folder)
    files = in_parallel(lambda path: _entry(folder, path), paths)
    manifest = build_manifest(kind, files, parents, producer, metrics)
    data = manifest.encode()
    digest = sha256_bytes(data)
    blobs = {entry.sha256: entry for entry in files}
    in_parallel(lambda entry: _send(backend, folder, entry), blobs.values())
    key = manifest_key(digest)
    if not backend.put_new(key, data) and backend.get_bytes(key, MAX_MANIFEST_BYTES) != data:
        raise ArtifactCorrupt(
            f"{backend.uri}: {key} does not have the sha256 in its name; "
            "delete that object and publish the artifact again"
        )
    uri = f"{backend.uri}/{key}"
    return ArtifactRef(kind=kind, digest=digest, size=manifest.size, uri=uri)


def scan(folder: Path) -> list[str]:
    """Relative paths of all files, or PublishError for what an artifact must not hold."""
    if not folder.is_dir():
        raise PublishError(f"can't publish {folder}: it is not a folder")
    paths: list[str] = []
    for where, folders, names in os.walk(folder):
        for name in (*folders, *names):
            path = Path(where) / name
            relative = path.relative_to(folder).as_posix()
            mode = path.lstat().st_mode
            if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
                what = "a symbolic link" if stat.S_ISLNK(mode) else "no regular file"
                raise PublishError(f"can't publish {folder}: {relative!r} is {what}; copy the file")
            if stat.S_ISREG(mode):
                paths.append(relative)
    if not 0 < len(paths) <= MAX_FILES:
        raise PublishError(f"can't publish {folder}: it holds {len(paths)} files")
    try:
        for path in paths:
            check_path(path)
        check_collisions(paths)
    except ValueError as error:
        raise PublishError(f"can't publish {folder}: {error}") from None
    return sorted(paths)


def _entry(folder: Path, path: str) -> FileEntry:
    local = folder / path
    return FileEntry(path=path, sha256=file_sha256(local), size=local.stat().st_size)


def _send(backend: Backend, folder: Path, entry: FileEntry) -> None:
    key = blob_key(entry.sha256)
    if backend.size(key) != entry.size:
        backend.put_file(key, folder / entry.path, entry.sha256)
