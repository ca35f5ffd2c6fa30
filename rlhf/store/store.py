"""The artifact store: immutable, content-addressed artifacts and append-only names.

<store>/blobs/sha256/ab/<sha256>     file contents, each stored once
<store>/manifests/<sha256>.json      what an artifact consists of and came from
<store>/refs/<name>/000001.json      append-only histories
<store>/pins/<name>.json             names that keep an artifact
"""

from __future__ import annotations

import contextlib
import re
import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import Any, TypeAlias

from pydantic import ValidationError

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import ArtifactCorrupt, ArtifactMissing, StoreConfigError, StoreError
from rlhf.store import lookup, pins, refs
from rlhf.store.backend import Backend, Meter, in_parallel
from rlhf.store.cache import DEFAULT_LIMIT, Cache, Origin
from rlhf.store.collect import GRACE, Garbage, collect, retain
from rlhf.store.coordination import PROBES, is_atomic
from rlhf.store.manifest import (
    MAX_MANIFEST_BYTES,
    Ancestor,
    Artifact,
    ArtifactRef,
    Manifest,
    Metric,
    Producer,
    first_problem,
    manifest_key,
    sha256_bytes,
)
from rlhf.store.places import backend_of
from rlhf.store.publish import publish
from rlhf.store.receive import download, problems

_MANIFEST = re.compile(r"manifests/([0-9a-f]{64})\.json")
_PROBE_SECONDS = 5

# `Store.list` hides the builtin inside the class.
Entries: TypeAlias = list[dict[str, Any]]
Names: TypeAlias = list[str]
Ancestors: TypeAlias = list[Ancestor]
#: Told of the bytes that are done, of all; from several threads, but never two at once.
Listener: TypeAlias = Callable[[int, int], None]


def open_store(
    uri: str,
    *,
    options: StoreConfig | None = None,
    cache_dir: Path,
    cache_bytes: int = DEFAULT_LIMIT,
) -> Store:
    """A store in a folder (`file:///folder` or a path) or a bucket (`s3://bucket/prefix`).

    Makes no request; `Store.check` does. boto3 is imported only for s3.
    """
    return Store(backend_of(uri, options or StoreConfig()), Cache(cache_dir, cache_bytes))


