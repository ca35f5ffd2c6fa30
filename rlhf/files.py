"""Files and folders: JSON, content hashes, fsync, and `~` in paths."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.saved import damaged

#: Nanoseconds after which a changed file is sure to have another time of change: FAT's resolution.
_SETTLED = 2 * 10**9
#: sha256 of files by path, size and time of change; see `known_sha256`.
_digests: dict[tuple[Path, int, int], str] = {}


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON with sorted keys; ValueError for NaN, infinity."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON written by `write_json`.

    Raises:
        OSError: There is no such file.
        DataError: It holds something else.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise damaged(path, error) from None


def exists(path: Path) -> bool:
    """Return whether a path that a user names exists; False for names that can't."""
    return os.path.exists(path)  # noqa: PTH110  (a Path raises for names over 255 bytes)


def is_file(path: Path) -> bool:
    """Return whether a path that a user names is a file; False for names that can't exist."""
    return os.path.isfile(path)  # noqa: PTH113


def is_dir(path: Path) -> bool:
    """Return whether a path that a user names is a folder; False for names that can't exist."""
    return os.path.isdir(path)  # noqa: PTH112


def read_text(path: Path, encoding: str = "utf-8") -> str:
    """Read a text file that a user names; a pipe or device, which may never end, is an OSError."""
    if exists(path) and not is_file(path):
        raise OSError(errno.EINVAL, "Is no regular file", str(path))
    return path.read_text(encoding=encoding)


def expand_home(path: str | Path) -> Path:
    """Expand `~` and `~user`; the path of an unknown user is returned unchanged."""
    path = Path(path)
    try:
        return path.expanduser()
    except RuntimeError:
        return path


def file_sha256(path: Path) -> str:
    """Return the hex sha256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def known_sha256(path: Path) -> str:
    """Return a file's hex sha256, cached by path, size and modification time."""
    status = path.stat()
    state = path.absolute(), status.st_size, status.st_mtime_ns
    if state in _digests:
        return _digests[state]
    digest = file_sha256(path)
    if time.time_ns() - status.st_mtime_ns > _SETTLED:
        _digests[state] = digest
    return digest


def files_sha256(
    files: Iterable[tuple[str, Path]],
    separator: bytes = b"",
    sha256: Callable[[Path], str] = file_sha256,
) -> str:
    """Return the hex sha256 over the names and contents of files, in the order given.

    Args:
        files: (name, path) pairs.
        separator: Bytes between a name and the hash of its content. Checkpoints and fingerprints
            that exist were made with one or the other, so a caller's must not change.
        sha256: Returns the hex sha256 of a file.
    """
    digest = hashlib.sha256()
    for name, path in files:
        digest.update(name.encode() + separator + bytes.fromhex(sha256(path)))
    return digest.hexdigest()


def folder_sha256(folder: Path) -> str:
    """Return the hex sha256 over the names and contents of all files under a folder."""
    files = {p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.is_file()}
    return files_sha256(sorted(files.items()))


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """Provide a folder to fill, which becomes `folder` at the end; after an error nothing is left.

    Raises:
        OSError: It can't be written, or `folder` has become one with files meanwhile.
    """
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f".{folder.name[:100]}-") as scratch:
        made = Path(scratch, "new")
        made.mkdir()
        yield made
        made.replace(folder)  # over an empty folder only


def fsync(path: Path) -> None:
    """Write a closed file, or the entries of a folder, through to the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
