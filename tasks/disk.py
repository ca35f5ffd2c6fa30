"""Disk space of a store and of the work folder, and what to do when it is much."""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rlhf.config import PipelineConfig, apply_machine_settings
from rlhf.config.store_uri import parse_store_uri
from rlhf.files import expand_home
from rlhf.store import Artifact

#: Bytes from which a clean-up is offered.
LARGE = 5_000_000_000
#: Runs that the offered clean-up keeps.
KEPT_RUNS = 10
#: Folders of the work folder by what they hold.
_CACHE, _CHECKPOINTS = "cache", "checkpoints"


@dataclass(frozen=True)
class DiskUse:
    """Bytes of a store and of this machine's work folder."""

    store: int | None
    """None for a bucket that was not listed."""
    work: int
    cache: int
    checkpoints: int
    store_uri: str
    work_dir: Path

    @property
    def is_large(self) -> bool:
        """Whether a clean-up is worth its while."""
        return max(self.store or 0, self.work) >= LARGE

    def lines(self) -> list[str]:
        """Return the sizes, and where they are large what reduces them, a sentence each."""
        parts = [f"cache {size(self.cache)}", f"checkpoints {size(self.checkpoints)}"]
        work = f"work folder {self.work_dir}: {size(self.work)} ({', '.join(parts)})"
        store = "" if self.store is None else f"store {self.store_uri}: {size(self.store)}; "
        found = [f"disk: {store}{work}"]
        if self.store is not None and self.store >= LARGE:
            found.append(
                f"to free space in the store: rlhf artifacts gc --keep-runs {KEPT_RUNS} --store "
                f"{self.store_uri} (shows what would go; --delete removes it)"
            )
        if self.cache >= LARGE:
            found.append(
                f"to free space in the work folder: runtime.cache_gb bounds the cache; while no "
                f"run is under way, {self.work_dir / _CACHE} can be removed: it is filled again "
                "from the store"
            )
        if self.checkpoints >= LARGE:
            found.append(
                f"checkpoints of trainings that did not end are in {self.work_dir / _CHECKPOINTS}: "
                "run them to their end, or remove those that shall not go on"
            )
        return found


def disk_use(config: PipelineConfig, artifacts: Iterable[Artifact] | None = None) -> DiskUse:
    """Measure the store and the work folder of a configuration.

    Args:
        config: Names both.
        artifacts: All artifacts of the store, if they are listed anyhow; without them only a store
            in a folder is measured, since a bucket's listing takes many requests.
    """
    config = apply_machine_settings(config)
    work_dir = expand_home(config.runtime.work_dir)
    if artifacts is not None:
        files = {f.sha256: f.size for _, manifest, _ in artifacts for f in manifest.files}
        stored: int | None = sum(files.values())
    else:
        place = parse_store_uri(config.store)
        folder = place.folder
        if folder is not None and not place.is_literal:
            folder = expand_home(folder)
        stored = None if folder is None else folder_size(folder)
    return DiskUse(
        stored, folder_size(work_dir), folder_size(work_dir / _CACHE),
        folder_size(work_dir / _CHECKPOINTS), config.store, work_dir,
    )  # fmt: skip


def folder_size(folder: Path) -> int:
    """Return the bytes of the files under a folder, hard links once; 0 if there is none."""
    seen: set[tuple[int, int]] = set()
    total = 0
    for parent, _, names in os.walk(folder):
        for name in names:
            try:
                status = os.lstat(os.path.join(parent, name))  # noqa: PTH118  (speed)
            except OSError:
                continue  # removed meanwhile
            if status.st_nlink > 1:
                if (status.st_dev, status.st_ino) in seen:
                    continue
                seen.add((status.st_dev, status.st_ino))
            total += status.st_size
    return total


def size(count: int) -> str:
    """Format bytes: `812 kB`, `6.2 GB`."""
    for unit, least in (("GB", 10**9), ("MB", 10**6)):
        if count >= least:
            return f"{count / least:.1f} {unit}"
    return f"{count / 1000:.0f} kB"
