"""Histories and pins: the mutable names of a store.

Histories, `refs/<name>/<n>.json`, are append-only: each entry is created once, atomically, and
none is ever replaced. Pins, `pins/<name>.json`, are names that users give to artifacts to keep them
from garbage collection.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Mapping
from typing import Any

from rlhf.errors import ArtifactCorrupt, ArtifactMissing, ConfigError, StoreError
from rlhf.limits import load_json
from rlhf.store.coordination import create, wait_for_collection
from rlhf.store.manifest import (
    MAX_MANIFEST_BYTES,
    ArtifactRef,
    PublishError,
    canonical_json,
    digest_of,
    is_digest_prefix,
    manifest_key,
    sha256_bytes,
)
from rlhf.store.objects import Backend, in_parallel

#: A pin's name, and each part of a history's.
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ENTRY = re.compile(r"refs/(?P<name>.+)/(?P<number>[0-9]{6,})\.json")
#: Entries to try before `append` gives up to other writers.
_ATTEMPTS = 1000


class Histories:
    """The histories of one store; entries are JSON objects, numbered from 1."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def append(self, name: str, payload: Mapping[str, Any]) -> int:
        """Add an entry and return its number; the loser of a race takes the next one."""
        folder = _folder(name)
        data = seal(name, payload)
        number = max(self._numbers(folder), default=0)
        for _ in range(_ATTEMPTS):
            number += 1
            if create(self._backend, _entry_key(folder, number), data):
                return number
        raise StoreError(
            f"{self._backend.uri}: {_ATTEMPTS} writers were faster at {name!r}; try again"
        )

    def advance(self, name: str, payload: Mapping[str, Any], after: int) -> bool:
        """Add the entry after number `after` (0: none); False if it exists.

        Unlike `append`, for a decision that depends on the entries up to `after`.
        """
        return create(self._backend, _entry_key(_folder(name), after + 1), seal(name, payload))

    def latest(self, name: str) -> dict[str, Any] | None:
        """Return the newest entry, None if there is none."""
        folder = _folder(name)
        number = self._last(folder, self._numbers(folder))
        return open_sealed(self._backend, _entry_key(folder, number)) if number else None

    def entries(self, name: str) -> list[dict[str, Any]]:
        """Return all entries, oldest first."""
        return [*self.numbered(name).values()]

    def sound(self, name: str, count: int | None = None) -> tuple[list[dict[str, Any]], list[str]]:
        """Return the newest entries (None: all), oldest first, without damaged or missing ones.

        For histories in which an entry more or less decides nothing.

        Returns:
            The entries, and a line for each that is left out.
        """
        folder = _folder(name)
        number = self._last(folder, self._numbers(folder))
        first = 1 if count is None else max(1, number - count + 1)

        def read(key: str) -> dict[str, Any] | str:
            try:
                return open_sealed(self._backend, key)
            except (ArtifactCorrupt, ArtifactMissing) as error:
                return str(error)

        found = in_parallel(read, [_entry_key(folder, n) for n in range(first, number + 1)])
        entries = [each for each in found if not isinstance(each, str)]
        return entries, [each for each in found if isinstance(each, str)]

    def numbered(self, name: str) -> dict[int, dict[str, Any]]:
        """Return all entries by number, oldest first; decide on them with `advance`."""
        folder = _folder(name)
        numbers = self._numbers(folder)
        numbers += range(max(numbers, default=0) + 1, self._last(folder, numbers) + 1)
        keys = {number: _entry_key(folder, number) for number in sorted(numbers)}
        entries = in_parallel(lambda key: open_sealed(self._backend, key), keys.values())
        return dict(zip(keys, entries, strict=True))

    def names(self, prefix: str = "") -> list[str]:
        """Return the names of the histories that start with the prefix."""
        matches = (_ENTRY.fullmatch(key) for key in self._backend.list(f"refs/{prefix}"))
        return sorted({match["name"] for match in matches if match})

    def _numbers(self, folder: str) -> list[int]:
        """Return the numbers of the listed entries of this name, not of names under it."""
        matches = (_ENTRY.fullmatch(key) for key in self._backend.list(f"{folder}/"))
        return [int(m["number"]) for m in matches if m and f"refs/{m['name']}" == folder]

    def _last(self, folder: str, listed: list[int]) -> int:
        """Return the highest number, also if a flipped bit hid it from the listing."""
        number = max(listed, default=0)
        while self._backend.find(_entry_key(folder, number + 1)) is not None:
            number += 1
        return number


