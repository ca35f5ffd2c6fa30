"""Artifacts in object storage: content-addressed, verified, append-only.

`open_store` opens a `Store`. Stages pass each other an `ArtifactRef`.
"""

from rlhf.store.manifest import (
    Ancestor,
    Artifact,
    ArtifactRef,
    FileEntry,
    Manifest,
    Producer,
    PublishError,
)
from rlhf.store.store import Store, open_store

__all__ = [
    "Ancestor",
    "Artifact",
    "ArtifactRef",
    "FileEntry",
    "Manifest",
    "Producer",
    "PublishError",
    "Store",
    "open_store",
]
