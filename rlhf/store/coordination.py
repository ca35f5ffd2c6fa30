"""Coordination of concurrent writers and garbage collectors without a lock server.

Atomic create, for any S3 server. With `If-None-Match: *` exactly one of several writers of a key
wins on AWS and Ceph. Other servers (OpenStack Swift) check for the object first and write later:
two concurrent writers both succeed, and one entry is lost silently. Each store is
probed once per process, and where the conditional write is weak a key is claimed before it is
written. To claim a key, a writer puts an object of its own beside other writers' claims and lists
them all. A writer whose claim is the only one may write; of several, the smallest waits and the
others withdraw. A second writer can't pass: its claim came after the first had listed, so it sees
the first claim or, once that is removed, what the first has written. This needs no conditional
write, only listings that show all earlier writes.

Garbage collection beside publishers. A collection announces itself under `gc/` before it looks at
the manifests, and leaves a trace there when it has ended. A publisher looks for both after it has
written its manifest. So either the collection has seen the manifest, or the publisher waits until
the collection ends, and sends again what was removed (`publish`).
"""

from __future__ import annotations

import contextlib
import logging
import random
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait

from rlhf.errors import StoreConfigError, StoreError
from rlhf.store.manifest import sha256_bytes
from rlhf.store.objects import Backend, ObjectInfo

#: Prefixes of the objects that serve coordination only; the collector removes old ones.
PROBES, CLAIMS, COLLECTIONS = "probe/", "claims/", "gc/"
TRACES = (PROBES, CLAIMS, COLLECTIONS)
#: Objects younger than this survive every garbage collection, whatever its grace period.
FRESH = 3600.0
#: A collection stops removing this long after its announcement, and publishers stop waiting.
COLLECTION_SECONDS = 600.0
_RUNNING, _ENDED = ".json", ".ended"

#: Writers in a race, and races of a probe.
RACERS = 16
ROUNDS = 3
#: How long to repeat a probe that proved nothing, and how long one holds a write back.
_PROBE_SECONDS, _HOLD_SECONDS = 15.0, 5.0
_CLAIMED = "names are claimed before they are written, which is slower"
_WEAK = (
    "%s: of several writers of one name more than one is told that it won (weak conditional "
    f"writes); {_CLAIMED}"
)
_UNPROVEN = (
    "%s: it could not be proven that of several writers of one name only one is told that it won "
    f"(conditional writes); {_CLAIMED}"
)
#: A claim this old belongs to a dead writer; a living one gives up long before.
_DEAD = 60.0
_GIVE_UP = 20.0
#: How long to retry claiming while other writers hold claims.
_PATIENCE = 120.0
_FIRST_PAUSE, _LONGEST_PAUSE = 0.1, 2.0

log = logging.getLogger("rlhf.store")
#: Results of `is_atomic` by the store's location.
_known: dict[str, bool] = {}
_known_lock = threading.Lock()


def create(backend: Backend, key: str, data: bytes) -> bool:
    """Create an object atomically: of several concurrent writers one gets True."""
    if is_atomic(backend):
        return backend.put_new(key, data)
    return _create_claimed(backend, key, data)


def is_atomic(backend: Backend) -> bool:
    """Return whether conditional writes are atomic; probed once per process and store."""
    with _known_lock:
        if backend.atomic is None:
            if backend.location not in _known:
                warning = _warning(backend)
                if warning:
                    log.warning(warning, backend.uri)
                _known[backend.location] = warning is None
            backend.atomic = _known[backend.location]
        return backend.atomic


@contextlib.contextmanager
def announced_collection(backend: Backend, dry_run: bool) -> Iterator[tuple[float, float]]:
    """Mark a garbage collection as running, then as ended, by objects under `gc/`.

    Yields its start by the local clock, and the age that the store reports for a new object.
    A dry run announces nothing, and writes its object only to learn that age.
    """
    name = f"{PROBES if dry_run else COLLECTIONS}{uuid.uuid4().hex}"
    key = name + _RUNNING
    began = time.monotonic()
    backend.put(key, b"{}")
    try:
        # Twice, as a bit may flip in a date: the larger age is the careful one.
        ages = [info.age if info else 0.0 for info in (backend.find(key), backend.find(key))]
        yield began, max(ages)
    finally:
        if not dry_run:
            backend.put(name + _ENDED, b"{}")
        backend.delete([key])


def collected_since(backend: Backend, began: float) -> bool:
    """Wait for running collections; return whether one may have run since `began`."""
    traces = wait_for_collection(backend)
    since = time.monotonic() - began + COLLECTION_SECONDS
    return any(info.age < since for info in traces.values())


def wait_for_collection(backend: Backend) -> dict[str, ObjectInfo]:
    """Wait until no garbage collection is running; returns the traces of all.

    A collection that died counts as ended after `COLLECTION_SECONDS`.
    """
    logged = False
    end = time.monotonic() + 2 * COLLECTION_SECONDS
    while True:
        traces = backend.list(COLLECTIONS)
        if not any(
            key.endswith(_RUNNING) and info.age < COLLECTION_SECONDS for key, info in traces.items()
        ):
            return traces
        if time.monotonic() > end:
            raise StoreError(
                f"{backend.uri}: {COLLECTIONS} says that garbage is being collected, and does not "
                "end; try again, or delete what is there"
            )
        if not logged:
            log.info("%s: garbage is being collected; waiting for it", backend.uri)
            logged = True
        time.sleep(1.0)


