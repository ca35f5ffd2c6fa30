"""A folder as an object store, with atomic and durable writes."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import stat
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import BinaryIO

from rlhf.errors import ArtifactCorrupt, ArtifactMissing, StoreConfigError, StoreError
from rlhf.files import fsync
from rlhf.store.objects import ObjectInfo, Sink, Source

_CONFIGURATION = {
    errno.EACCES,
    errno.EPERM,
    errno.EROFS,
    errno.ENOTDIR,
    errno.EEXIST,
    errno.EISDIR,
    errno.ELOOP,
    errno.ENAMETOOLONG,
    errno.ENOTSUP,
}
#: Keys that only an object may have.
_OBJECT = re.compile(
    r"manifests/[0-9a-f]{64}\.json|blobs/sha256/../[0-9a-f]{64}|refs/.+/[0-9]{6}\.json|pins/[^/]+\.json"
)


class LocalBackend:
    """An object store in a folder; `tmp/` holds unfinished files."""

    atomic: bool | None = True

    def __init__(self, root: Path) -> None:
        self.root = root
        self.uri = self.location = root.as_uri()

    def hurried(self, seconds: float) -> LocalBackend:
        """Return this backend: a folder needs no timeout."""
        del seconds
        return self

    def close(self) -> None:
        """Do nothing: a folder has no connections."""

    def child(self, name: str) -> LocalBackend:
        """Return the backend of a subfolder."""
        return LocalBackend(self.root / name)

    def put_new(self, key: str, data: bytes) -> bool:
        """Create by hard link, which unlike a rename never overwrites."""
        with self._translated("write", key):
            if (self.root / key).exists():
                return False
            with self._temporary() as (file, temporary):
                file.write(data)
                _sync(file)
                try:
                    os.link(temporary, self._prepared(key))
                except FileExistsError:
                    return False
            fsync((self.root / key).parent)
            return True

    def put_new_held(self, key: str, data: bytes, hold: Callable[[], None]) -> bool | None:
        """Create the object; return None, as a folder needs no probe of atomicity."""
        del hold
        self.put_new(key, data)
        return None

    def put(self, key: str, data: bytes) -> None:
        """Write to a temporary file, then rename it."""
        self._put(key, iter([data]))

    def put_file(self, key: str, source: Source) -> None:
        """Copy to a temporary file, then rename it if the source is unchanged."""
        self._put(key, source.chunks())

    def get_bytes(self, key: str, limit: int) -> bytes:
        """Read a file of at most `limit` bytes."""
        with self._translated("read", key), self._object(key).open("rb") as file:
            data = file.read(limit + 1)
        if len(data) > limit:
            raise ArtifactCorrupt(f"{self.uri}: {key} is larger than {limit} bytes; delete it")
        return data

    def get_file(self, key: str, sink: Sink) -> None:
        """Copy a file; with a link, a change in the cache would reach the store."""
        with self._translated("read", key), self._object(key).open("rb") as source:
            while chunk := source.read(1 << 20):
                sink.write(chunk)

    def find(self, key: str) -> ObjectInfo | None:
        """Return size and age of a file."""
        with self._translated("read", key):
            try:
                return _info(self._object(key))
            except FileNotFoundError:
                return None

    def list(self, prefix: str) -> dict[str, ObjectInfo]:
        """Walk the folder part of the prefix, and filter by the rest.

        A folder that can't be read is an error, as what it holds would look like garbage. What
        stands in an object's place without being a file is listed, so that reading it says so.
        """
        start = self.root / prefix.rpartition("/")[0]
        objects: dict[str, ObjectInfo] = {}
        with self._translated("list", prefix):
            for parent, folders, names in os.walk(start, onerror=_raise, followlinks=True):
                _refuse_loops(Path(parent), folders)
                inner = Path(parent).relative_to(self.root)
                keys = [(inner / name).as_posix() for name in names]
                keys += [key for n in folders if _OBJECT.fullmatch(key := (inner / n).as_posix())]
                for key in keys:
                    if key.startswith(prefix):
                        with contextlib.suppress(FileNotFoundError):
                            objects[key] = _info(self.root / key)
        return dict(sorted(objects.items()))

    def delete(self, keys: Iterable[str]) -> None:
        """Unlink files."""
        for key in keys:
            with self._translated("delete", key):
                (self.root / key).unlink(missing_ok=True)

    def sweep(self, age: float) -> int:
        """Remove the temporary files of killed processes."""
        old = [key for key, info in self.list("tmp/").items() if info.age >= age]
        self.delete(old)
        return len(old)

    def versions(self) -> str:
        """Return nothing: a removed file is gone."""
        return ""

    def _object(self, key: str) -> Path:
        """Return an object's path; ArtifactCorrupt if it is a folder, pipe or device."""
        path = self.root / key
        try:
            is_file = stat.S_ISREG(path.stat().st_mode)
        except OSError as error:
            if error.errno != errno.ELOOP:
                raise
            is_file = False
        if not is_file:
            raise ArtifactCorrupt(
                f"{self.uri}: {key} is no file; remove it, and publish the artifact again"
            )
        return path

    def _put(self, key: str, data: Iterator[bytes]) -> None:
        with self._translated("write", key), self._temporary() as (file, temporary):
            for chunk in data:
                file.write(chunk)
            _sync(file)
            final = self._prepared(key)
            temporary.replace(final)
            fsync(final.parent)

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[tuple[BinaryIO, Path]]:
        folder = self.root / "tmp"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / uuid.uuid4().hex
        try:
            with path.open("xb") as file:
                yield file, path
        finally:
            path.unlink(missing_ok=True)

    def _prepared(self, key: str) -> Path:
        """Return the final path, its folders created and synced."""
        path = self.root / key
        missing = [folder for folder in path.parents if not folder.exists()]
        path.parent.mkdir(parents=True, exist_ok=True)
        for folder in missing:
            fsync(folder.parent)
        return path

    @contextlib.contextmanager
    def _translated(self, verb: str, key: str) -> Iterator[None]:
        try:
            yield
        except StoreError:
            raise
        except FileNotFoundError:
            raise ArtifactMissing(f"{self.uri}: there is no {key}") from None
        except IsADirectoryError:
            raise ArtifactCorrupt(
                f"{self.uri}: {key} is a folder, where an object belongs; remove it, then try again"
            ) from None
        except OSError as error:
            message = f"{self.uri}: can't {verb} {key}: {error.strerror or error}"
            if error.errno in _CONFIGURATION:
                cure = f"make {self.root} a folder that this user can write"
                raise StoreConfigError(f"{message}; {cure}") from None
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            cure = "make room there" if full else "mend that"
            raise StoreError(f"{message}; {cure}, then try again") from None


def _info(path: Path) -> ObjectInfo:
    try:
        state = path.stat()
    except OSError:
        state = path.lstat()  # a link to nothing or to itself: something that can't be read
    return ObjectInfo(state.st_size, time.time() - state.st_mtime)


def _raise(error: OSError) -> None:
    """Raise an error that `os.walk` would pass over, unless the folder is not there."""
    if not isinstance(error, FileNotFoundError):
        raise error


def _refuse_loops(parent: Path, folders: Iterable[str]) -> None:
    """Raise OSError for a link to a folder that the walk is in: it would not end."""
    for link in (parent / name for name in folders):
        if link.is_symlink() and link.resolve() in [p.resolve() for p in (parent, *parent.parents)]:
            raise OSError(errno.ELOOP, os.strerror(errno.ELOOP), str(link))


def _sync(file: BinaryIO) -> None:
    file.flush()
    os.fsync(file.fileno())