class Store:
    """Publishes and fetches artifacts. Safe for threads and for several processes."""

    def __init__(self, backend: Backend, cache: Cache) -> None:
        self._backend = backend
        self._cache = cache

    @property
    def uri(self) -> str:
        """The store's address, normalised, without credentials."""
        return self._backend.uri

    def below(self, name: str) -> Store:
        """A store of its own under that name of this one, with the same cache."""
        return Store(self._backend.below(name), self._cache)

    def check(self) -> None:
        """Try what artifacts need: to write, read, list and delete, and to create only once.

        A store whose create-only writes are weak is named in a warning, and used with care.

        Raises:
            StoreConfigError: Why that is impossible.
        """
        backend = self._backend.hurried(_PROBE_SECONDS)
        key = f"{PROBES}{uuid.uuid4().hex}"
        try:
            backend.put(key, b"probe")
            if backend.get_bytes(key, 100) != b"probe" or key not in backend.list(key):
                raise StoreConfigError(
                    f"{self.uri}: {key} does not read as it was written; use another store"
                )
            is_atomic(backend)
            # A bucket that forbids deletion is a good home for artifacts.
            with contextlib.suppress(StoreConfigError):
                backend.delete([key])
        except StoreConfigError:
            raise
        except StoreError as error:
            raise StoreConfigError(str(error)) from None
        finally:
            backend.close()

    def publish(
        self,
        folder: Path,
        kind: str,
        *,
        parents: Mapping[str, ArtifactRef],
        producer: Producer,
        metrics: Mapping[str, Metric],
        listener: Listener | None = None,
    ) -> ArtifactRef:
        """Store a folder's files as an artifact; what the store has already is not sent again."""
        return publish(
            self._backend, folder, kind, parents=parents, producer=producer, metrics=metrics,
            listener=listener,
        )  # fmt: skip

    def fetch(
        self,
        ref: ArtifactRef | str,
        include: Sequence[str] | None = None,
        listener: Listener | None = None,
    ) -> Path:
        """A local folder with the artifact's files, every byte verified; don't write to it.

        With `include`, only files that match one of the patterns are fetched (`*` crosses
        folders). The folder stays for as long as this store is open.
        """
        digest = _digest(ref)
        files = self.manifest(digest).files
        chosen = [
            entry
            for entry in files
            if include is None or any(fnmatchcase(entry.path, pattern) for pattern in include)
        ]
        if not chosen:
            raise ArtifactMissing(
                f"{self.uri}: no file of artifact {digest[:12]} matches {', '.join(include or ())}"
            )
        meter = Meter(sum(entry.size for entry in chosen), listener)
        origin = Origin(self.uri, partial(download, self._backend), meter)
        return self._cache.fill(digest, chosen, len(chosen) == len(files), origin)

    def manifest(self, ref: ArtifactRef | str) -> Manifest:
        """The verified manifest of a reference or digest."""
        digest = _digest(ref)
        key = manifest_key(digest)
        for _ in range(3):
            data = self._backend.get_bytes(key, MAX_MANIFEST_BYTES)
            if sha256_bytes(data) == digest:
                break
        else:
            raise ArtifactCorrupt(
                f"{self.uri}: {key} does not have the sha256 in its name; "
                "delete that object and publish the artifact again"
            )
        try:
            return Manifest.model_validate_json(data)
        except ValidationError as error:
            raise ArtifactCorrupt(
                f"{self.uri}: {key} is not a manifest this version trusts: {first_problem(error)}"
            ) from None

    def exists(self, ref: ArtifactRef | str) -> bool:
        """Whether manifest and blobs are all there, by size; bytes are verified by `fetch`."""
        try:
            files = self.manifest(ref).files
        except (ArtifactMissing, ArtifactCorrupt):
            return False
        return not problems(self._backend, files, deep=False)

    def problems(self, ref: ArtifactRef | str, deep: bool = False) -> Names:
        """What is wrong with an artifact, one line each; `deep` reads every byte in the store."""
        try:
            files = self.manifest(ref).files
        except (ArtifactMissing, ArtifactCorrupt) as error:
            return [str(error)]
        return problems(self._backend, files, deep)

    def resolve(self, text: str) -> ArtifactRef:
        """A reference from a digest, its beginning, `artifact:<digest>`, a pin's name or a URI."""
        digest = lookup.digest_of(text, self.uri, self.digests, partial(pins.find, self._backend))
        return self._artifact(digest).ref

    def lineage(self, ref: ArtifactRef | str) -> Ancestors:
        """The artifact itself (depth 0) and its ancestors, depth first, roles in order.

        An artifact met twice is listed twice, but its own ancestors only once.
        """
        return lookup.lineage(_digest(ref), self._artifact)

    def delete(self, ref: ArtifactRef | str) -> None:
        """Remove the manifest; blobs stay, as other artifacts may share them."""
        self._backend.delete([manifest_key(_digest(ref))])

    def retain(self, kept: Iterable[str]) -> None:
        """Remove all artifacts but these digests, at once; for a store that has no other user."""
        retain(self._backend, {digest: self.manifest(digest) for digest in kept})

    def collect(self, *, grace: float = GRACE, dry_run: bool = True) -> Garbage:
        """Find what nothing refers to, and remove it unless this is a dry run (see `collect`)."""
        return collect(self._backend, self.manifest, grace=grace, dry_run=dry_run)

    def sweep(self, age: float = GRACE) -> int:
        """Remove unfinished uploads older than this, of publishers that were killed."""
        return self._backend.sweep(age)

    def pin(self, name: str, ref: ArtifactRef | str) -> None:
        """Give an artifact a name that keeps it."""
        pins.pin(self._backend, name, _digest(ref))

    def unpin(self, name: str) -> None:
        """Take the name away."""
        pins.unpin(self._backend, name)

    def pins(self) -> dict[str, str]:
        """Name to digest."""
        return pins.read_all(self._backend)

    def append(self, name: str, payload: Mapping[str, Any]) -> int:
        """Add an entry to a named history and return its number, counted from 1."""
        return refs.append(self._backend, name, payload)

    def latest(self, name: str) -> dict[str, Any] | None:
        """The newest entry of a history, None if there is none."""
        return refs.latest(self._backend, name)

    def history(self, name: str) -> Entries:
        """All entries of a history, oldest first."""
        return [*self.numbered(name).values()]

    def numbered(self, name: str) -> dict[int, dict[str, Any]]:
        """The same by number: whoever decides by them writes with `advance`, after the last."""
        return refs.numbered(self._backend, name)

    def advance(self, name: str, payload: Mapping[str, Any], after: int) -> bool:
        """Add the entry after that number, 0 being none; False if somebody else has."""
        return refs.advance(self._backend, name, payload, after)

    def names(self, prefix: str = "") -> Names:
        """Names of histories that start with the prefix."""
        return refs.names(self._backend, prefix)

    def list(self) -> list[Artifact]:
        """Every artifact with its manifest, ordered by digest."""
        ages = self._ages("")
        found = in_parallel(lambda digest: self._listed(digest, ages[digest]), ages)
        return [artifact for artifact in found if artifact]

    def digests(self, prefix: str = "") -> Names:
        """Digests of the artifacts that begin so, in order."""
        return [*self._ages(prefix)]

    def _listed(self, digest: str, age: float) -> Artifact | None:
        try:
            return self._artifact(digest)._replace(age=age)
        except ArtifactMissing:
            # Deleted since it was listed.
            return None

    def _ages(self, prefix: str) -> dict[str, float]:
        found = self._backend.list(f"manifests/{prefix}").items()
        matches = ((_MANIFEST.fullmatch(key), each.age) for key, each in found)
        return {match[1]: age for match, age in matches if match}

    def _artifact(self, digest: str) -> Artifact:
        manifest = self.manifest(digest)
        uri = f"{self.uri}/{manifest_key(digest)}"
        ref = ArtifactRef(kind=manifest.kind, digest=digest, size=manifest.size, uri=uri)
        return Artifact(ref, manifest)


def _digest(ref: ArtifactRef | str) -> str:
    digest = ref if isinstance(ref, str) else ref.digest
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ArtifactMissing(f"{digest!r} is no digest; resolve it first")
    return digest
