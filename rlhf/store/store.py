"""The artifact store: immutable, content-addressed artifacts, histories and pins.

<store>/blobs/sha256/ab/<sha256>     file contents, each stored once
<store>/manifests/<sha256>.json      files and provenance of an artifact
<store>/refs/<name>/000001.json      append-only histories
<store>/pins/<name>.json             names that keep an artifact
"""

from __future__ import annotations

import logging
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from functools import partial
from pathlib import Path
from typing import TypeAlias

from pydantic import ValidationError

from rlhf.config.pipeline import StoreConfig
from rlhf.config.store_uri import parse_store_uri
from rlhf.errors import ArtifactCorrupt, ArtifactMissing, StoreConfigError, StoreError
from rlhf.files import expand_home
from rlhf.permissions import check_store
from rlhf.store.cache import ATTEMPTS, DEFAULT_LIMIT, Cache, Origin, download
from rlhf.store.coordination import FRESH, wait_for_collection
from rlhf.store.gc import GRACE, Garbage, collect, retain
from rlhf.store.history import Histories, Pins
from rlhf.store.local import LocalBackend
from rlhf.store.manifest import (
    MAX_MANIFEST_BYTES,
    Ancestor,
    Artifact,
    ArtifactRef,
    FileEntry,
    Manifest,
    Metric,
    Producer,
    blob_key,
    digest_of,
    first_problem,
    is_digest_prefix,
    manifest_key,
    sha256_bytes,
)
from rlhf.store.objects import Backend, Meter, Sink, in_parallel
from rlhf.store.probe import probe
from rlhf.store.publish import publish
from rlhf.store.retention import Retention

log = logging.getLogger("rlhf.store")
# `Store.list` hides the builtin inside the class.
Names: TypeAlias = list[str]
Ancestors: TypeAlias = list[Ancestor]
#: Called with the bytes done and the total; from several threads, but never two at once.
Listener: TypeAlias = Callable[[int, int], None]

_MANIFEST_KEY = re.compile(r"manifests/([0-9a-f]{64})\.json")
#: What is said of an archived object (S3 Glacier).
_RESTORE = (
    "is archived and can't be read; restore it (aws s3api restore-object), and keep the bucket's "
    "lifecycle rules from archiving what the store holds"
)
#: Timeout of one request of `Store.check`.
_PROBE_SECONDS = 5


def open_store(
    uri: str,
    *,
    options: StoreConfig | None = None,
    cache_dir: Path,
    cache_bytes: int = DEFAULT_LIMIT,
) -> Store:
    """Open a store: `file:///folder`, a path or `s3://bucket/prefix`.

    Makes no request; `Store.check` does. boto3 is imported only for s3.
    """
    return Store(backend_of(uri, options or StoreConfig()), Cache(cache_dir, cache_bytes))


