"""Garbage collection of unreferenced artifacts, safe beside publishers.

A collection keeps artifacts that a history, a pin or an artifact younger than the grace period
refers to, through all parents, and every object younger than that. Ages are by the store's clock.
`coordination` describes how a collection and a publisher see each other.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import ArtifactMissing, StoreError
from rlhf.store.coordination import COLLECTION_SECONDS, FRESH, TRACES, announced_collection
from rlhf.store.history import Pins, open_sealed
from rlhf.store.manifest import Manifest, blob_key, manifest_key
from rlhf.store.objects import Backend, ObjectInfo, in_parallel

#: Grace period in seconds: younger objects are kept.
GRACE = 24 * 3600.0
#: Seconds after which the checkpoints of a run that was not resumed are garbage.
ABANDONED = 30 * 24 * 3600.0
#: Seconds between the last removal and the moment when publishers stop waiting.
_MARGIN = 330.0
_BATCH = 1000

_DIGEST = re.compile(r"[0-9a-f]{64}")
_MANIFEST = re.compile(r"manifests/[0-9a-f]{64}\.json")
_CHECKPOINTS = re.compile(r"checkpoints/((?P<stage>.+)-(?P<key>[0-9a-f]{16}))/.*")


@dataclass
class Garbage:
    """Result of a garbage collection."""

    artifacts: list[str] = field(default_factory=list)
    """Digests of manifests that nothing refers to."""
    keys: list[str] = field(default_factory=list)
    """All objects to remove, manifests first: no artifact must ever lack its blobs."""
    size: int = 0
    """Bytes of these objects."""
    kept: int = 0
    """Artifacts that stay."""
    uploads: int = 0
    """Unfinished uploads that were removed."""
    removed: bool = False
    """False after a dry run."""


def collect(
    backend: Backend, read_manifest: Callable[[str], Manifest], *, grace: float, dry_run: bool
) -> Garbage:
    """Find unreferenced objects, and remove them unless this is a dry run.

    Args:
        backend: The store's backend.
        read_manifest: Reads and verifies the manifest of a digest.
        grace: Seconds; younger objects are kept. Less than two hours is for a store without
            publishers, which rely on objects of up to an hour to stay.
        dry_run: Remove nothing.

    Raises:
        ArtifactCorrupt: A referenced manifest can't be read, so its blobs are not known; nothing
            is removed.
        StoreError: The store failed, or the collection took too long for one go; all it removed
            was garbage, and it can be run again.
    """
    with announced_collection(backend, dry_run) as (began, skew):
        garbage = _find(backend, read_manifest, grace + skew, skew)
        if not dry_run:
            for at in range(0, len(garbage.keys), _BATCH):
                if time.monotonic() - began > COLLECTION_SECONDS - _MARGIN:
                    raise StoreError(
                        f"{backend.uri}: collecting garbage took too long for one go; run it again"
                    )
                backend.delete(garbage.keys[at : at + _BATCH])
            garbage.uploads = backend.sweep(grace + skew)
            garbage.removed = True
    return garbage


def retain(backend: Backend, manifests: Mapping[str, Manifest]) -> None:
    """Remove all other artifacts; nothing may be published meanwhile."""
    wanted = _objects_of(manifests)
    for prefix in ("manifests/", "blobs/"):
        backend.delete([key for key in backend.list(prefix) if key not in wanted])


def _find(
    backend: Backend, read_manifest: Callable[[str], Manifest], grace: float, skew: float
) -> Garbage:
    """Find the objects that nothing refers to, except young ones.

    Args:
        backend: The store's backend.
        read_manifest: Reads and verifies the manifest of a digest.
        grace: Seconds; younger objects are no garbage. It includes `skew`.
        skew: Age that the store reports for a new object.
    """
    blobs = _Listing(backend, "blobs/")
    # Manifests are listed after the blobs, so that no blob of a new artifact looks like garbage.
    manifests = _Listing(backend, "manifests/")
    entries = _Listing(backend, "refs/").all
    young = [_digest(key) for key, info in manifests.all.items() if info.age < grace]
    retained = _reachable(read_manifest, {*young, *_roots(backend, entries)})
    wanted = _objects_of(retained)
    garbage = Garbage(kept=len(retained))
    sizes = {
        k: f.size for k, f in manifests.sure.items() if k not in wanted and _MANIFEST.fullmatch(k)
    }
    garbage.artifacts = [_digest(key) for key in sizes]
    sizes |= {k: f.size for k, f in blobs.sure.items() if k not in wanted and f.age >= grace}
    sizes |= _checkpoints(_Listing(backend, "checkpoints/").sure, entries, grace, skew)
    for prefix in TRACES:
        old = max(grace, FRESH + skew)
        sizes |= {k: f.size for k, f in backend.list(prefix).items() if f.age >= old}
    garbage.keys, garbage.size = list(sizes), sum(sizes.values())
    return garbage


class _Listing:
    """Two listings combined, in case a bit error hides or alters an entry of one.

    `all` holds the keys of either, `sure` those of both, each with the lower age.
    """

    def __init__(self, backend: Backend, prefix: str) -> None:
        one, two = backend.list(prefix), backend.list(prefix)
        self.all = {
            key: min((each[key] for each in (one, two) if key in each), key=lambda f: f.age)
            for key in sorted({*one, *two})
        }
        self.sure = {key: info for key, info in self.all.items() if key in one and key in two}


def _digest(key: str) -> str:
    """Return the digest in a manifest's key."""
    return key.removeprefix("manifests/").removesuffix(".json")


