"""Artifacts in object storage: content-addressed, verified, append-only.

`open_store` gives a `Store`; `ArtifactRef` is what stages hand to each other.
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
