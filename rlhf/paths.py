"""Paths in configurations and on the command line."""

from __future__ import annotations

from pathlib import Path


def at_home(path: str | Path) -> Path:
    """Expand `~` in a path; with an unknown user the path is returned as is."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)