class Store:
    """A store of artifacts, safe for threads and for several processes."""

    def __init__(self, backend: Backend, cache: Cache) -> None:
        self._backend = backend
        self._cache = cache
        #: Append-only histories, such as the champions of a model line.
        self.history = Histories(backend)
        #: Names that keep an artifact from garbage collection.
        self.pins = Pins(backend)

    @property
    def uri(self) -> str:
        """The store's address, normalised, without credentials."""
        return self._backend.uri

    def child(self, name: str) -> Store:
        """Return a store of its own under that name of this one, with the same cache."""
        return Store(self._backend.child(name), self._cache)

    def check(self) -> None:
        """Check that the store can do what is needed of it, before any work: see `probe`.

        Raises:
            StoreConfigError: The store can't be used, with the reason.
        """
        backend = self._backend.hurried(_PROBE_SECONDS)
        try:
            probe(backend)
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
        """Store a folder as an artifact; files that the store has are not sent again."""
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
        """Return a local folder with the artifact's verified files; don't write to it.

        With `include`, only files that match one of the patterns are fetched (`*` crosses
        folders). The folder stays for as long as this store is open.
        """
        digest = digest_of(ref)
        files = self.manifest(digest).files
        included = [
            entry
            for entry in files
            if include is None or any(fnmatchcase(entry.path, pattern) for pattern in include)
        ]
        if not included:
            raise ArtifactMissing(
                f"{self.uri}: no file of artifact {digest[:12]} matches {', '.join(include or ())}"
            )
        meter = Meter(sum(entry.size for entry in included), listener)
        origin = Origin(self.uri, partial(download, self._backend), meter)
        return self._cache.fill(digest, included, len(included) == len(files), origin)

    def manifest(self, ref: ArtifactRef | str) -> Manifest:
        """Read and verify the manifest of a reference or digest."""
        digest = digest_of(ref)
        try:
            return Manifest.model_validate_json(self._manifest_bytes(digest))
        except ValidationError as error:
            raise ArtifactCorrupt(
                f"{self.uri}: {manifest_key(digest)} is not a manifest this version trusts: "
                f"{first_problem(error)}"
            ) from None

    def exists(self, ref: ArtifactRef | str) -> bool:
        """Return whether manifest and blobs exist, by size; `fetch` verifies bytes.

        Raises:
            StoreConfigError: They exist, but some are archived.
        """
        try:
            files = self.manifest(ref).files
        except (ArtifactMissing, ArtifactCorrupt):
            return False
        problems = _blob_problems(self._backend, files, deep=False)
        for problem in problems:
            if problem.endswith(_RESTORE):  # to make it again would cost far more
                raise StoreConfigError(problem)
        return not problems

    def problems(self, ref: ArtifactRef | str, deep: bool = False) -> Names:
        """Return an artifact's defects, one line each; `deep` reads every byte."""
        try:
            files = self.manifest(ref).files
        except (ArtifactMissing, ArtifactCorrupt) as error:
            return [str(error)]
        return _blob_problems(self._backend, files, deep)

    def resolve(self, text: str) -> ArtifactRef:
        """Resolve a digest, its beginning, `artifact:<digest>`, a pin's name or a URI.

        Raises:
            ArtifactMissing: No artifact matches, or several do.
        """
        name = text.strip().removeprefix("artifact:")
        base, slash, file = name.rpartition("/manifests/")
        if slash:
            if base != self.uri:
                raise ArtifactMissing(f"{text} is not in {self.uri}; open its own store")
            name = file.removesuffix(".json")
        if is_digest_prefix(name):
            return self._artifact(self._completed(name)).ref
        pinned = self.pins.find(name)
        if pinned is None:
            raise ArtifactMissing(
                f"{text!r} names no artifact; give 6 to 64 hex digits of its digest, "
                "artifact:<digest>, a pin's name or its URI"
            )
        return self._artifact(pinned).ref

    def lineage(self, ref: ArtifactRef | str) -> Ancestors:
        """Return the artifact (depth 0) and its ancestors, depth first, by role.

        An artifact met twice is listed twice, but its own ancestors only once.
        """
        ancestors: Ancestors = []
        expanded: set[str] = set()

        # A stack of its own: a chain of retrainings may be longer than Python's.
        rest = [(0, "self", digest_of(ref))]
        while rest:
            depth, role, digest = rest.pop()
            artifact = self._artifact(digest)
            ancestors.append(Ancestor(depth, role, artifact.ref))
            if digest in expanded:
                continue
            expanded.add(digest)
            parents = sorted(artifact.manifest.parents.items(), reverse=True)
            rest += [(depth + 1, name, parent) for name, parent in parents]
        return ancestors

    def list(self) -> list[Artifact]:
        """Return every artifact with its manifest, ordered by digest."""
        ages = self._ages("")
        artifacts = in_parallel(lambda digest: self._listed(digest, ages[digest]), ages)
        return [artifact for artifact in artifacts if artifact]

    def digests(self, prefix: str = "") -> Names:
        """Return the digests of the artifacts with this prefix, in order."""
        return [*self._ages(prefix)]

    def is_empty(self) -> bool:
        """Return whether nothing was ever stored at this address, as at a wrong one."""
        return not self.digests() and not self._backend.list("")

    def delete(self, ref: ArtifactRef | str) -> None:
        """Remove the manifest; blobs stay, as other artifacts may share them."""
        self._backend.delete([manifest_key(digest_of(ref))])

    def retain(self, digests: Iterable[str]) -> None:
        """Remove all artifacts but these, at once; for a store without other users."""
        retain(self._backend, {digest: self.manifest(digest) for digest in digests})

    def renew(self, ref: ArtifactRef | str) -> bool:
        """Keep an artifact from collections for their grace period; False if it is gone.

        The age of a manifest is the time since its last use, to the hour. A store that refuses this
        is used without.
        """
        digest = digest_of(ref)
        key, backend = manifest_key(digest), self._backend
        info = backend.find(key)
        if info is None:
            return False
        if info.age <= FRESH:
            return True
        try:
            backend.put(key, self._manifest_bytes(digest))
        except (ArtifactMissing, ArtifactCorrupt):
            return False
        except StoreError as error:
            log.warning("a collection may remove %s, which is in use (%s)", digest[:12], error)
            return True
        # A collection that saw the old manifest has ended then; it removes manifests before blobs.
        wait_for_collection(backend)
        return self.exists(digest)

    def collect(
        self, *, grace: float = GRACE, dry_run: bool = True, retention: Retention | None = None
    ) -> Garbage:
        """Find unreferenced objects, and remove them unless this is a dry run."""
        return collect(
            self._backend, self.manifest, grace=grace, dry_run=dry_run, retention=retention
        )

    def sweep(self, age: float = GRACE) -> int:
        """Remove unfinished uploads older than this, left behind by killed publishers."""
        return self._backend.sweep(age)

    def _manifest_bytes(self, digest: str) -> bytes:
        """Read a manifest, again if a bit flipped on the way."""
        key = manifest_key(digest)
        for _ in range(3):
            try:
                data = self._backend.get_bytes(key, MAX_MANIFEST_BYTES)
            except ArtifactMissing as error:
                raise ArtifactMissing(
                    f"{error}; `rlhf artifacts ls` shows what there is, or it is in another store"
                ) from None
            if sha256_bytes(data) == digest:
                return data
        raise ArtifactCorrupt(
            f"{self.uri}: {key} does not have the sha256 in its name; "
            "delete that object and publish the artifact again"
        )

    def _artifact(self, digest: str) -> Artifact:
        manifest = self.manifest(digest)
        uri = f"{self.uri}/{manifest_key(digest)}"
        ref = ArtifactRef(kind=manifest.kind, digest=digest, size=manifest.size, uri=uri)
        return Artifact(ref, manifest)

    def _completed(self, prefix: str) -> str:
        """Return the one digest with this prefix; ArtifactMissing for none or several."""
        digests = [prefix] if len(prefix) == 64 else self.digests(prefix)
        if not digests:
            raise ArtifactMissing(
                f"{self.uri}: there is no artifact {prefix}; `rlhf artifacts ls` shows those there "
                "are"
            )
        if len(digests) > 1:
            candidates = ", ".join(digest[:16] for digest in digests[:5])
            raise ArtifactMissing(
                f"{self.uri}: {prefix} is ambiguous ({candidates}); give more digits"
            )
        return digests[0]

    def _ages(self, prefix: str) -> dict[str, float]:
        objects = self._backend.list(f"manifests/{prefix}").items()
        matches = ((_MANIFEST_KEY.fullmatch(key), each.age) for key, each in objects)
        return {match[1]: age for match, age in matches if match}

    def _listed(self, digest: str, age: float) -> Artifact | None:
        try:
            return self._artifact(digest)._replace(age=age)
        except ArtifactMissing:
            # Deleted since it was listed.
            return None