class Pins:
    """The pins of one store: names that keep an artifact from garbage collection."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend

    def add(self, name: str, ref: ArtifactRef | str) -> None:
        """Give a name to an artifact; waits for a running garbage collection.

        Raises:
            ConfigError: The name is not valid, or another artifact has it.
            ArtifactMissing: There is no such artifact, or it was collected just now.
        """
        digest = digest_of(ref)
        key, backend = _pin_key(name), self._backend
        created = create(backend, key, seal(name, {"digest": digest}))
        if not created:
            pinned = open_sealed(backend, key)["digest"]
            if pinned != digest:
                raise ConfigError(
                    f"{backend.uri}: pin {name!r} is that of {pinned[:12]}; take it away first, "
                    "or choose another name"
                )
        # A collection that missed the pin has ended then, and it removes manifests before blobs.
        wait_for_collection(backend)
        if backend.find(manifest_key(digest)) is None:
            if created:
                backend.delete([key])
            raise ArtifactMissing(
                f"{backend.uri}: can't pin {digest[:12]}: there is no such artifact"
            )

    def remove(self, name: str) -> None:
        """Remove a pin; ArtifactMissing if there is none of this name."""
        key = _pin_key(name)
        if self._backend.find(key) is None:
            raise ArtifactMissing(
                f"{self._backend.uri}: there is no pin {name!r}; see `rlhf artifacts ls`"
            )
        self._backend.delete([key])

    def find(self, name: str) -> str | None:
        """Return the digest of the artifact with this name, None if there is none."""
        if not _is_pin_name(name) or self._backend.find(_pin_key(name)) is None:
            return None
        return str(open_sealed(self._backend, _pin_key(name))["digest"])

    def by_name(self) -> dict[str, str]:
        """Return the digests of all pinned artifacts by name."""
        digests: dict[str, str] = {}
        for key in self._backend.list("pins/"):
            if key.endswith(".json"):
                with contextlib.suppress(ArtifactMissing):  # removed since it was listed
                    name = key.removeprefix("pins/").removesuffix(".json")
                    digests[name] = str(open_sealed(self._backend, key)["digest"])
        return digests


def open_sealed(backend: Backend, key: str) -> dict[str, Any]:
    """Read the payload of a sealed object, repeated if a bit flipped on the way.

    Raises:
        ArtifactCorrupt: The stored bytes are damaged.
    """
    for _ in range(3):
        payload = _payload(backend.get_bytes(key, MAX_MANIFEST_BYTES))
        if payload is not None:
            return payload
    raise ArtifactCorrupt(
        f"{backend.uri}: {key} is not an entry, or not as it was written; delete it"
    )


def seal(name: str, payload: Mapping[str, Any]) -> bytes:
    """Encode a payload with its sha256, which unlike a blob's is not in its key."""
    try:
        digest = sha256_bytes(canonical_json(payload))
        data = canonical_json({"payload": payload, "sha256": digest})
    except (TypeError, ValueError) as error:
        raise PublishError(f"can't write {name!r}: {error}") from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise PublishError(f"can't write {name!r}: {len(data)} bytes are too many")
    return data


def _folder(name: str) -> str:
    """Return the prefix of a history's keys; PublishError for an invalid name."""
    if not all(_NAME.fullmatch(part) for part in name.split("/")):
        raise PublishError(
            f"reference name {name!r} is not valid; use letters, digits, '.', '_' and '-', "
            "with '/' between the parts"
        )
    return f"refs/{name}"


def _entry_key(folder: str, number: int) -> str:
    return f"{folder}/{number:06d}.json"


def _pin_key(name: str) -> str:
    """Return the key of a pin; ConfigError for an invalid name."""
    if not _is_pin_name(name):
        raise ConfigError(
            f"pin {name!r} is not valid; use letters, digits, '.', '_' and '-', at most 128, and "
            "nothing that could be the beginning of a digest"
        )
    return f"pins/{name}.json"


def _is_pin_name(name: str) -> bool:
    return _NAME.fullmatch(name) is not None and not is_digest_prefix(name)


def _payload(data: bytes) -> dict[str, Any] | None:
    """Return the payload of sealed bytes, None if they are damaged."""
    try:
        value = load_json(data)
        payload, digest = value["payload"], value["sha256"]
        is_intact = isinstance(payload, dict) and digest == sha256_bytes(canonical_json(payload))
    except (ValueError, KeyError, TypeError):
        return None
    return payload if is_intact else None
