"""File locks between processes, whose files are removed when they are released."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


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
        # The previous holder removed the file: nobody else can see a lock on it.
        file.close()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Hold a lock among threads and processes; yields False if it is taken."""
    file = acquire(path, wait=wait)
    try:
        yield file is not None
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()


def _is_current(file: BinaryIO, path: Path) -> bool:
    """Return whether the path still names the open file."""
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
