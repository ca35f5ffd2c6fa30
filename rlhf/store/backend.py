"""The little that the artifact store asks of an object store."""

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

WORKERS = 8
#: Up to this size a file is read once, into memory, and sent or received in one request.
SMALL = 16 * 1024 * 1024


class Found(NamedTuple):
    """An object that is there: its bytes, and its age in seconds by the store's clock."""

    size: int
    age: float


class Backend(Protocol):
    """Keys to bytes. Every method raises StoreError subclasses only, naming store and key."""

    uri: str
    #: Whether of several `put_new` of one key at once exactly one succeeds; None if not known.
    atomic: bool | None

    def put_new(self, key: str, data: bytes) -> bool:
        """Create the object whole, or return False and leave the existing one alone."""
        ...

    def put_new_held(self, key: str, data: bytes, hold: Callable[[], None]) -> bool | None:
        """`put_new` that calls `hold` in mid-body, after the server has accepted the request.

        None if it proves nothing: the server did not say that it reads the body, or the request
        had to be repeated.
        """
        ...

    def put(self, key: str, data: bytes) -> None:
        """Store an object whole, replacing what was there."""
        ...

    def put_file(self, key: str, source: Source) -> None:
        """Store a large file whole, replacing what was there; PublishError if it changes."""
        ...

    def get_bytes(self, key: str, limit: int) -> bytes:
        """A small object; ArtifactMissing if it is absent, ArtifactCorrupt beyond the limit."""
        ...

    def get_file(self, key: str, sink: Sink) -> None:
        """Write an object into the sink, in order; ArtifactMissing if it is absent."""
        ...

    def find(self, key: str) -> Found | None:
        """Size and age of an object, None if it is absent."""
        ...

    def list(self, prefix: str) -> dict[str, Found]:
        """The keys that start with the prefix, sorted."""
        ...

    def delete(self, keys: Iterable[str]) -> None:
        """Remove objects; absent is fine."""
        ...

    def sweep(self, age: float) -> int:
        """Remove what unfinished uploads left behind that long ago; how many there were."""
        ...

    def hurried(self, seconds: float) -> Backend:
        """The same store, giving up on an answer after this long (for a probe)."""
        ...

    def close(self) -> None:
        """Close idle connections; further calls open new ones."""
        ...

    def child(self, name: str) -> Backend:
        """The store under that name of this one."""
        ...


class Source:
    """A file on its way up. Its size was taken before it was hashed; any change since is an error,
    which is seen before an upload is completed: no other bytes than those that were hashed ever
    become a whole object.
    """

    def __init__(self, file: BinaryIO, name: str, sent: Callable[[int], None]) -> None:
        self._file = file
        self._name = name
        self._state = self._now()
        self.size = self._state[0]
        self.sent = sent

    def sha256(self) -> str:
        """Hash the file, and go back to its beginning."""
        digest = hashlib.file_digest(cast("io.BufferedReader", self._file), "sha256").hexdigest()
        self._file.seek(0)
        return digest

    def read(self) -> bytes:
        """All of it."""
        data = self._file.read()
        self.check()
        return data

    def chunks(self) -> Iterator[bytes]:
        """All of it, in pieces; the last comes only if the file is still what it was."""
        for offset in range(0, self.size, 1 << 20):
            data = self.read_at(offset, 1 << 20)
            if offset + len(data) >= self.size:
                self.check()
            self.sent(len(data))
            yield data

    def read_at(self, offset: int, size: int) -> bytes:
        """Some of it; from any thread. It is less than that at the end only."""
        data = os.pread(self._file.fileno(), size, offset)
        if len(data) != min(size, self.size - offset):
            raise self._changed()
        return data

    def check(self) -> None:
        """PublishError if the file is not what it was."""
        if self._now() != self._state:
            raise self._changed()

    def _changed(self) -> PublishError:
        return PublishError(f"{self._name} changed while it was being published; try again")

    def _now(self) -> tuple[int, int]:
        # No ctime: it tells of links to the file as well.
        state = os.fstat(self._file.fileno())
        return state.st_size, state.st_mtime_ns


class Sink:
    """A file on its way down, hashed as it comes."""

    def __init__(self, file: BinaryIO, received: Callable[[int], None]) -> None:
        self._file = file
        self._digest = hashlib.sha256()
        self._received = received
        self.size = 0
        self.moved = time.monotonic()
        self.error: OSError | None = None

    def write(self, data: bytes) -> None:
        """Append."""
        self.put(data, self.size)
        self.add(data)

    def put(self, data: bytes, offset: int) -> None:
        """Write to a place in the file, from any thread; a disk that is full is kept apart from a
        network that fails.
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
        """Hash what was put behind all that was added so far."""
        self._digest.update(data)
        self.size += len(data)
        self.moved = time.monotonic()
        self._received(len(data))

    @property
    def sha256(self) -> str:
        """Of all that was added."""
        return self._digest.hexdigest()


class Meter:
    """Adds up the bytes that several threads have moved, and tells a listener."""

    def __init__(self, total: int, listener: Callable[[int, int], None] | None) -> None:
        self._done = 0
        self._total = total
        self._listener = listener
        self._lock = threading.Lock()

    def __call__(self, moved: int) -> None:
        """Count; what has to be sent again counts once."""
        if self._listener:
            with self._lock:
                self._done = min(self._done + moved, self._total)
                self._listener(self._done, self._total)


def in_parallel(work: Callable[[T], R], items: Iterable[T], workers: int = WORKERS) -> list[R]:
    """Map over threads in order; the first error cancels what has not begun."""
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
    """Map over threads; results come in order, with no more than so many begun or in waiting.

    Close it, so that nothing goes on when what takes the results fails.
    """
    with ThreadPoolExecutor(workers, thread_name_prefix="store") as pool:
        begun: deque[Future[R]] = deque()
        try:
            for item in items:
                begun.append(pool.submit(work, item))
                if len(begun) == ahead:
                    yield begun.popleft().result()
            while begun:
                yield begun.popleft().result()
        finally:
            for future in begun:
                future.cancel()
