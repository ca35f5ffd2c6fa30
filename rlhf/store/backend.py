"""The little that the artifact store asks of an object store."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Protocol, TypeVar

T = TypeVar("T")
R = TypeVar("R")

WORKERS = 8


class Backend(Protocol):
    """Keys to bytes. Every method raises StoreError subclasses only, naming store and key."""

    uri: str

    def put_new(self, key: str, data: bytes) -> bool:
        """Create the object whole, or return False and leave the existing one alone."""
        ...

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        """Store a file whole, replacing what was there; PublishError if it has other bytes."""
        ...

    def get_bytes(self, key: str, limit: int) -> bytes:
        """A small object; ArtifactMissing if it is absent, ArtifactCorrupt beyond the limit."""
        ...

    def get_file(self, key: str, path: Path) -> None:
        """Download an object to a new file; ArtifactMissing if it is absent."""
        ...

    def size(self, key: str) -> int | None:
        """Bytes of an object, None if it is absent."""
        ...

    def list(self, prefix: str) -> list[str]:
        """Sorted keys that start with the prefix."""
        ...

    def delete(self, key: str) -> None:
        """Remove an object; absent is fine."""
        ...

    def hurried(self, seconds: float) -> Backend:
        """The same store, giving up on an answer after this long (for a probe)."""
        ...


def in_parallel(work: Callable[[T], R], items: Iterable[T]) -> list[R]:
    """Map over threads in order; the first error cancels what has not begun."""
    with ThreadPoolExecutor(WORKERS, thread_name_prefix="store") as pool:
        return list(pool.map(work, items))
