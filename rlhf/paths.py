"""Paths as people write them."""

from __future__ import annotations

from pathlib import Path


def at_home(place: str | Path) -> Path:
    """The path with `~` put in full; as it is, and so missing, if there is no such user."""
    path = Path(place)
    try:
        return path.expanduser()
    except RuntimeError:
        return path
