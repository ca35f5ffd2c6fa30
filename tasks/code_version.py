"""What code made an artifact: the fingerprint of the library, and the commit for people."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import rlhf
from rlhf.files import file_sha256
from rlhf.store import Producer

#: The libraries whose version can change what a stage computes.
LIBRARIES = ("accelerate", "datasets", "peft", "tokenizers", "torch", "transformers", "trl")


@cache
def code_version() -> str:
    """Hash of the library's sources: equal code is equal, committed or not, installed or not.

    The report is left out: how results are shown must not cause training to run again.
    """
    root = Path(rlhf.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.yaml")]):
        if path.relative_to(root).parts[0] != "report":
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return f"{rlhf.__version__}+{digest.hexdigest()[:16]}"


@cache
def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that compute."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def producer(stage: str, config: Mapping[str, Any], seed: int) -> Producer:
    """Who makes an artifact now, in this code."""
    return Producer(
        stage=stage,
        code_version=code_version(),
        dirty=commit().endswith("-dirty") if commit() else None,
        config=dict(config),
        lock_digest=lock_digest(),
        seed=seed,
        versions=library_versions(),
    )


@cache
def lock_digest() -> str | None:
    """sha256 of the checkout's pinned requirements; None where the code has none beside it."""
    path = Path(rlhf.__file__).parent.parent / "constraints.txt"
    return file_sha256(path) if path.is_file() else None


@cache
def commit() -> str:
    """The checkout's commit, with `-dirty` for uncommitted changes; empty outside a checkout."""
    root = Path(rlhf.__file__).parent.parent
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""