def backend_of(uri: str, options: StoreConfig) -> Backend:
    """Return the backend of a folder (`file:///…`, a path) or bucket (`s3://…`).

    Raises:
        StoreConfigError: The URI is neither, or holds what would be dropped.
    """
    try:
        place = parse_store_uri(uri)
    except ValueError as error:  # the URI may hold a password
        raise StoreConfigError(f"the store's URI {error}") from None
    if place.folder is None:
        from rlhf.store.s3 import S3Backend

        check_store(uri, None)
        return S3Backend(uri, options)
    folder = place.folder if place.is_literal else expand_home(place.folder)
    if not place.is_literal and str(folder).startswith("~"):
        raise StoreConfigError(
            f"store = {uri!r}: there is no such user; write s3://bucket/prefix or another folder"
        )
    check_store(uri, folder)
    try:
        return LocalBackend(folder.resolve())
    except (OSError, RuntimeError) as error:
        raise StoreConfigError(
            f"store = {uri!r}: can't be resolved ({error}); give another folder"
        ) from None


def _blob_problems(backend: Backend, files: Iterable[FileEntry], deep: bool) -> list[str]:
    """Return a line per missing or wrong-sized blob; `deep` compares bytes too."""

    def problem(entry: FileEntry) -> str | None:
        key = blob_key(entry.sha256)
        what = f"{backend.uri}: {key} ({entry.path})"
        try:
            info = backend.find(key)
        except ArtifactCorrupt as error:
            return str(error)
        if info is None:
            return f"{what} is missing"
        if info.archived:
            return f"{what} {_RESTORE}"
        if info.size != entry.size:
            return f"{what} has {info.size} bytes instead of {entry.size}"
        if deep and not _has_right_bytes(backend, entry):
            return f"{what} does not have the sha256 in its name"
        return None

    blobs = {entry.sha256: entry for entry in files}.values()
    return [line for line in in_parallel(problem, blobs) if line]


def _has_right_bytes(backend: Backend, entry: FileEntry) -> bool:
    for _ in range(ATTEMPTS):
        with Path(os.devnull).open("wb") as devnull:
            sink = Sink(devnull, lambda _: None)
            download(backend, entry, sink)
        if sink.sha256 == entry.sha256:
            return True
    return False
