"""List the packages that this Python lacks.

benchmarks/gpu.sh runs it as a script before anything is installed: it imports the standard library
alone.
"""

from __future__ import annotations

import sys
from importlib import metadata
from pathlib import Path

LIST = Path(__file__).parent.parent / "gpu_packages.txt"


def missing(groups: set[str]) -> list[str]:
    """Return the packages of these groups of gpu_packages.txt that are not installed."""
    lacking = []
    for line in LIST.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        group, requirement = line.split()
        name = requirement.split("==")[0]
        if group in groups and not _is_installed(name):
            lacking.append(name)
    return lacking


def _is_installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


if __name__ == "__main__":
    print(" ".join(missing(set(sys.argv[1:]))))
