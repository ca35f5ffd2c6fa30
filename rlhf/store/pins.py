"""Pins, `pins/<name>.json`: names that people give to artifacts, which keep them."""

from __future__ import annotations

import contextlib
import re

from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.store.backend import Backend
from rlhf.store.coordination import create, wait_for_collection
from rlhf.store.lookup import is_beginning
from rlhf.store.manifest import manifest_key
from rlhf.store.refs import open_sealed, seal

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,127}")


def pin(backend: Backend, name: str, digest: str) -> None:
    """Give the name to an artifact; a garbage collection that is going on is waited for.

    Raises:
        ConfigError: The name is not valid, or another artifact has it.
        ArtifactMissing: There is no such artifact, or it was collected just now.
    """
    key = _key(name)
    created = create(backend, key, seal(name, {"digest": digest}))
    if not created:
        theirs = open_sealed(backend, key)["digest"]
        if theirs != digest:
            raise ConfigError(
                f"{backend.uri}: pin {name!r} is that of {theirs[:12]}; take it away first, or "
                "choose another name"
            )
    # A collection that did not see the pin has ended then; its manifest goes first.
    wait_for_collection(backend)
    if backend.find(manifest_key(digest)) is None:
        if created:
            backend.delete([key])
        raise ArtifactMissing(f"{backend.uri}: can't pin {digest[:12]}: there is no such artifact")


def unpin(backend: Backend, name: str) -> None:
    """Take the name away.

    Raises:
        ArtifactMissing: There is no such pin.
    """
    key = _key(name)
    if backend.find(key) is None:
        raise ArtifactMissing(f"{backend.uri}: there is no pin {name!r}; see `rlhf artifacts ls`")
    backend.delete([key])


def find(backend: Backend, name: str) -> str | None:
    """The digest of the artifact that has this name; None if there is none."""
    if not _NAME.fullmatch(name) or is_beginning(name) or backend.find(_key(name)) is None:
        return None
    return str(open_sealed(backend, _key(name))["digest"])


def read_all(backend: Backend) -> dict[str, str]:
    """Name to digest."""
    keys = [key for key in backend.list("pins/") if key.endswith(".json")]
    found: dict[str, str] = {}
    for key in keys:
        with contextlib.suppress(ArtifactMissing):  # taken away since it was listed
            name = key.removeprefix("pins/").removesuffix(".json")
            found[name] = str(open_sealed(backend, key)["digest"])
    return found


def _key(name: str) -> str:
    if not _NAME.fullmatch(name) or is_beginning(name):
        raise ConfigError(
            f"pin {name!r} is not valid; use letters, digits, '.', '_' and '-', at most 128, and "
            "nothing that could be the beginning of a digest"
        )
    return f"pins/{name}.json"
