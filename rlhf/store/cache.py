"""Local copies of artifacts: verified, put in place whole, shared by processes, bounded in size.

<root>/blobs/ab/<sha256>         each file's bytes, once
<root>/artifacts/<digest>/…      what a stage reads: hard links to the blobs
<root>/locks/                    one lock for each blob and folder that somebody is working on
<root>/tmp/                      what is being written
"""

from __future__ import annotations

import contextlib
import errno
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
from rlhf.store.backend import Meter, Sink, in_parallel
from rlhf.store.locks import acquire, locked
from rlhf.store.manifest import FileEntry, blob_key
from rlhf.store.receive import ATTEMPTS

#: Bytes that fetched artifacts may take, unless the configuration says otherwise.
DEFAULT_LIMIT = 50 * 10**9
#: Seconds without a byte after which a download has been tried for long enough, by boto3.
_SLOW = 5.0


class Origin(NamedTuple):
    """Where files come from: the store's name, a way to get one, and who is told of the bytes."""

    uri: str
    download: Callable[[FileEntry, Sink], None]
    meter: Meter


class Cache:
    """A folder of blobs, and of artifacts that are links to them."""

    def __init__(self, root: Path, limit: int = DEFAULT_LIMIT) -> None:
        self.root = root / "cache"
        self._limit = limit
        #: Inode to digest, size and time of what this process has read and found right.
        self._verified: dict[tuple[int, int], tuple[str, int, int]] = {}
        #: Folders that were handed out, and so must not go, each with its shared lock.
        self._used: dict[Path, BinaryIO] = {}
        weakref.finalize(self, _release, self._used)

    def fill(self, digest: str, files: Sequence[FileEntry], complete: bool, origin: Origin) -> Path:
        """The folder that holds these files of an artifact, downloaded if no sound copy is there.

        It stays as long as this object does, whatever others fetch.
        """
        chosen = hashlib.sha256("\n".join(entry.path for entry in files).encode()).hexdigest()
        name = digest if complete else f"{digest}-{chosen[:16]}"
        final = self.root / "artifacts" / name
        with self._writable():
            for folder in ("artifacts", "locks", "tmp"):
                (self.root / folder).mkdir(parents=True, exist_ok=True)
            self._use(final)
            with locked(self._lock(name)):
                if not self._sound(final, files):
                    absent = [entry for entry in files if not self._blob(entry).exists()]
                    self._make_room(sum(entry.size for entry in absent))
                    self._build(final, files, origin)
        return final

    def _build(self, final: Path, files: Sequence[FileEntry], origin: Origin) -> None:
        """Link the blobs, each fetched if need be, into a folder that appears whole."""
        paths: dict[str, list[FileEntry]] = {}
        for entry in files:
            paths.setdefault(entry.sha256, []).append(entry)
        with self._temporary() as desk:
            whole = desk / "whole"
            for folder in {(whole / entry.path).parent for entry in files}:
                folder.mkdir(parents=True, exist_ok=True)

            def place(entries: list[FileEntry]) -> None:
                targets = [whole / entry.path for entry in entries]
                self._place(entries[0], targets, desk, origin)

            in_parallel(place, paths.values())
            self._discard(final)
            whole.replace(final)

    def _place(self, entry: FileEntry, targets: Sequence[Path], desk: Path, origin: Origin) -> None:
        """One blob, at all its places; its lock keeps it from being cleared away meanwhile."""
        blob = self._blob(entry)
        with locked(self._lock(entry.sha256)):
            if not self._right(blob, entry):
                blob.parent.mkdir(parents=True, exist_ok=True)
                part = desk / entry.sha256
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
        """Once more if what came is not what was promised, as bits do flip on the way."""
        sink = None
        for attempt in range(ATTEMPTS):
            with part.open("wb") as file:
                sink = Sink(file, origin.meter)
                try:
                    origin.download(entry, sink)
                except StoreError as error:
                    if sink.error:
                        raise sink.error from None
                    # A flipped bit in a header looks like many things, but is seen at once.
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

    def _sound(self, folder: Path, files: Sequence[FileEntry]) -> bool:
        """Whether the folder holds these very files, and nothing else."""
        if not folder.is_dir() or folder.is_symlink():
            return False
        found: set[str] = set()
        for where, folders, names in os.walk(folder):
            links = [name for name in folders if (Path(where) / name).is_symlink()]
            found |= {(Path(where) / n).relative_to(folder).as_posix() for n in [*names, *links]}
        return found == {entry.path for entry in files} and all(
            self._right(folder / entry.path, entry) for entry in files
        )

    def _right(self, path: Path, entry: FileEntry) -> bool:
        """Every byte is read once per process, and again whenever a size or a time changes."""
        try:
            state = path.lstat()
        except OSError:
            return False
        if path.is_symlink() or not path.is_file() or state.st_size != entry.size:
            return False
        known = (entry.sha256, state.st_size, state.st_mtime_ns)
        if self._verified.get((state.st_dev, state.st_ino)) == known:
            return True
        if file_sha256(path) != entry.sha256:
            return False
        self._verified[state.st_dev, state.st_ino] = known
        return True

    def _remember(self, path: Path, entry: FileEntry) -> None:
        state = path.stat()
        known = (entry.sha256, state.st_size, state.st_mtime_ns)
        self._verified[state.st_dev, state.st_ino] = known

    def _use(self, folder: Path) -> None:
        """Say that the folder is in use, and that it was now."""
        if folder not in self._used:
            file = acquire(_use_lock(folder), shared=True)
            assert file is not None
            self._used[folder] = file
        os.utime(_use_lock(folder))

    def _make_room(self, wanted: int) -> None:
        """Remove what was used longest ago and is not in use, until there is room."""
        with locked(self.root / "locks" / "room", wait=False) as alone:
            if not alone:
                return
            self._clear_up()
            folders = [path for path in (self.root / "artifacts").iterdir() if path.is_dir()]
            for folder in [None, *sorted(folders, key=_last_used)]:
                if folder is None or self._evict(folder):
                    self._drop_blobs()
                    if self._size() + wanted <= self._limit:
                        return

    def _evict(self, folder: Path) -> bool:
        lock = acquire(_use_lock(folder), wait=False)
        if lock is None:
            return False
        with lock:
            self._discard(folder)
            _use_lock(folder).unlink(missing_ok=True)
        return True

    def _drop_blobs(self) -> None:
        """Remove blobs that no folder links to."""
        for blob in self.root.glob("blobs/*/*"):
            if blob.stat().st_nlink == 1:
                with locked(self._lock(blob.name), wait=False) as alone:
                    if alone and blob.exists() and blob.stat().st_nlink == 1:
                        blob.unlink()

    def _size(self) -> int:
        """Bytes on the disk, those that are linked several times once."""
        sizes: dict[int, int] = {}
        for top in ("artifacts", "blobs"):
            for where, _, names in os.walk(self.root / top):
                for name in names:
                    with contextlib.suppress(FileNotFoundError):
                        state = Path(where, name).lstat()
                        sizes[state.st_ino] = state.st_size
        return sum(sizes.values())

    def _clear_up(self) -> None:
        """Remove what killed processes left behind: what is being written has a lock."""
        for lock in (self.root / "tmp").glob("*.lock"):
            with locked(lock, wait=False) as alone:
                if alone:
                    _remove(lock.with_suffix(""))
        for lock in (self.root / "locks").iterdir():
            with locked(lock, wait=False):
                """One that nobody holds goes as it is let go."""

    @contextlib.contextmanager
    def _temporary(self) -> Iterator[Path]:
        path = self.root / "tmp" / uuid.uuid4().hex
        with locked(path.with_suffix(".lock")):
            try:
                yield path
            finally:
                _remove(path)

    def _discard(self, path: Path) -> None:
        """Gone in one step, so that nobody takes a half for a whole."""
        if os.path.lexists(path):
            with self._temporary() as gone:
                path.replace(gone)

    def _blob(self, entry: FileEntry) -> Path:
        return self.root / "blobs" / entry.sha256[:2] / entry.sha256

    def _lock(self, name: str) -> Path:
        return self.root / "locks" / name

    @contextlib.contextmanager
    def _writable(self) -> Iterator[None]:
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


def _release(used: dict[Path, BinaryIO]) -> None:
    for lock in used.values():
        lock.close()


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
