"""Reading of objects in a bucket, whole or in parallel ranges, and of what answers say of them.

`s3` writes, lists and removes them.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from datetime import UTC, datetime
from email.utils import parsedate_to_datetime
from functools import partial
from typing import Any, TypeVar

from rlhf.errors import ArtifactCorrupt
from rlhf.store.objects import Sink, in_order
from rlhf.store.s3_errors import CUT

T = TypeVar("T")

#: Pause in seconds before the first retry of a body that was cut; then doubled.
PAUSE = 0.1
#: Bytes of a range.
_PIECE = 8 * 1024 * 1024
#: Ranges of a file in memory, and how many of them are requested at once.
_AHEAD, _AT_ONCE = 6, 4
#: Large files read at once.
_FILES = threading.BoundedSemaphore(2)
#: Bytes per read, small enough for the processor's cache.
_CHUNK = 256 * 1024


def read_object(
    client: Any, address: dict[str, str], limit: int, take: Callable[[Any], T], **part: str
) -> tuple[T, dict[str, Any]]:
    """Read an object by `take`; returns its result and the answer.

    A body that was cut is requested again, which boto3 does not do.

    Raises:
        ArtifactCorrupt: The body has more bytes than the limit.
    """
    for attempt in range(5):
        try:
            answer = client.get_object(**address, **part)
            with contextlib.closing(answer["Body"]) as body:
                if answer["ContentLength"] > limit:
                    break
                return take(body), answer
        except CUT:
            if attempt == 4:
                raise
            time.sleep(PAUSE * 2**attempt)
    name = f"s3://{address['Bucket']}/{address['Key']}"
    raise ArtifactCorrupt(f"{name} is larger than {limit} bytes; delete it")


def receive_object(client: Any, address: dict[str, str], sink: Sink) -> None:
    """Read an object in parallel ranges, hashed in order.

    The buffers are reused, as fresh memory costs more than hashing, and lie in one block, as malloc
    does not return smaller ones than 32 MiB to the system. s3transfer hangs with a limit on the
    parts that it keeps in memory.
    """
    with _FILES:
        block = memoryview(bytearray(_AHEAD * _PIECE))
        free = [block[at : at + _PIECE] for at in range(0, len(block), _PIECE)]

        def piece(start: int, **same: str) -> tuple[memoryview, int, dict[str, Any]]:
            part, buffer = f"bytes={start}-{start + _PIECE - 1}", free.pop()
            take = partial(_fill, buffer, sink, start)
            return buffer, *read_object(client, address, _PIECE, take, Range=part, **same)

        def add(buffer: memoryview, size: int) -> None:
            sink.add(buffer[:size])
            free.append(buffer)

        buffer, size, answer = piece(0)
        add(buffer, size)
        starts = range(_PIECE, int(answer["ContentRange"].rpartition("/")[2]), _PIECE)
        rest = in_order(partial(piece, IfMatch=answer["ETag"]), starts, _AT_ONCE, _AHEAD)
        with contextlib.closing(rest):
            for buffer, size, _ in rest:
                add(buffer, size)


def _fill(buffer: memoryview, sink: Sink, start: int, body: Any) -> int:
    """Fill the buffer and return the size; reads to the end, for boto3's checks."""
    size = 0
    while data := body.read(_CHUNK):
        sink.put(data, start + size)
        buffer[size : size + len(data)] = data
        size += len(data)
    return size


def is_archived(answer: dict[str, Any]) -> bool:
    """Return whether an object lies in an archive, and no readable copy was restored."""
    archive = answer.get("StorageClass") in ("GLACIER", "DEEP_ARCHIVE") or (
        answer.get("ArchiveStatus") is not None
    )
    return archive and 'ongoing-request="false"' not in str(answer.get("Restore", ""))


def age_of(modified: datetime, now: datetime | None) -> float:
    """Return an age in seconds; 0 without a date, as young objects are kept."""
    return (now - modified).total_seconds() if now else 0.0


def date_of(answer: dict[str, Any]) -> datetime | None:
    """Return the server's time from an answer, None if it is missing or damaged."""
    date = answer["ResponseMetadata"]["HTTPHeaders"].get("date")
    if not date:
        return None
    try:
        parsed = parsedate_to_datetime(date)
    except ValueError:
        return None
    return parsed if parsed.tzinfo else parsed.replace(tzinfo=UTC)
