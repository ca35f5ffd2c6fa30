"""Named, append-only histories: `refs/<name>/<n>.json`, each entry created once."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from typing import Any

from rlhf.errors import ArtifactCorrupt, StoreError
from rlhf.store.backend import Backend, in_parallel
from rlhf.store.coordination import create
from rlhf.store.manifest import MAX_MANIFEST_BYTES, PublishError, canonical_json, sha256_bytes

_SEGMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")
_ENTRY = re.compile(r"refs/(?P<name>.+)/(?P<number>[0-9]{6,})\.json")
_ATTEMPTS = 1000


def append(backend: Backend, name: str, payload: Mapping[str, Any]) -> int:
    """Create the next entry; whoever loses a race takes the number after."""
    folder = _folder(name)
    data = seal(name, payload)
    number = max(_numbers(backend, folder), default=0)
    for _ in range(_ATTEMPTS):
        number += 1
        if create(backend, _key(folder, number), data):
            return number
    raise StoreError(f"{backend.uri}: {_ATTEMPTS} writers were faster at {name!r}; try again")


def advance(backend: Backend, name: str, payload: Mapping[str, Any], after: int) -> bool:
    """Create the entry that follows number `after`, or return False: somebody else did.

    Unlike `append`, for a decision that rests on what the entry `after` says.
    """
    return create(backend, _key(_folder(name), after + 1), seal(name, payload))


def latest(backend: Backend, name: str) -> dict[str, Any] | None:
    """The entry with the highest number, None if there is none."""
    folder = _folder(name)
    number = _last(backend, folder, _numbers(backend, folder))
    return open_sealed(backend, _key(folder, number)) if number else None


def numbered(backend: Backend, name: str) -> dict[int, dict[str, Any]]:
    """All entries by their number, oldest first."""
    folder = _folder(name)
    numbers = _numbers(backend, folder)
    numbers += range(max(numbers, default=0) + 1, _last(backend, folder, numbers) + 1)
    keys = {number: _key(folder, number) for number in sorted(numbers)}
    entries = in_parallel(lambda key: open_sealed(backend, key), keys.values())
    return dict(zip(keys, entries, strict=True))


def _last(backend: Backend, folder: str, listed: list[int]) -> int:
    """The highest number; a bit that flipped in the listing may hide the last entry."""
    number = max(listed, default=0)
    while backend.find(_key(folder, number + 1)) is not None:
        number += 1
    return number


def names(backend: Backend, prefix: str) -> list[str]:
    """Names that have entries and start with the prefix."""
    found = (_ENTRY.fullmatch(key) for key in backend.list(f"refs/{prefix}"))
    return sorted({match["name"] for match in found if match})


def _folder(name: str) -> str:
    if not all(_SEGMENT.fullmatch(part) for part in name.split("/")):
        raise PublishError(
            f"reference name {name!r} is not valid; use letters, digits, '.', '_' and '-', "
            "with '/' between the parts"
        )
    return f"refs/{name}"


def _key(folder: str, number: int) -> str:
    return f"{folder}/{number:06d}.json"


def _numbers(backend: Backend, folder: str) -> list[int]:
    """Entries of this very name, not of names below it."""
    found = (_ENTRY.fullmatch(key) for key in backend.list(f"{folder}/"))
    return [int(match["number"]) for match in found if match and f"refs/{match['name']}" == folder]


def open_sealed(backend: Backend, key: str) -> dict[str, Any]:
    """What an entry says. A bit that flipped on the way is seen, and the entry read again."""
    for _ in range(3):
        payload = _opened(backend.get_bytes(key, MAX_MANIFEST_BYTES))
        if payload is not None:
            return payload
    raise ArtifactCorrupt(
        f"{backend.uri}: {key} is not an entry, or not as it was written; delete it"
    )


def seal(name: str, payload: Mapping[str, Any]) -> bytes:
    """The bytes of an entry, which carry their own sha256: unlike a blob's, no name does."""
    try:
        seal = sha256_bytes(canonical_json(payload))
        data = canonical_json({"payload": payload, "sha256": seal})
    except (TypeError, ValueError) as error:
        raise PublishError(f"can't write {name!r}: {error}") from None
    if len(data) > MAX_MANIFEST_BYTES:
        raise PublishError(f"can't write {name!r}: {len(data)} bytes are too many")
    return data


def _opened(data: bytes) -> dict[str, Any] | None:
    try:
        value = json.loads(data)
        payload, seal = value["payload"], value["sha256"]
        whole = isinstance(payload, dict) and seal == sha256_bytes(canonical_json(payload))
    except (ValueError, KeyError, TypeError):
        return None
    return payload if whole else None
