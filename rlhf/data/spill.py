"""Texts in a temporary file: memory holds their positions alone, and small data stay in memory."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import struct
import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from rlhf.data.rows import Prompt
from rlhf.errors import DataError

#: Bytes that are held before there is a file: small data never touch the disk.
MEMORY = 32 << 20
#: Bytes of one write once there is a file, and of one read: whoever reads in order finds the next
#: texts in the block of the last one.
_WRITE, _READ = 1 << 20, 16 << 10
#: Length in bytes times two, plus one for a list of messages.
_HEAD = struct.Struct("<Q")

#: 128 bits: two of ten million different texts share a digest with a probability of 1e-25.
_DIGEST = np.dtype([("high", "<u8"), ("low", "<u8")])
DIGEST_BYTES = _DIGEST.itemsize


class Scratch:
    """A temporary file without a name, which ends with its last user, also a killed one.

    Args:
        folder: Where it is made; None takes the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder or Path(tempfile.gettempdir())
        self._file: IO[bytes] | None = None

    def write(self, data: bytes | bytearray | memoryview, at: int) -> None:
        """Write bytes at a position.

        Raises:
            DataError: The disk is full, or the folder can't be written.
        """
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(dir=self.folder, buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            with memoryview(data) as view:
                done = 0
                while done < len(view):
                    done += os.pwrite(self._file.fileno(), view[done:], at + done)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise DataError(
                    f"{self.folder}: no space left for temporary files of the data preparation; "
                    "free as much as the source takes three times"
                ) from None
            raise DataError(
                f"{self.folder}: temporary files can't be written ({error.strerror}); make the "
                "folder writable"
            ) from None

    def read(self, size: int, at: int) -> bytes:
        """Return the bytes at a position; fewer at the end of the file."""
        assert self._file is not None
        found = os.pread(self._file.fileno(), size, at)
        while len(found) < size and (more := os.pread(self._file.fileno(), size - len(found),
                                                      at + len(found))):  # fmt: skip
            found += more
        return found


class Spill:
    """Texts and prompts by their position: the first MEMORY bytes in memory, all in a file then.

    Args:
        folder: Where the file is made; None takes the system's folder for temporary files.
    """

    def __init__(self, folder: Path | None = None) -> None:
        self.folder = folder
        self._scratch = Scratch(folder)
        self._tail = bytearray()
        self._written = 0
        self._block, self._start = b"", 0

    def add(self, value: Prompt) -> int:
        """Add a text or a list of messages; return its position.

        Raises:
            DataError: The disk is full.
        """
        at = self._written + len(self._tail)
        is_text = isinstance(value, str)
        text = value if is_text else json.dumps(value)
        raw = text.encode("utf-8", "surrogatepass")
        self._tail += _HEAD.pack(len(raw) * 2 + (not is_text))
        self._tail += raw
        if len(self._tail) >= (_WRITE if self._written else MEMORY):
            self._scratch.write(self._tail, self._written)
            self._written += len(self._tail)
            self._tail = bytearray()
        return at

    def read(self, at: int) -> Prompt:
        """Return what was added at a position."""
        if at >= self._written:
            return _value(self._tail, at - self._written)
        if not self._start <= at <= self._start + len(self._block) - _HEAD.size:
            self._block, self._start = self._scratch.read(_READ, at), at
        size = _HEAD.unpack_from(self._block, at - self._start)[0] // 2 + _HEAD.size
        if at + size > self._start + len(self._block):
            self._block, self._start = self._scratch.read(max(size, _READ), at), at
        return _value(self._block, at - self._start)

    def text(self, at: int) -> str:
        """Return the text that was added at a position."""
        value = self.read(at)
        assert isinstance(value, str)
        return value


class StoredTexts(Sequence[str]):
    """Texts of a spill by number.

    Args:
        spill: Holds the texts.
        places: Position of each, of shape (texts,).
    """

    def __init__(self, spill: Spill, places: NDArray[np.int64]) -> None:
        self._spill, self._places = spill, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> str:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._spill.text(int(self._places[index]))

    def in_sequence(self, which: NDArray[np.int64]) -> NDArray[np.int64]:
        """Return numbers of texts in the order in which they are read fastest."""
        return which[np.argsort(self._places[which], kind="stable")]

    def select(self, which: NDArray[np.int64]) -> StoredTexts:
        """Return some of the texts, by number."""
        return StoredTexts(self._spill, self._places[which])


def digest(*texts: str, salt: bytes = b"") -> bytes:
    """Return DIGEST_BYTES that other texts, or the same ones divided otherwise, do not share."""
    state = hashlib.blake2b(salt, digest_size=DIGEST_BYTES)
    for text in texts:
        raw = text.encode("utf-8", "surrogatepass")
        state.update(b"%d " % len(raw))
        state.update(raw)
    return state.digest()


def short_digest(text: str) -> int:
    """Return 64 bits of a text: two of ten million share them with a probability of 3e-6."""
    raw = text.encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.blake2b(raw, digest_size=8).digest(), "little")


def number_digests(digests: bytes | bytearray) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Number digests of 16 bytes each, equal ones alike, in the order of their first ones.

    Returns:
        `numbers` of shape (digests,), and `firsts` of shape (numbers,): the index of the first
        digest of each number.
    """
    keys = np.frombuffer(digests, dtype=_DIGEST)
    order = np.lexsort((keys["low"], keys["high"]))
    ordered = keys[order]
    is_new = np.ones(len(keys), dtype=bool)
    is_new[1:] = ordered[1:] != ordered[:-1]
    firsts = order[is_new]  # the sort is stable
    places = np.empty(len(firsts), dtype=np.int64)
    places[np.argsort(firsts)] = np.arange(len(firsts))
    numbers = np.empty(len(keys), dtype=np.int64)
    numbers[order] = places[np.cumsum(is_new) - 1]
    return numbers, np.sort(firsts)


def runs(ordered: NDArray[Any]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return where each run of equal values begins, and where it ends."""
    edges = np.flatnonzero(ordered[1:] != ordered[:-1]) + 1
    starts = np.append(0, edges) if len(ordered) else edges
    return starts, np.append(edges, len(ordered))[: len(starts)]


def _value(block: bytes | bytearray, at: int) -> Prompt:
    head = _HEAD.unpack_from(block, at)[0]
    start = at + _HEAD.size
    text = block[start : start + head // 2].decode("utf-8", "surrogatepass")
    return json.loads(text) if head % 2 else text
