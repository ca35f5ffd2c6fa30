"""Local copies of artifacts: verified, put in place whole, shared by processes."""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from rlhf.errors import ArtifactCorrupt, StoreConfigError
from rlhf.store.backend import in_parallel
from rlhf.store.manifest import FileEntry, file_sha256

Signature = tuple[tuple[str, int, int], ...]


class Cache:
    """Folders under `artifacts/`, one per artifact or selection of its files."""

    def __init__(self, root: Path) -> None:
        self.root = root / "artifacts"
        self._verified: dict[str, Signature] = {}

    def fill(
        self,
        digest: str,
        files: Sequence[FileEntry],
        complete: bool,
        download: Callable[[FileEntry, Path], None],
    ) -> Path:
        """The folder that holds the files, downloaded only if no sound copy is there."""
        whole = self.root / digest
        chosen = hashlib.sha256("\n".join(entry.path for entry in files).encode()).hexdigest()
        final = whole if complete else self.root / f"{digest}-{chosen[:16]}"
        with self._locked(digest):
            # A copy with all files serves every selection, but is judged by the selection.
            for folder in (whole, final):
                if self._sound(folder, files, exact=folder == final):
                    return folder
            part = self.root / f".part-{final.name}"
            # Left by a killed process: the lock is ours, so nobody is writing to it.
            _remove(part)
            try:
                for folder in {(part / entry.path).parent for entry in files}:
                    folder.mkdir(parents=True, exist_ok=True)
                in_parallel(lambda entry: download(entry, part / entry.path), files)
                _remove(final)
                part.replace(final)
            finally:
                _remove(part)
            self._verified[final.name] = _signature(final)
            return final

    def _sound(self, folder: Path, files: Sequence[FileEntry], exact: bool) -> bool:
        """Every byte is read once per process, and again whenever a size or a time changes."""
        if not folder.is_dir():
            return False
        signature = _signature(folder)
        sizes = {path: size for path, size, _ in signature}
        expected = {entry.path: entry.size for entry in files}
        if exact and sizes.keys() != expected.keys():
            return False
        if any(sizes.get(path) != size for path, size in expected.items()):
            return False
        if self._verified.get(folder.name) == signature:
            return True
        if any(file_sha256(folder / entry.path) != entry.sha256 for entry in files):
            return False
        if exact:
            self._verified[folder.name] = signature
        return True

    @contextlib.contextmanager
    def _locked(self, digest: str) -> Iterator[None]:
        try:
            self.root.mkdir(parents=True, exist_ok=True)
            lock = (self.root / f".lock-{digest}").open("w")
        except OSError as error:
            raise StoreConfigError(
                f"can't use the artifact cache {self.root}: {error.strerror}; "
                "make it a folder that this user can write"
            ) from None
        with lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield


def verify(entry: FileEntry, path: Path, where: str) -> None:
    """ArtifactCorrupt unless the downloaded file is what the manifest promises."""
    size = path.stat().st_size
    if size != entry.size:
        problem = f"has {size} bytes instead of {entry.size}"
    elif file_sha256(path) != entry.sha256:
        problem = "does not have the sha256 in its name"
    else:
        return
    raise ArtifactCorrupt(
        f"{where} ({entry.path}) {problem}; delete that object and publish the artifact again"
    )


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _signature(folder: Path) -> Signature:
    """Path, size and time of every file; a symbolic link has the size -1, so never passes."""
    found: list[tuple[str, int, int]] = []
    for where, folders, names in os.walk(folder):
        links = [name for name in folders if (Path(where) / name).is_symlink()]
        for name in [*names, *links]:
            path = Path(where) / name
            state = path.lstat()
            size = -1 if path.is_symlink() else state.st_size
            found.append((path.relative_to(folder).as_posix(), size, state.st_mtime_ns))
    return tuple(sorted(found))
