"""The object-store protocol, file streams with progress, and thread maps.

A backend maps keys to bytes: a folder (`local`) or a bucket (`s3`).
"""

from __future__ import annotations

import hashlib
import io
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import BinaryIO, NamedTuple, Protocol, TypeVar, cast

from rlhf.store.manifest import PublishError

T = TypeVar("T")
R = TypeVar("R")

#: Threads of `in_parallel`.
WORKERS = 8
#: Bytes up to which a file is read into memory once, and sent or received in one request.
SMALL = 16 * 1024 * 1024


class ObjectInfo(NamedTuple):
    """An existing object's size in bytes and age in seconds, by the store's clock.

    An archived one can't be read until it is restored; listings don't say that.
    """

    size: int
    age: float
    archived: bool = False


class Backend(Protocol):
    """An object store: keys to bytes.

    Methods raise only StoreError and its subclasses, which name store and key.
    """

    uri: str
    #: The URI with the server's address: two servers may each have a bucket of this name.
    location: str
    #: Whether exactly one of several concurrent `put_new` of a key succeeds; None: not known.
    atomic: bool | None

    def put_new(self, key: str, data: bytes) -> bool:
        """Create the object whole, or return False and leave the existing one alone."""
        ...

    def put_new_held(self, key: str, data: bytes, hold: Callable[[], None]) -> bool | None:
        """Like `put_new`, calling `hold` in mid-body, when the server reads it.

        None if nothing is proven: the server did not confirm that it reads the body, or the request
        was repeated.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Store an object whole; an existing one is replaced."""
        ...

    def put_file(self, key: str, source: Source) -> None:
        """Store a large file whole, replacing the object; PublishError if it changes."""
        ...

    def get_bytes(self, key: str, limit: int) -> bytes:
        """Read an object; ArtifactMissing if absent, ArtifactCorrupt beyond the limit."""
        ...

    def get_file(self, key: str, sink: Sink) -> None:
        """Write an object into the sink and hash it in order; ArtifactMissing if absent."""
        ...

    def find(self, key: str) -> ObjectInfo | None:
        """Return size and age of an object, None if it is absent."""
        ...

    def list(self, prefix: str) -> dict[str, ObjectInfo]:
        """Return the objects whose keys start with the prefix, sorted by key."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; absent ones are ignored."""
        ...

    def sweep(self, age: float) -> int:
        """Remove unfinished uploads older than `age` seconds, and return their number."""
        ...

    def versions(self) -> str:
        """Return what it keeps of removed objects, in words; empty if nothing."""
        ...

    def hurried(self, seconds: float) -> Backend:
        """Return the same store with a short timeout and few retries, for checks."""
        ...

    def close(self) -> None:
        """Close idle connections; further calls open new ones."""
        ...

    def child(self, name: str) -> Backend:
        """Return the store under that prefix of this one."""
        ...


class Source:
    """A file being uploaded; PublishError if it changes.

    Its state is taken before it is hashed, and compared again before an upload is completed: only
    the bytes that were hashed ever become a complete object.
    """

    def __init__(self, file: BinaryIO, name: str, sent: Callable[[int], None]) -> None:
        self._file = file
        self._name = name
        self._state = self._now()
        self.size = self._state[0]
        self.sent = sent

    def sha256(self) -> str:
        """Hash the file, and seek back to its beginning."""
        digest = hashlib.file_digest(cast("io.BufferedReader", self._file), "sha256").hexdigest()
        self._file.seek(0)
        return digest

    def read(self) -> bytes:
        """Read the whole file."""
        data = self._file.read()
        self.check()
        return data

    def chunks(self) -> Iterator[bytes]:
        """Yield the file in chunks; the last one only if the file has not changed."""
        for offset in range(0, self.size, 1 << 20):
            data = self.read_at(offset, 1 << 20)
            if offset + len(data) >= self.size:
                self.check()
            self.sent(len(data))
            yield data

    def read_at(self, offset: int, size: int) -> bytes:
        """Read a range, from any thread; shorter only at the end of the file."""
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != min(size, self.size - offset):
            raise self._changed()
        return data

    def check(self) -> None:
        """Raise PublishError if the file has changed."""
        if self._now() != self._state:
            raise self._changed()

    def _changed(self) -> PublishError:
        return PublishError(f"{self._name} changed while it was being published; try again")

    def _now(self) -> tuple[int, int]:
        # No ctime: it changes with hard links to the file, too.
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns


class Sink:
    """A file being downloaded, hashed as its bytes arrive."""

    def __init__(self, file: BinaryIO, received: Callable[[int], None]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._received = received
        self.size = 0
        self.moved = time.monotonic()
        self.error: OSError | None = None

    def write(self, data: bytes) -> None:
        """Append data, and hash it."""
        self.put(data, self.size)
        self.add(data)

    def put(self, data: bytes, offset: int) -> None:
        """Write at an offset, from any thread.

        The error of a full disk is also kept in `error`, to distinguish it from one of the network.
        """
        view = memoryview(data)
        try:
            while view:
                written = os.pwrite(self._file.fileno(), view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            self.error = error
            raise

    def add(self, data: bytes | memoryview) -> None:
        """Hash the next data in order, which `put` has written."""
        self._digest.update(data)
        self.size += len(data)
        self.moved = time.monotonic()
        self._received(len(data))

    @property
    def sha256(self) -> str:
        """The hex sha256 of all data added so far."""
        return self._digest.hexdigest()


class Meter:
    """Sums up the bytes moved by several threads, and reports them to a listener."""

    def __init__(self, total: int, listener: Callable[[int, int], None] | None) -> None:
        self._done = 0
        self._total = total
        self._listener = listener
        self._lock = threading.Lock()

    def __call__(self, moved: int) -> None:
        """Add moved bytes; the sum is capped at the total, as parts may be sent again."""
        if self._listener:
            with self._lock:
                self._done = min(self._done + moved, self._total)
                self._listener(self._done, self._total)


def in_parallel(work: Callable[[T], R], items: Iterable[T], workers: int = WORKERS) -> list[R]:
    """Map over threads, results in order; the first error cancels items not yet begun."""
    with ThreadPoolExecutor(workers, thread_name_prefix="store") as pool:
        futures = [pool.submit(work, item) for item in items]
        try:
            return [future.result() for future in futures]
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def in_order(
    work: Callable[[T], R], items: Iterable[T], workers: int, ahead: int
) -> Generator[R, None, None]:
    """Map lazily over threads, results in order.

    At most `ahead` items are begun or wait to be taken. Close the generator, so that the work stops
    when the consumer fails.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="store") as pool:
        pending: deque[Future[R]] = deque()
        try:
            for item in items:
                pending.append(pool.submit(work, item))
                if len(pending) == ahead:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()
