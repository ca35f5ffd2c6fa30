"""Retention: which records of old runs a garbage collection lets go of.

A record, `refs/records/<stage>/<key>`, keeps its artifact. Retention lets go of records that were
last used before a limit, unless their artifact stays for another reason: a champion of any time, an
approval or refusal, a policy that its gate approved (a person may still have to decide on it), a
pin, work that has begun and may go on, and all that belongs to these: what they were made from, and
the evaluations, verdicts, promotions and reports about them.

Work marks what it uses under `refs/running/`: a training may take longer than any grace period. The
mark of work that did not end, as it failed or was killed, holds for `ABANDONED` seconds, in which
it can go on from its checkpoints.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from rlhf.errors import ArtifactCorrupt, ArtifactMissing
from rlhf.store.history import Histories
from rlhf.store.manifest import ArtifactRef, Manifest, manifest_key
from rlhf.store.objects import ObjectInfo, in_parallel

#: Seconds after which work that did not end, and its checkpoints, are garbage.
ABANDONED = 30 * 24 * 3600.0
RECORDS, RUNNING = "records/", "running/"
_REPORTS = "records/report/"
#: Comparisons stay in these for ever, and name policies that need not.
_LOOKS = "looks/"
#: Of these the last entry alone is read.
_RETRAININGS = "retrainings/"
#: The policy that was decided on is in the name of these.
_APPROVALS = "approvals/"
#: Kinds of artifacts that stay with what they are about, and the roles of that in their parents.
_ABOUT = ("evaluation", "verdict", "promotion")
_SUBJECTS = ("policy", "reward-model")
#: Kind of a run's report: it is about the policy that its evaluation is about.
_REPORT = "report"

_DIGEST = re.compile(r"[0-9a-f]{64}")
_ENTRY = re.compile(r"refs/(?P<name>.+)/(?P<number>[0-9]{6,})\.json")


@dataclass(frozen=True)
class Retention:
    """Rule for the records that a collection lets go of; one of its fields is given."""

    keep_runs: int | None = None
    """The newest runs with a report; records that were used since the oldest of them stay."""
    older_than: float | None = None
    """Seconds since the last use."""


@dataclass(frozen=True)
class Entry:
    """An entry of a history that a collection has read."""

    key: str
    name: str
    age: float
    payload: Mapping[str, Any]


@dataclass(frozen=True)
class Retained:
    """Artifacts that stay, and histories of which no entry is needed any more."""

    manifests: dict[str, Manifest]
    let_go: list[str]
    """Names of these histories: records, and marks of work that has ended."""
    others: Mapping[str, tuple[str, int]] = field(default_factory=dict[str, tuple[str, int]])
    """Kind and size of the other artifacts, as far as they are known."""
    runs: int | None = None
    """Runs with a report, if records are let go of."""


@contextlib.contextmanager
def in_use(history: Histories, name: str, refs: Iterable[ArtifactRef]) -> Iterator[None]:
    """Mark artifacts as used by work, until it has ended without an error.

    Args:
        history: The store's histories.
        name: The work's.
        refs: Existing artifacts that are young by the store's clock (`Store.renew`).
    """
    used = sorted({ref.digest for ref in refs})
    if not used:
        yield
        return
    history.append(RUNNING + name, {"uses": used})
    yield
    end_use(history, name)


def end_use(history: Histories, name: str) -> None:
    """Let go of the artifacts that work has marked as used."""
    history.append(RUNNING + name, {"ended": True})


def by_history(entries: Mapping[str, ObjectInfo], payloads: Mapping[str, Any]) -> list[Entry]:
    """Return all entries by the name of their history, and of each the newest last."""
    found: list[tuple[str, int, Entry]] = []
    for key, info in entries.items():
        match = _ENTRY.fullmatch(key)
        name, number = (match["name"], int(match["number"])) if match else (key, 0)
        found.append((name, number, Entry(key, name, info.age, payloads.get(key, {}))))
    return [entry for _, _, entry in sorted(found, key=lambda each: each[:2])]


def ended_work(entries: Iterable[Entry], skew: float) -> set[str]:
    """Return the names of marks of work that has ended, or was abandoned."""
    last = {entry.name: entry for entry in entries if entry.name.startswith(RUNNING)}
    return {
        name
        for name, entry in last.items()
        if entry.payload.get("ended") or entry.age >= ABANDONED + skew
    }


def retain_all(
    read_manifest: Callable[[str], Manifest],
    entries: Iterable[Entry], kept: Iterable[str], ended: set[str],
) -> Retained:  # fmt: skip
    """Return what histories refer to; of marks of work those alone whose work goes on.

    Args:
        read_manifest: Reads and verifies the manifest of a digest.
        entries: Those of all histories.
        kept: Digests of what stays in any case, as it is pinned or young.
        ended: Names of the marks of work that has ended.
    """
    roots = {*kept}
    for entry in entries:
        if entry.name not in ended:
            roots |= {*_digests(entry.payload)}
    return Retained(_reachable(read_manifest, roots), [*ended])


def retain_used(
    read_manifest: Callable[[str], Manifest],
    rule: Retention, entries: list[Entry], manifests: Mapping[str, ObjectInfo],
    kept: Iterable[str], ended: set[str], grace: float,
) -> Retained:  # fmt: skip
    """Return what stays when records of old runs are let go of.

    Args:
        read_manifest: Reads and verifies the manifest of a digest.
        rule: Which records to let go of.
        entries: Those of all histories, of each the newest last.
        manifests: Those of all artifacts, by key.
        kept: Digests of what stays in any case, as it is pinned or young.
        ended: Names of the marks of work that has ended.
        grace: Seconds; records that were used since stay.

    Raises:
        ArtifactCorrupt: A manifest that stays can't be read, so its blobs are not known.
    """
    known = _Known(read_manifest, manifests)
    records = _records(entries, manifests)
    runs = _runs(records, known)
    live = _live(records, runs, rule, grace)
    roots = {*kept, *known.approved()}
    last = {entry.name: entry for entry in entries}
    for entry in entries:
        name = entry.name
        if name.startswith(RECORDS):
            stays = name in live
        elif name.startswith(_RETRAININGS):
            stays = entry is last[name]
        else:
            stays = name not in ended and not name.startswith(_LOOKS)
        if stays:
            roots |= {*_digests(entry.payload), *_decided(entry)}
    retained: dict[str, Manifest] = {}
    while roots - retained.keys():
        retained = _reachable(known.read, roots)
        roots = {*retained, *(d for each in retained for d in known.about.get(each, ()))}
    gone = [
        name for name, (_, digests) in records.items()
        if name not in live and not retained.keys() & digests
    ]  # fmt: skip
    return Retained(retained, [*ended, *gone], known.others(retained), len(runs))


class _Known:
    """The manifests of a store, read once."""

    def __init__(
        self, read_manifest: Callable[[str], Manifest], listed: Mapping[str, ObjectInfo]
    ) -> None:
        def read(digest: str) -> Manifest | ArtifactCorrupt | None:
            try:
                return read_manifest(digest)
            except ArtifactMissing:
                return None
            except ArtifactCorrupt as error:  # matters only if it stays
                return error

        keys = (key.removeprefix("manifests/").removesuffix(".json") for key in listed)
        digests = [digest for digest in keys if _DIGEST.fullmatch(digest)]
        self._found = dict(zip(digests, in_parallel(read, digests), strict=True))
        self._read_manifest = read_manifest
        #: Digests of the artifacts about one, by its digest.
        self.about: dict[str, list[str]] = {}
        for digest, manifest in self._manifests():
            for subject in self._subjects(manifest):
                self.about.setdefault(subject, []).append(digest)

    def read(self, digest: str) -> Manifest:
        """Return a manifest; raises if it is not there, or can't be read."""
        if digest not in self._found:  # it may be there all the same
            self._found[digest] = None
            self._found[digest] = self._read_manifest(digest)
        found = self._found[digest]
        if found is None:
            raise ArtifactMissing(f"there is no {manifest_key(digest)}")
        if isinstance(found, ArtifactCorrupt):
            raise found
        return found

    def find(self, digest: str) -> Manifest | None:
        """Return a manifest, None if it is not there, or can't be read."""
        found = self._found.get(digest)
        return found if isinstance(found, Manifest) else None

    def others(self, retained: Mapping[str, Manifest]) -> dict[str, tuple[str, int]]:
        """Return kind and size of the artifacts that do not stay, by digest."""
        return {d: (m.kind, m.size) for d, m in self._manifests() if d not in retained}

    def approved(self) -> set[str]:
        """Return the verdicts that approve of a policy, which a person may wait to decide on."""
        return {
            digest
            for digest, manifest in self._manifests()
            if manifest.kind == "verdict"
            and "policy" in manifest.parents
            and manifest.metrics.get("approved") is True
        }

    def _subjects(self, manifest: Manifest) -> set[str]:
        """Return the digests of what an artifact is about."""
        if manifest.kind == _REPORT:
            parts = (self.find(digest) for digest in manifest.parents.values())
            judged = (part for part in parts if part and part.kind in _ABOUT)
            return {p.parents[_SUBJECTS[0]] for p in judged if _SUBJECTS[0] in p.parents}
        roles = [role for role in _SUBJECTS if role in manifest.parents]
        return {manifest.parents[roles[0]]} if roles and manifest.kind in _ABOUT else set()

    def _manifests(self) -> Iterator[tuple[str, Manifest]]:
        for digest, found in self._found.items():
            if isinstance(found, Manifest):
                yield digest, found