def _roots(backend: Backend, entries: Iterable[str]) -> set[str]:
    """Return the strings in histories and pins that look like digests."""

    def read(key: str) -> dict[str, Any]:
        try:
            return open_sealed(backend, key)
        except ArtifactMissing:  # its name was damaged in a listing, or it was removed since
            return {}

    payloads = in_parallel(read, entries)
    return {digest for payload in payloads for digest in _digests(payload)} | {
        *Pins(backend).by_name().values()
    }


def _digests(value: Any) -> Iterator[str]:
    """Yield the strings in a JSON value that look like digests."""
    if isinstance(value, str):
        if _DIGEST.fullmatch(value):
            yield value
    elif isinstance(value, Mapping):
        for each in value.values():
            yield from _digests(each)
    elif isinstance(value, list):
        for each in value:
            yield from _digests(each)


def _reachable(
    read_manifest: Callable[[str], Manifest], roots: Iterable[str]
) -> dict[str, Manifest]:
    """Return the existing manifests of these digests and of all their ancestors."""

    def read(digest: str) -> Manifest | None:
        try:
            return read_manifest(digest)
        except ArtifactMissing:
            return None

    reachable: dict[str, Manifest] = {}
    visited: set[str] = set()
    frontier = {*roots}
    while frontier:
        visited |= frontier
        order = sorted(frontier)
        manifests = zip(order, in_parallel(read, order), strict=True)
        existing = {digest: manifest for digest, manifest in manifests if manifest}
        reachable |= existing
        parents = {digest for each in existing.values() for digest in each.parents.values()}
        frontier = parents - visited
    return reachable


def _objects_of(manifests: Mapping[str, Manifest]) -> set[str]:
    """Return the keys of these manifests and of their blobs."""
    blobs = {blob_key(entry.sha256) for each in manifests.values() for entry in each.files}
    return blobs | {manifest_key(digest) for digest in manifests}


def _checkpoints(
    objects: Mapping[str, ObjectInfo], entries: Iterable[str], grace: float, skew: float
) -> dict[str, int]:
    """Return key and size of checkpoints of finished stages and of abandoned runs."""
    groups: dict[str, dict[str, ObjectInfo]] = {}
    for key, info in objects.items():
        match = _CHECKPOINTS.fullmatch(key)
        if match:
            groups.setdefault(match[1], {})[key] = info
    records = {tuple(key.split("/")[2:4]) for key in entries if key.startswith("refs/records/")}
    done = {f"{stage}-{key[:16]}" for stage, key in (r for r in records if len(r) == 2)}
    garbage: dict[str, int] = {}
    for name, group in groups.items():
        youngest = min(info.age for info in group.values())
        if youngest >= (grace if name in done else ABANDONED + skew):
            garbage |= {key: info.size for key, info in group.items()}
    return garbage