def _warning(backend: Backend) -> str | None:
    """Probe conditional writes; None if atomic, else the warning to log."""
    end = time.monotonic() + _PROBE_SECONDS
    winners = None
    try:
        while winners is None and backend.atomic is None and time.monotonic() < end:
            winners = overlapping_winners(backend)
    except StoreConfigError:
        raise
    except StoreError:  # such as a proxy that allows no pause; a broken store fails the race, too
        pass
    raced = racing_winners(backend) if winners in (None, 1) else winners
    # `put_new` sets it to False on a server without conditional writes (501).
    if raced != 1 or backend.atomic is not None:
        return _WEAK
    return _UNPROVEN if winners is None else None


def overlapping_winners(backend: Backend) -> int | None:
    """Count the successes of two overlapping writes to a key; None if inconclusive.

    The first write's body is held back, after the server has accepted it, until the second is
    complete. A server that checks first and writes later lets both win, however slow or fast it
    is; an atomic one refuses the first (412; 409 on AWS).
    """
    second: list[Future[bool]] = []
    with _probe_key(backend) as key, ThreadPoolExecutor(1, thread_name_prefix="probe") as pool:
        completed = False

        def hold() -> None:
            nonlocal completed
            second.append(pool.submit(backend.put_new, key, b"second"))
            # The limit is for a server that lets the second write wait for the first.
            completed = bool(wait(second, _HOLD_SECONDS).done)

        first = backend.put_new_held(key, b"first", hold)
        results = [first, *(future.result() for future in second)]
    return results.count(True) if completed and first is not None else None


def racing_winners(backend: Backend) -> int:
    """Return the most `put_new` successes for one key in any of `ROUNDS` races.

    It detects what overlapping requests do not: a server behind a proxy that buffers requests.
    """
    most = 0
    with ThreadPoolExecutor(RACERS, thread_name_prefix="probe") as pool:
        for _ in range(ROUNDS):
            line = threading.Barrier(RACERS)
            with _probe_key(backend) as key:

                def race(number: int, key: str = key, line: threading.Barrier = line) -> bool:
                    line.wait()
                    return backend.put_new(key, f"{number}".encode())

                most = max(most, list(pool.map(race, range(RACERS))).count(True))
    return most


@contextlib.contextmanager
def _probe_key(backend: Backend) -> Iterator[str]:
    key = f"{PROBES}{uuid.uuid4().hex}"
    try:
        yield key
    finally:
        # A bucket may forbid deletion; it can still hold artifacts.
        with contextlib.suppress(StoreConfigError):
            backend.delete([key])


def _create_claimed(backend: Backend, key: str, data: bytes) -> bool:
    """Create an object while holding a claim, for a store without atomic `put_new`."""
    prefix = f"{CLAIMS}{sha256_bytes(key.encode())[:32]}/"
    end = time.monotonic() + _PATIENCE
    pause = _FIRST_PAUSE
    while time.monotonic() < end:
        if backend.find(key) is not None:
            return False
        if _live_claims(backend, prefix):
            # A further claim would only delay the writers that hold these.
            time.sleep(random.uniform(pause / 2, pause))
            pause = min(2 * pause, _LONGEST_PAUSE)
            continue
        # Time comes first in the name: a late writer never overtakes one that waits already.
        claim = f"{prefix}{time.time_ns():020d}-{uuid.uuid4().hex}"
        begun = time.monotonic()
        backend.put(claim, b"")
        try:
            if _is_alone(backend, prefix, claim, begun + _GIVE_UP):
                if backend.find(key) is not None:
                    return False
                # The condition costs nothing, and is one more guard where it happens to hold.
                won = backend.put_new(key, data)
                is_late = time.monotonic() - begun > _GIVE_UP
                if not is_late:
                    return won and backend.get_bytes(key, len(data)) == data
                raise StoreError(
                    f"{backend.uri}: writing {key} took so long that others may have written it "
                    "too; try again"
                )
        finally:
            backend.delete([claim])
        time.sleep(random.uniform(pause / 2, pause))
        pause = min(2 * pause, _LONGEST_PAUSE)
    raise StoreError(f"{backend.uri}: {key} is being written by others; try again")


def _is_alone(backend: Backend, prefix: str, claim: str, end: float) -> bool:
    """Wait until the claim is the only one; False if another one sorts before it.

    False once it is not the smallest, was removed, or the deadline has passed.
    """
    while time.monotonic() < end:
        claims = _live_claims(backend, prefix)
        if claim not in claims:
            return False
        others = claims - {claim}
        if not others:
            return True
        if min(others) < claim:
            return False
        time.sleep(random.uniform(0.01, 0.05))
    return False


def _live_claims(backend: Backend, prefix: str) -> set[str]:
    """Return the claims of writers that may still be alive."""
    return {key for key, info in backend.list(prefix).items() if info.age < _DEAD}
