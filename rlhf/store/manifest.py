"""References, manifests, and the rules for the paths in an artifact."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from pathlib import PurePosixPath
from typing import Annotated, Any, Literal, NamedTuple, Self, cast

from pydantic import Field, JsonValue, ValidationError, field_validator, model_validator

from rlhf.config.section import Section
from rlhf.errors import ArtifactMissing, StoreError

MAX_FILES = 100_000
MAX_MANIFEST_BYTES = 5 * 1024 * 1024
PICKLES = frozenset({".bin", ".pt", ".pth", ".pkl", ".pickle", ".ckpt"})

Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Kind = Annotated[str, Field(pattern=r"^[a-z][a-z0-9_-]{0,62}$")]
#: Bytes of a file: a hundred thousand of these make no number that 64 bits can't hold.
FileSize = Annotated[int, Field(ge=0, le=10**13)]
#: Numbers of manifests reach servers, which store 64 bits.
Integer = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Metric = float | Integer | str | bool | None


class PublishError(StoreError, ValueError):
    """A folder that can't become an artifact; nothing was written to the store."""

    retriable = False


class ArtifactRef(Section):
    """Reference to an artifact by its content; the only thing passed between stages."""

    kind: Kind
    """What the artifact is, for example `policy` or `reward_model`."""
    digest: Digest
    """sha256 of the canonical manifest: same bytes and provenance, same digest."""
    size: int = Field(ge=0, lt=2**63)
    """Bytes of all files together."""
    uri: str
    """Where the manifest lies; the digest alone finds it in any copy of the store."""

    @property
    def short(self) -> str:
        """The first 12 digits of the digest, for display."""
        return self.digest[:12]


class FileEntry(Section):
    """One file of an artifact."""

    path: str = Field(min_length=1, max_length=1024)
    """Relative path with forward slashes."""
    sha256: Digest
    """Names the blob and verifies every download."""
    size: FileSize
    """Bytes."""

    @field_validator("path")
    @classmethod
    def _safe(cls, value: str) -> str:
        check_path(value)
        return value


class Producer(Section):
    """Provenance of an artifact: enough to reproduce it; no machine names, no times."""

    stage: str
    """The stage's name."""
    code_version: str
    """Version or commit of the code."""
    config: dict[str, JsonValue]
    """The stage's configuration section, as JSON."""
    seed: Integer
    """The run's seed."""
    versions: dict[str, str]
    """Versions of the libraries that shaped the bytes."""
    dirty: bool | None = None
    """Whether the checkout had uncommitted changes; none outside of one."""
    config_digest: Digest | None = None
    """sha256 of `config` as canonical JSON."""
    lock_digest: Digest | None = None
    """sha256 of the checkout's pinned requirements; none without such a file."""

    @model_validator(mode="before")
    @classmethod
    def _digested(cls, data: Any) -> Any:
        """Add the configuration's digest if it is missing."""
        if isinstance(data, dict) and "config" in data and "config_digest" not in data:
            # Values that are not JSON are refused later, with a reason of their own.
            with contextlib.suppress(TypeError, ValueError):
                fields = cast("dict[str, Any]", data)
                digest = sha256_bytes(canonical_json(fields["config"]))
                return {**fields, "config_digest": digest}
        return cast("Any", data)


class Manifest(Section):
    """Files and provenance of an artifact; written last, after all blobs."""

    format: Literal[1] = 1
    """Version of this layout."""
    kind: Kind
    """What the artifact is."""
    files: tuple[FileEntry, ...] = Field(min_length=1, max_length=MAX_FILES)
    """Sorted by path."""
    parents: dict[str, Digest]
    """Role to digest of each artifact this one was made from."""
    producer: Producer
    """What made it."""
    metrics: dict[str, Metric]
    """Measured while making it."""

    @model_validator(mode="after")
    def _one_folder(self) -> Self:
        paths = [entry.path for entry in self.files]
        if paths != sorted(paths):
            raise ValueError("files are not sorted by path")
        check_collisions(paths)
        return self

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.size for entry in self.files)

    def encode(self) -> bytes:
        """Encode canonically; the sha256 of these bytes is the artifact's digest."""
        return canonical_json(self.model_dump(mode="json"))


class Artifact(NamedTuple):
    """Reference, manifest and age in seconds (by the store's clock) of an artifact."""

    ref: ArtifactRef
    manifest: Manifest
    age: float = 0.0


