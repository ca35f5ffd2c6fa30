"""Garbage collection of unreferenced artifacts, safe beside publishers.

A collection keeps artifacts that a history, a pin or an artifact younger than the grace period
refers to, through all parents, and every object younger than that. Ages are by the store's clock.
Records of old runs are let go of on demand (`retention`).
`coordination` describes how a collection and a publisher see each other.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import ArtifactMissing, StoreError
from rlhf.store.coordination import COLLECTION_SECONDS, FRESH, TRACES, announced_collection
from rlhf.store.history import Pins, open_sealed
from rlhf.store.manifest import Manifest, blob_key, manifest_key
from rlhf.store.objects import Backend, ObjectInfo, in_parallel
from rlhf.store.retention import (
    ABANDONED,
    RECORDS,
    Entry,
    Retained,
    Retention,
    by_history,
    ended_work,
    retain_all,
    retain_used,
)

#: Grace period in seconds: younger objects are kept.
GRACE = 24 * 3600.0
#: Seconds between the last removal and the moment when publishers stop waiting.
_MARGIN = 330.0
_BATCH = 1000

_MANIFEST = re.compile(r"manifests/[0-9a-f]{64}\.json")
_CHECKPOINTS = re.compile(r"checkpoints/((?P<stage>.+)-(?P<key>[0-9a-f]{16}))/.*")


@dataclass
class Garbage:
    """Result of a garbage collection."""

    artifacts: list[str] = field(default_factory=list)
    """Digests of manifests that nothing refers to."""
    keys: list[str] = field(default_factory=list)
    """All objects to remove, records and then manifests first: no artifact must lack its blobs."""
    size: int = 0
    """Bytes of these objects."""
    kept: int = 0
    """Artifacts that stay."""
    records: list[str] = field(default_factory=list)
    """Names of the records that are let go of."""
    runs: int | None = None
    """Runs with a report, if records are let go of."""
    contents: dict[str, tuple[str, int]] = field(default_factory=dict)
    """Kind and size of the artifacts, by digest, if records are let go of."""
    versions: str = ""
    """What the store keeps of removed objects, in words; empty if nothing."""
    uploads: int = 0
    """Unfinished uploads that were removed."""
    removed: bool = False
    """False after a dry run."""


def collect(
    backend: Backend, read_manifest: Callable[[str], Manifest], *, grace: float, dry_run: bool,
    retention: Retention | None = None,
) -> Garbage:  # fmt: skip
    """Find unreferenced objects, and remove them unless this is a dry run.

    Args:
        backend: The store's backend.
        read_manifest: Reads and verifies the manifest of a digest.
        grace: Seconds; younger objects are kept. Less than two hours is for a store without
            publishers, which rely on objects of up to an hour to stay.
        dry_run: Remove nothing.
        retention: Which records to let go of, with what they alone keep; None keeps all.

    Raises:
        ArtifactCorrupt: A referenced manifest can't be read, so its blobs are not known; nothing
            is removed.
        StoreError: The store failed, or the collection took too long for one go; all it removed
            was garbage, and it can be run again.
    """
    with announced_collection(backend, dry_run) as (began, skew):
        garbage = _find(backend, read_manifest, retention, grace + skew, skew)
        garbage.versions = backend.versions()
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
    backend: Backend, read_manifest: Callable[[str], Manifest], retention: Retention | None,
    grace: float, skew: float,
) -> Garbage:  # fmt: skip
    """Find the objects that nothing refers to, except young ones.

    Args:
        backend: The store's backend.
        read_manifest: Reads and verifies the manifest of a digest.
        retention: Which records to let go of; None keeps all.
        grace: Seconds; younger objects are no garbage. It includes `skew`.
        skew: Age that the store reports for a new object.
    """
    blobs = _Listing(backend, "blobs/")
    # Manifests are listed after the blobs, so that no blob of a new artifact looks like garbage.
    manifests = _Listing(backend, "manifests/")
    refs = _Listing(backend, "refs/")
    entries = by_history(refs.all, _payloads(backend, refs.all))
    kept = {_digest(key) for key, info in manifests.all.items() if info.age < grace}
    kept |= {*Pins(backend).by_name().values()}
    ended = ended_work(entries, skew)
    if retention is None:
        retained = retain_all(read_manifest, entries, kept, ended)
    else:
        retained = retain_used(
            read_manifest, retention, entries, manifests.all, kept, ended, grace
        )  # fmt: skip
    wanted = _objects_of(retained.manifests)
    garbage = Garbage(kept=len(retained.manifests), runs=retained.runs)
    let_go = _let_go(retained, entries, grace)
    # Before their artifacts: a record without one would only be read in vain.
    sizes = {key: refs.sure[key].size for key in let_go if key in refs.sure}
    garbage.records = sorted({e.name for e in let_go.values() if e.name.startswith(RECORDS)})
    for key, info in manifests.sure.items():
        if key not in wanted and _MANIFEST.fullmatch(key):
            digest = _digest(key)
            garbage.artifacts.append(digest)
            if digest in retained.others:
                garbage.contents[digest] = retained.others[digest]
            sizes[key] = info.size
    sizes |= {k: f.size for k, f in blobs.sure.items() if k not in wanted and f.age >= grace}
    sizes |= _checkpoints(_Listing(backend, "checkpoints/").sure, refs.all, grace, skew)
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


def _payloads(backend: Backend, keys: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Read entries of histories, by key."""

    def read(key: str) -> dict[str, Any]:
        try:
            return open_sealed(backend, key)
        except ArtifactMissing:  # its name was damaged in a listing, or it was removed since
            return {}

    order = [*keys]
    return dict(zip(order, in_parallel(read, order), strict=True))


def _let_go(retained: Retained, entries: Iterable[Entry], grace: float) -> dict[str, Entry]:
    """Return the entries, by key, of the histories that are not needed; young ones stay whole."""
    names = {*retained.let_go}
    chosen = [entry for entry in entries if entry.name in names]
    young = {entry.name for entry in chosen if entry.age < grace}
    return {entry.key: entry for entry in chosen if entry.name not in young}


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
