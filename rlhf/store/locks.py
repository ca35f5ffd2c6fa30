"""Locks between processes that leave no file behind."""

from __future__ import annotations

import contextlib
import fcntl
import os
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO


def acquire(path: Path, *, shared: bool = False, wait: bool = True) -> BinaryIO | None:
    """An open file that holds the lock until it is closed; None if others have it."""
    mode = fcntl.LOCK_SH if shared else fcntl.LOCK_EX
    while True:
        file = path.open("ab")
        try:
            fcntl.flock(file, mode if wait else mode | fcntl.LOCK_NB)
            if _is_there(file, path):
                return file
        except BlockingIOError:
            file.close()
            return None
        except BaseException:
            file.close()
            raise
        # Whoever had it took the file away: the lock is on nothing that others can see.
        file.close()


@contextlib.contextmanager
def locked(path: Path, *, wait: bool = True) -> Iterator[bool]:
    """Alone, among threads and processes; False if others are and there is no waiting."""
    file = acquire(path, wait=wait)
    try:
        yield file is not None
    finally:
        if file is not None:
            path.unlink(missing_ok=True)
            file.close()


def _is_there(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.stat())
    except FileNotFoundError:
        return False
