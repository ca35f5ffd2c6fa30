"""Verified local copies of artifacts, shared by processes and bounded in size.

<root>/blobs/ab/<sha256>         each file's bytes, once
<root>/artifacts/<digest>/…      folders that stages read: hard links to the blobs
<root>/locks/                    a lock for each blob and folder in work
<root>/tmp/                      unfinished files
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import time
import uuid
import weakref
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

from rlhf.errors import ArtifactCorrupt, StoreConfigError, StoreError
from rlhf.files import file_sha256
from rlhf.store.manifest import FileEntry, blob_key
from rlhf.store.objects import SMALL, Backend, Meter, Sink, in_parallel

#: Default limit in bytes of all fetched artifacts.
DEFAULT_LIMIT = 50 * 10**9
#: Downloads of a file whose sha256 is wrong: a bit that flipped on the way is right the next time.
ATTEMPTS = 3
#: After so many seconds without a byte, boto3 has retried a download for long enough.
_SLOW = 5.0


class Origin(NamedTuple):
    """Source of a download: the store's URI, a function for one file, and a meter."""

    uri: str
    download: Callable[[FileEntry, Sink], None]
    meter: Meter


class Cache:
    """Cache of verified blobs, and of artifact folders that are hard links to them.

    Safe for threads and processes. Beyond the limit the least recently used folders are evicted.
    """

    def __init__(self, root: Path, limit: int = DEFAULT_LIMIT) -> None:
        self.root = root / "cache"
        self._limit = limit
        #: Inode to digest, size and time of the files that this process has verified.
        self._verified: dict[tuple[int, int], tuple[str, int, int]] = {}
        #: Folders in use by this process, which must not be evicted, each with its shared lock.
        self._used: dict[Path, BinaryIO] = {}
        weakref.finalize(self, _release, self._used)

    def fill(self, digest: str, files: Sequence[FileEntry], complete: bool, origin: Origin) -> Path:
        """Return a folder with these files; downloads those without an intact copy.

        The folder is not evicted for as long as this object exists.
        """
        selection = hashlib.sha256("\n".join(entry.path for entry in files).encode()).hexdigest()
        name = digest if complete else f"{digest}-{selection[:16]}"
        final = self.root / "artifacts" / name
        with self._writable():
            for folder in ("artifacts", "locks", "tmp"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            self._use(final)
            with locked(self._lock(name)):
                if not self._is_intact(final, files):
                    absent = [entry for entry in files if not self._blob(entry).exists()]
                    self._make_room(sum(entry.size for entry in absent))
                    self._build(final, files, origin)
        return final

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
        """Translate an OSError of the cache's own files to a StoreError."""
        try:
            yield
        except StoreError:
            raise
        except OSError as error:
            message = f"can't use the artifact cache {self.root}: {error.strerror or error}"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise StoreError(
                    f"{message}; make room, lower runtime.cache_gb, or set runtime.work_dir to a "
                    "larger disk"
                ) from None
            raise StoreConfigError(
                f"{message}; make it a folder that this user can write"
            ) from None

    def _use(self, folder: Path) -> None:
        """Mark a folder as in use by this process, and as used now."""
        if folder not in self._used:
            file = acquire(_use_lock(folder), shared=True)
            assert file is not None
            self._used[folder] = file
        os.utime(_use_lock(folder))

    def _is_intact(self, folder: Path, files: Sequence[FileEntry]) -> bool:
        """Return whether the folder holds exactly these files, unchanged."""
        if not folder.is_dir() or folder.is_symlink():
            return False
        paths: set[str] = set()
        for parent, folders, names in os.walk(folder):
            links = [name for name in folders if (Path(parent) / name).is_symlink()]
            paths |= {(Path(parent) / n).relative_to(folder).as_posix() for n in [*names, *links]}
        return paths == {entry.path for entry in files} and all(
            self._is_verified(folder / entry.path, entry) for entry in files
        )

    def _is_verified(self, path: Path, entry: FileEntry) -> bool:
        """Return whether a file is as in the manifest.

        Its bytes are read once per process, and again when its size or time has changed.
        """
        try:
            state = path.lstat()
        except OSError:
            return False
        if path.is_symlink() or not path.is_file() or state.st_size != entry.size:
            return False
        verified = (entry.sha256, state.st_size, state.st_mtime_ns)
        if self._verified.get((state.st_dev, state.st_ino)) == verified:
            return True
        if file_sha256(path) != entry.sha256:
            return False
        self._verified[state.st_dev, state.st_ino] = verified
        return True

    def _make_room(self, wanted: int) -> None:
        """Evict the least recently used folders until there is room for `wanted` bytes.

        Folders in use stay, even beyond the limit.
        """
        with locked(self.root / "locks" / "room", wait=False) as is_locked:
            if not is_locked:
                return
            self._clear_up()
            folders = [path for path in (self.root / "artifacts").iterdir() if path.is_dir()]
            for folder in [None, *sorted(folders, key=_last_used)]:
                if folder is None or self._evict(folder):
                    self._drop_blobs()
                    if self._size() + wanted <= self._limit:
                        return

    def _clear_up(self) -> None:
        """Remove leftovers of killed processes, which hold no lock any more."""
        for lock in (self.root / "tmp").glob("*.lock"):
            with locked(lock, wait=False) as is_locked:
                if is_locked:
                    _remove(lock.with_suffix(""))
        for lock in (self.root / "locks").iterdir():
            # Releasing a lock removes its file: a dead process's goes, one in use stays.
            with locked(lock, wait=False):
                pass

    def _evict(self, folder: Path) -> bool:
        lock = acquire(_use_lock(folder), wait=False)
        if lock is None:
            return False
        with lock:
            self._discard(folder)
            _use_lock(folder).unlink(missing_ok=True)
        return True

    def _drop_blobs(self) -> None:
        """Remove blobs that no folder links to any more."""
        for blob in self.root.glob("blobs/*/*"):
            if blob.stat().st_nlink == 1:
                with locked(self._lock(blob.name), wait=False) as is_locked:
                    if is_locked and blob.exists() and blob.stat().st_nlink == 1:
                        blob.unlink()

    def _size(self) -> int:
        """Return the bytes on disk; a file with several links counts once."""
        sizes: dict[int, int] = {}
        for top in ("artifacts", "blobs"):
            for parent, _, names in os.walk(self.root / top):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        state = Path(parent, name).lstat()
                        sizes[state.st_ino] = state.st_size
        return sum(sizes.values())

    def _build(self, final: Path, files: Sequence[FileEntry], origin: Origin) -> None:
        """Create a folder of links to the blobs atomically, downloading missing blobs."""
        paths: dict[str, list[FileEntry]] = {}
        for entry in files:
            paths.setdefault(entry.sha256, []).append(entry)
        with self._temporary() as scratch:
            staging = scratch / "staging"
            for folder in {(staging / entry.path).parent for entry in files}:
                folder.mkdir(parents=True, exist_ok=True)

            def link(entries: list[FileEntry]) -> None:
                targets = [staging / entry.path for entry in entries]
                self._link(entries[0], targets, scratch, origin)

            in_parallel(link, paths.values())
            self._discard(final)
            staging.replace(final)

    def _link(
        self, entry: FileEntry, targets: Sequence[Path], scratch: Path, origin: Origin
    ) -> None:
        """Link a blob to all its paths, under its lock against eviction."""
        blob = self._blob(entry)
        with locked(self._lock(entry.sha256)):
            if not self._is_verified(blob, entry):
                blob.parent.mkdir(parents=True, exist_ok=True)
                part = scratch / entry.sha256
                self._download(entry, part, origin)
                part.replace(blob)
            else:
                origin.meter(entry.size)
            for target in targets:
                try:
                    os.link(blob, target)
                except OSError as error:
                    if error.errno not in (errno.EPERM, errno.EMLINK, errno.ENOTSUP):
                        raise
                    shutil.copyfile(blob, target)

    def _download(self, entry: FileEntry, part: Path, origin: Origin) -> None:
        """Download a file and verify its sha256, in up to `ATTEMPTS` attempts."""
        sink = None
        for attempt in range(ATTEMPTS):
            with part.open("wb") as file:
                sink = Sink(file, origin.meter)
                try:
                    origin.download(entry, sink)
                except StoreError as error:
                    if sink.error:
                        raise sink.error from None
                    # A flipped bit in a header causes any error, but without a pause.
                    slow = time.monotonic() - sink.moved > _SLOW
                    if attempt == ATTEMPTS - 1 or slow or not error.retriable:
                        raise
                    continue
            if (sink.size, sink.sha256) == (entry.size, entry.sha256):
                self._remember(part, entry)
                return
        assert sink is not None
        problem = (
            f"has {sink.size} bytes instead of {entry.size}"
            if sink.size != entry.size
            else "does not have the sha256 in its name"
        )
        raise ArtifactCorrupt(
            f"{origin.uri}: {blob_key(entry.sha256)} ({entry.path}) {problem}; "
            "delete that object and publish the artifact again"
        )

    def _remember(self, path: Path, entry: FileEntry) -> None:
        state = path.stat()
        verified = (entry.sha256, state.st_size, state.st_mtime_ns)
        self._verified[state.st_dev, state.st_ino] = verified

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        path = self.root / "tmp" / uuid.uuid4().hex
        with locked(path.with_suffix(".lock")):
            try:
                yield path
            finally:
                _remove(path)

    def _discard(self, path: Path) -> None:
        """Remove a folder atomically, so that no process sees a part of it."""
        if os.path.lexists(path):
            with self._temporary() as trash:
                path.replace(trash)

    def _blob(self, entry: FileEntry) -> Path:
        return self.root / "blobs" / entry.sha256[:2] / entry.sha256

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / name


def download(backend: Backend, entry: FileEntry, sink: Sink) -> None:
    """Write a file's bytes into the sink, unverified: the caller compares the sha256."""
    key = blob_key(entry.sha256)
    if entry.size <= SMALL:
        sink.write(backend.get_bytes(key, SMALL))
    else:
        backend.get_file(key, sink)


def _release(used: dict[Path, BinaryIO]) -> None:
    for lock in used.values():
        lock.close()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock among threads and processes; yields False if it is taken.

    With `wait` it blocks instead. The lock's file is removed on release.
    """
    file = acquire(path, wait=wait)
    try:
        yield file is not None
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()


def acquire(path: Path, *, shared: bool = False, wait: bool = True) -> BinaryIO | None:
    """Return an open file that holds the lock until closed; None if it is taken."""
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, mode if wait else mode | fcntl.LOCK_NB)
            if _is_current(file, path):
                return file
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        # The previous holder removed the file, so a lock on it excludes no other process.
        file.close()


def _is_current(file: BinaryIO, path: Path) -> bool:
    """Return whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False


def _use_lock(folder: Path) -> Path:
    return folder.with_name(f".{folder.name}.lock")


def _last_used(folder: Path) -> float:
    with contextlib.suppress(FileNotFoundError):
        return _use_lock(folder).stat().st_mtime
    return 0.0


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
