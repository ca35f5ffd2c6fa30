"""What code made an artifact: the fingerprint of the library, and the commit for people."""

from __future__ import annotations

import hashlib
import importlib.metadata
import subprocess
from functools import cache
from pathlib import Path

import rlhf

#: The libraries whose version can change what a stage computes.
LIBRARIES = ("accelerate", "datasets", "peft", "tokenizers", "torch", "transformers", "trl")


@cache
def code_version() -> str:
    """Hash of the library's sources: equal code is equal, committed or not, installed or not.

    The report is left out: how results are shown must not cause training to run again.
    """
    root = Path(rlhf.__file__).parent
    digest = hashlib.sha256()
    for path in sorted(root.rglob("*.py")):
        if path.relative_to(root).parts[0] != "report":
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return f"{rlhf.__version__}+{digest.hexdigest()[:16]}"


@cache
def library_versions() -> dict[str, str]:
    """Installed versions of the libraries that compute."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


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
