"""The code's version as artifacts record it: a hash of the library, the commit."""

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

#: Libraries whose version can change the result of a stage.
LIBRARIES = ("accelerate", "datasets", "peft", "tokenizers", "torch", "transformers", "trl")


@cache
def code_version() -> str:
    """Return a hash of the library's sources, equal for equal code, committed or not.

    `rlhf/report` is left out: it shows results, and must not cause training to run again.
    """
    root = Path(rlhf.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.yaml")]):
        if path.relative_to(root).parts[0] != "report":
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return f"{rlhf.__version__}+{digest.hexdigest()[:16]}"


@cache
def library_versions() -> dict[str, str]:
    """Return the installed versions of `LIBRARIES`."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


def producer(stage: str, config: Mapping[str, Any], seed: int) -> Producer:
    """Return a manifest's record of an artifact's origin: stage, settings, code."""
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
    """Return the sha256 of the checkout's constraints.txt; None outside of a checkout."""
    path = Path(rlhf.__file__).parent.parent / "constraints.txt"
    return file_sha256(path) if path.is_file() else None


@cache
def commit() -> str:
    """Return the checkout's commit, `-dirty` if changed; empty outside of a checkout."""
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
