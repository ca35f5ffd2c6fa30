"""Reading objects of S3: in one go, or in pieces that come side by side."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable
from functools import partial
from typing import Any, TypeVar

from rlhf.errors import ArtifactCorrupt
from rlhf.store.backend import Sink, in_order
from rlhf.store.s3_errors import CUT

T = TypeVar("T")

#: Seconds before the second try of what boto3 does not repeat; before each further one, twice that.
PAUSE = 0.1
_PIECE = 8 * 1024 * 1024
#: Pieces of a file in memory, and how many of them are on their way at once.
_AHEAD, _AT_ONCE = 6, 4
#: Large files at once.
_FILES = threading.BoundedSemaphore(2)
#: What is read at once, small enough for the processor's cache.
_CHUNK = 256 * 1024


def read(
    client: Any, where: dict[str, str], limit: int, take: Callable[[Any], T], **part: str
) -> tuple[T, dict[str, Any]]:
    """What `take` makes of the body, and the answer; boto3 repeats a request but not a body that
    was cut, so this does.

    Raises:
        ArtifactCorrupt: The body has more bytes than the limit.
    """
    for attempt in range(5):
        try:
            answer = client.get_object(**where, **part)
            with contextlib.closing(answer["Body"]) as body:
                if answer["ContentLength"] > limit:
                    break
                return take(body), answer
        except CUT:
            if attempt == 4:
                raise
            time.sleep(PAUSE * 2**attempt)
    name = f"s3://{where['Bucket']}/{where['Key']}"
    raise ArtifactCorrupt(f"{name} is larger than {limit} bytes; delete it")


def receive(client: Any, where: dict[str, str], sink: Sink) -> None:
    """An object in pieces, several at once: written as they come, and hashed in order.

    Buffers are used again and again, as fresh memory costs more than hashing, and are one block,
    as malloc gives nothing back that is smaller than 32 MiB. s3transfer would hang with a limit on
    the parts that it keeps in memory.
    """
    with _FILES:
        block = memoryview(bytearray(_AHEAD * _PIECE))
        free = [block[at : at + _PIECE] for at in range(0, len(block), _PIECE)]

        def piece(start: int, **same: str) -> tuple[memoryview, int, dict[str, Any]]:
            part, buffer = f"bytes={start}-{start + _PIECE - 1}", free.pop()
            take = partial(_fill, buffer, sink, start)
            return buffer, *read(client, where, _PIECE, take, Range=part, **same)

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
    """How much came; the last read, of nothing, has boto3 see whether that was all."""
    size = 0
    while data := body.read(_CHUNK):
        sink.put(data, start + size)
        buffer[size : size + len(data)] = data
        size += len(data)
    return size