def _records(
    entries: Iterable[Entry], manifests: Mapping[str, ObjectInfo]
) -> dict[str, tuple[float, set[str]]]:
    """Return age of the last use, and digests, of each record.

    An artifact's manifest is made young when its record is used (`Store.renew`).
    """
    records: dict[str, tuple[float, set[str]]] = {}
    for entry in entries:
        if entry.name.startswith(RECORDS):
            age, digests = records.get(entry.name, (entry.age, set[str]()))
            own = {*_digests(entry.payload)}
            keys = (manifest_key(digest) for digest in own)
            ages = [manifests[key].age for key in keys if key in manifests]
            records[entry.name] = (min(age, entry.age, *ages), digests | own)
    return records


def _runs(records: Mapping[str, tuple[float, set[str]]], known: _Known) -> list[tuple[float, str]]:
    """Return age and record of each run's report, the newest first.

    A report whose artifacts are all in a newer one is of the same run, before it went on.
    """
    reports = sorted((age, name) for name, (age, _) in records.items() if name.startswith(_REPORTS))
    runs: list[tuple[float, str]] = []
    newer: list[set[str]] = []
    for age, name in reports:
        found = [manifest for digest in records[name][1] if (manifest := known.find(digest))]
        if found:
            parts = {parent for manifest in found for parent in manifest.parents.values()}
            if not parts or not any(parts <= other for other in newer):
                runs.append((age, name))
            newer.append(parts)
    return runs