class Ancestor(NamedTuple):
    """One step of a lineage: depth, role and reference of an ancestor."""

    depth: int
    role: str
    ref: ArtifactRef


def blob_key(sha256: str) -> str:
    """Return the key of a file's bytes; the two digits keep folders small."""
    return f"blobs/sha256/{sha256[:2]}/{sha256}"


def manifest_key(digest: str) -> str:
    """Return the key of a manifest."""
    return f"manifests/{digest}.json"


def digest_of(ref: ArtifactRef | str) -> str:
    """Return the digest of a reference; ArtifactMissing for a text that is none."""
    digest = ref if isinstance(ref, str) else ref.digest
    if not re.fullmatch(r"[0-9a-f]{64}", digest):
        raise ArtifactMissing(f"{digest!r} is no digest; resolve it first")
    return digest


def is_digest_prefix(text: str) -> bool:
    """Return whether the text can be the beginning of a digest: 6 to 64 hex digits."""
    return re.fullmatch(r"[0-9a-f]{6,64}", text) is not None


def sha256_bytes(data: bytes) -> str:
    """Return the hex sha256 of bytes."""
    return hashlib.sha256(data).hexdigest()


def canonical_json(value: Any) -> bytes:
    """Encode as canonical JSON; ValueError for NaN and infinity.

    Sorted keys, no spaces, UTF-8.
    """
    text = json.dumps(
        value, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    )
    return text.encode("utf-8")


def check_path(path: str) -> None:
    """Raise ValueError for a path that may leave its folder, or is a pickle."""
    if any(ord(char) < 32 or 0xD800 <= ord(char) < 0xE000 for char in path):
        raise ValueError(f"path {path!r} holds a control character or is not Unicode")
    if "\\" in path:
        raise ValueError(f"path {path!r} holds a backslash")
    if path.startswith("/") or re.match(r"[A-Za-z]:", path):
        raise ValueError(f"path {path!r} is absolute")
    if any(part in ("", ".", "..") for part in path.split("/")):
        raise ValueError(f"path {path!r} has an empty, '.' or '..' segment")
    if PurePosixPath(path).suffix.lower() in PICKLES:
        raise ValueError(
            f"path {path!r} looks like a pickle, which runs code when loaded; "
            "artifacts hold safetensors and JSON"
        )


def check_collisions(paths: Iterable[str]) -> None:
    """Raise ValueError for paths that collide on a case-insensitive file system."""
    seen: dict[str, str] = {}
    for path in paths:
        folded = unicodedata.normalize("NFC", path).casefold()
        if folded in seen:
            raise ValueError(f"paths {seen[folded]!r} and {path!r} differ only in case")
        seen[folded] = path
    for folded, path in seen.items():
        for parent in PurePosixPath(folded).parents:
            if str(parent) in seen:
                raise ValueError(f"path {seen[str(parent)]!r} is a file and a folder of {path!r}")


def first_problem(error: ValidationError) -> str:
    """Format a validation error in one line, without the values, which may be huge."""
    problem = error.errors(include_url=False, include_input=False)[0]
    location = ".".join(str(part) for part in problem["loc"])
    message = problem["msg"].removeprefix("Value error, ")
    return f"{location}: {message}" if location else message


def build_manifest(
    kind: str,
    files: Iterable[FileEntry],
    parents: Mapping[str, ArtifactRef],
    producer: Producer,
    metrics: Mapping[str, Metric],
) -> Manifest:
    """Build a validated manifest; PublishError names what is wrong with the arguments."""
    try:
        manifest = Manifest(
            kind=kind,
            files=tuple(sorted(files, key=lambda entry: entry.path)),
            parents={role: parent.digest for role, parent in parents.items()},
            producer=producer,
            metrics=dict(metrics),
        )
        size = len(manifest.encode())
    except ValidationError as error:
        raise PublishError(f"can't publish {kind!r}: {first_problem(error)}") from None
    except ValueError as error:
        raise PublishError(f"can't publish {kind!r}: {error}") from None
    if size > MAX_MANIFEST_BYTES:
        raise PublishError(
            f"can't publish {kind!r}: its manifest would take {size} bytes, more than "
            f"{MAX_MANIFEST_BYTES}; publish fewer files"
        )
    return manifest
