"""Create-only writes that hold on a server whose own do not.

S3's `If-None-Match: *` lets exactly one of several writers win, on AWS and Ceph. Other servers look
first and write then, so that two at once may both be told that they won, and one entry is lost
without a word. Whether a server is of that kind is only seen by trying; on one that is, a name is
claimed before it is written to.

The claim: a writer puts an object of its own beside the others' and then lists them all. Who is
alone may write; of several, the smallest name stays and waits, the others step back. A second one
can't pass: its claim came after the first had listed, so it sees the first's claim, or, once that
is gone, what the first has written. It needs no conditional write, only that a listing shows what
was written before it.
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

from rlhf.errors import StoreConfigError, StoreError
from rlhf.store.backend import Backend
from rlhf.store.manifest import sha256_bytes

RACERS = 16
ROUNDS = 3
PROBES = "probe/"
CLAIMS = "claims/"
#: A claim this old is a dead writer's; a living one gives up long before.
_DEAD = 60.0
_GIVE_UP = 20.0
#: How long to go on claiming while others do.
_PATIENCE = 120.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0

log = logging.getLogger("rlhf.store")
_known: dict[str, bool] = {}
_known_lock = threading.Lock()


def create(backend: Backend, key: str, data: bytes) -> bool:
    """Create the object, or return False; of several writers at once exactly one gets True."""
    if is_atomic(backend):
        return backend.put_new(key, data)
    return _create_claimed(backend, key, data)


def is_atomic(backend: Backend) -> bool:
    """Whether the server's own create-only writes hold; tried once per process and store."""
    with _known_lock:
        if backend.atomic is None:
            if backend.uri not in _known:
                _known[backend.uri] = winners(backend) == 1 and backend.atomic is not False
                if not _known[backend.uri]:
                    log.warning(
                        "%s: of several writers of one name more than one is told that it won "
                        "(weak conditional writes); names are claimed before they are written, "
                        "which is slower", backend.uri,
                    )  # fmt: skip
            backend.atomic = _known[backend.uri]
        return backend.atomic


def winners(backend: Backend) -> int:
    """The most writers that won a race for one key, in a few races."""
    most = 0
    with ThreadPoolExecutor(RACERS, thread_name_prefix="probe") as pool:
        for _ in range(ROUNDS):
            key = f"{PROBES}{uuid.uuid4().hex}"
            line = threading.Barrier(RACERS)

            def race(number: int, key: str = key, line: threading.Barrier = line) -> bool:
                line.wait()
                return backend.put_new(key, f"{number}".encode())

            try:
                most = max(most, list(pool.map(race, range(RACERS))).count(True))
            finally:
                # A bucket that forbids deletion is a good home for artifacts.
                with contextlib.suppress(StoreConfigError):
                    backend.delete([key])
    return most


def _create_claimed(backend: Backend, key: str, data: bytes) -> bool:
    place = f"{CLAIMS}{sha256_bytes(key.encode())[:32]}/"
    end = time.monotonic() + _PATIENCE
    pause = _FIRST_PAUSE
    while time.monotonic() < end:
        if backend.find(key) is not None:
            return False
        if _claims(backend, place):
            # One more would only keep them waiting.
            time.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, _LONGEST_PAUSE)
            continue
        # Who comes late has a large name: it does not take the turn of who waits already.
        mine = f"{place}{time.time_ns():020d}-{uuid.uuid4().hex}"
        begun = time.monotonic()
        backend.put(mine, b"")
        try:
            if _is_alone(backend, place, mine, begun + _GIVE_UP):
                if backend.find(key) is not None:
                    return False
                # The condition costs nothing, and where it holds by chance it is one more guard.
                won = backend.put_new(key, data)
                late = time.monotonic() - begun > _GIVE_UP
                if not late:
                    return won and backend.get_bytes(key, len(data)) == data
                raise StoreError(
                    f"{backend.uri}: writing {key} took so long that others may have written it "
                    "too; try again"
                )
        finally:
            backend.delete([mine])
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, _LONGEST_PAUSE)
    raise StoreError(f"{backend.uri}: {key} is being written by others; try again")


def _is_alone(backend: Backend, place: str, mine: str, end: float) -> bool:
    """Wait while our claim is the smallest; False as soon as another's is, or when time is up."""
    while time.monotonic() < end:
        claims = _claims(backend, place)
        if mine not in claims:
            return False
        others = claims - {mine}
        if not others:
            return True
        if min(others) < mine:
            return False
        time.sleep(random.uniform(0.01, 0.05))
    return False


def _claims(backend: Backend, place: str) -> set[str]:
    """Those of living writers."""
    return {key for key, found in backend.list(place).items() if found.age < _DEAD}