def _live(
    records: Mapping[str, tuple[float, set[str]]], runs: list[tuple[float, str]], rule: Retention,
    grace: float,
) -> set[str]:  # fmt: skip
    """Return the names of the records that were used since the limit."""
    limit, newest = grace, set[str]()
    if rule.older_than is not None:
        limit = max(limit, rule.older_than)
    if rule.keep_runs is not None:
        if len(runs) <= rule.keep_runs:
            return {*records}
        limit = max(limit, runs[rule.keep_runs - 1][0])
        newest = {name for _, name in runs[: rule.keep_runs]}
    return newest | {name for name, (age, _) in records.items() if age < limit}


def _decided(entry: Entry) -> list[str]:
    """Return the policy that an entry decides on, which its history's name tells."""
    return [entry.name.rpartition("/")[2]] if entry.name.startswith(_APPROVALS) else []


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
    frontier = {digest for digest in roots if _DIGEST.fullmatch(digest)}
    while frontier:
        visited |= frontier
        order = sorted(frontier)
        manifests = zip(order, in_parallel(read, order), strict=True)
        existing = {digest: manifest for digest, manifest in manifests if manifest}
        reachable |= existing
        parents = {digest for each in existing.values() for digest in each.parents.values()}
        frontier = parents - visited
    return reachable
