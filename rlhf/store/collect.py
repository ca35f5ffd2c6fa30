"""Garbage collection: what nothing refers to goes, and nobody who publishes meanwhile is hurt.

What stays is what a reference, a pin or an artifact younger than the grace time leads to, through
all parents; and whatever is itself younger than that. Ages are by the store's clock.

A collection first puts an object under `gc/`, and only then looks at what is there; another one
says that it has ended. A publisher looks for them after it has written its manifest
(`rlhf.store.publish`): so either the collection sees the manifest, or the publisher waits, and
sends again what was removed.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import ArtifactMissing, StoreError
from rlhf.store.backend import Backend, Found, in_parallel
from rlhf.store.coordination import COLLECTION_SECONDS, FRESH, TRACES, announced_collection
from rlhf.store.manifest import Manifest, blob_key, manifest_key
from rlhf.store.pins import Pins
from rlhf.store.refs import open_sealed

#: Seconds that everything is left alone for.
GRACE = 24 * 3600.0
#: Checkpoints of a run that nobody has gone on with for this long are of no use any more.
ABANDONED = 30 * 24 * 3600.0
#: Time to spare between the last removal and the moment from which publishers stop waiting.
_MARGIN = 330.0
_BATCH = 1000
_DIGEST = re.compile(r"[0-9a-f]{64}")
_CHECKPOINTS = re.compile(r"checkpoints/((?P<stage>.+)-(?P<key>[0-9a-f]{16}))/.*")
_MANIFEST = re.compile(r"manifests/[0-9a-f]{64}\.json")


@dataclass
class Garbage:
    """What a collection found, and whether it removed it."""

    artifacts: list[str] = field(default_factory=list)
    """Digests of manifests that nothing refers to."""
    keys: list[str] = field(default_factory=list)
    """All objects to remove, manifests first: an artifact must never be there without its blobs."""
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
    """Find what nothing refers to, and remove it unless this is a dry run.

    Args:
        backend: The store's backend.
        read_manifest: Reads and verifies the manifest of a digest.
        grace: Seconds; younger objects stay. Less than two hours is for a store that nobody
            publishes to: publishers rely on it that what is an hour old stays.
        dry_run: Only look.

    Raises:
        ArtifactCorrupt: A manifest that something refers to can't be read, so its blobs are not
            known; nothing is removed.
        StoreError: The store failed, or the collection took too long for one go; what it has
            removed by then was garbage, and it can be run again.
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


def retain(backend: Backend, kept: Mapping[str, Manifest]) -> None:
    """Remove all artifacts but these; nobody else may be publishing."""
    wanted = _objects_of(kept)
    for prefix in ("manifests/", "blobs/"):
        backend.delete([key for key in backend.list(prefix) if key not in wanted])


def _find(
    backend: Backend, read_manifest: Callable[[str], Manifest], grace: float, skew: float
) -> Garbage:
    blobs = _Listing(backend, "blobs/")
    # Manifests are listed after the blobs, so that none of a new artifact is taken for garbage.
    manifests = _Listing(backend, "manifests/")
    entries = _Listing(backend, "refs/").all
    young = [_digest(key) for key, found in manifests.all.items() if found.age < grace]
    kept = _reachable(read_manifest, {*young, *_roots(backend, entries)})
    wanted = _objects_of(kept)
    garbage = Garbage(kept=len(kept))
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


def _objects_of(kept: Mapping[str, Manifest]) -> set[str]:
    """Keys of these manifests and of their blobs."""
    blobs = {blob_key(entry.sha256) for manifest in kept.values() for entry in manifest.files}
    return blobs | {manifest_key(digest) for digest in kept}


class _Listing:
    """What two listings say. A bit that flips in one must not make anything look like garbage.

    `all` are the keys of either, `sure` those of both, each as young as it was said to be.
    """

    def __init__(self, backend: Backend, prefix: str) -> None:
        one, two = backend.list(prefix), backend.list(prefix)
        self.all = {
            key: min((each[key] for each in (one, two) if key in each), key=lambda f: f.age)
            for key in sorted({*one, *two})
        }
        self.sure = {key: found for key, found in self.all.items() if key in one and key in two}


def _digest(key: str) -> str:
    return key.removeprefix("manifests/").removesuffix(".json")


def _roots(backend: Backend, entries: Iterable[str]) -> set[str]:
    """All that looks like a digest in references (records, the champions …) and in pins."""

    def read(key: str) -> dict[str, Any]:
        try:
            return open_sealed(backend, key)
        except ArtifactMissing:  # a bit of its name flipped in a listing, or it is gone since
            return {}

    found = in_parallel(read, entries)
    return {digest for payload in found for digest in _digests(payload)} | {
        *Pins(backend).by_name().values()
    }


def _digests(value: Any) -> Iterator[str]:
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
    """The manifests of these digests and of all their ancestors, as far as they are there."""

    def read(digest: str) -> Manifest | None:
        try:
            return read_manifest(digest)
        except ArtifactMissing:
            return None

    found: dict[str, Manifest] = {}
    seen: set[str] = set()
    fresh = {*roots}
    while fresh:
        seen |= fresh
        order = sorted(fresh)
        manifests = zip(order, in_parallel(read, order), strict=True)
        there = {digest: manifest for digest, manifest in manifests if manifest}
        found |= there
        fresh = {parent for each in there.values() for parent in each.parents.values()} - seen
    return found


def _checkpoints(
    objects: Mapping[str, Found], entries: Iterable[str], grace: float, skew: float
) -> dict[str, int]:
    """Checkpoints of work that is done, or that nobody has gone on with for a month."""
    groups: dict[str, dict[str, Found]] = {}
    for key, found in objects.items():
        match = _CHECKPOINTS.fullmatch(key)
        if match:
            groups.setdefault(match[1], {})[key] = found
    records = {tuple(key.split("/")[2:4]) for key in entries if key.startswith("refs/records/")}
    done = {f"{stage}-{key[:16]}" for stage, key in (r for r in records if len(r) == 2)}
    garbage: dict[str, int] = {}
    for name, group in groups.items():
        youngest = min(found.age for found in group.values())
        if youngest >= (grace if name in done else ABANDONED + skew):
            garbage |= {key: found.size for key, found in group.items()}
    return garbage
