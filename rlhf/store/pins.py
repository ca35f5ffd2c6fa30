"""Pins, `pins/<name>.json`: names that people give to artifacts, which keep them."""

from __future__ import annotations

import contextlib
import re

from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.store.backend import Backend
from rlhf.store.coordination import create, wait_for_collection
from rlhf.store.manifest import ArtifactRef, digest_of, is_digest_prefix, manifest_key
from rlhf.store.refs import open_sealed, seal

_PIN = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


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
        # A collection that missed the pin has ended by then, and has removed the manifest first.
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
        if not _is_valid(name) or self._backend.find(_pin_key(name)) is None:
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


def _is_valid(name: str) -> bool:
    return _PIN.fullmatch(name) is not None and not is_digest_prefix(name)


def _pin_key(name: str) -> str:
    if not _is_valid(name):
        raise ConfigError(
            f"pin {name!r} is not valid; use letters, digits, '.', '_' and '-', at most 128, and "
            "nothing that could be the beginning of a digest"
        )
    return f"pins/{name}.json"
