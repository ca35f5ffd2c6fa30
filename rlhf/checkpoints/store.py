"""Checkpoints in the artifact store, for resuming a run on another machine.

Each run has a store of its own inside the pipeline's, so that deleting a checkpoint affects no
other run. The manifests are the list of checkpoints; the history, with the mark `best`, is only
for people. This module loads no torch: the parent process of a launch reads the store.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from rlhf.config.pipeline import StoreConfig
from rlhf.config.section import Section
from rlhf.errors import ArtifactCorrupt, ArtifactMissing, StoreError
from rlhf.store import Producer, Store, open_store

KIND = "checkpoint"
HISTORY = "checkpoints"
#: Newest checkpoints to retain; the best one is retained in any case.
KEEP = 2

log = logging.getLogger(__name__)


class CheckpointStoreConfig(Section):
    """Location and options of a run's checkpoint store, as JSON for a child process."""

    uri: str
    """URI of the pipeline's store."""
    options: StoreConfig
    """Connection options of the pipeline's store."""
    name: str
    """Name of the run's own store inside the pipeline's."""
    work_dir: str
    """Local folder of the cache."""
    cache_bytes: int
    """Maximum size of the cache."""
    producer: Producer
    """Producer that the checkpoints' manifests name."""

    def open(self) -> CheckpointStore:
        """Open the store."""
        store = open_store(
            self.uri, options=self.options, cache_dir=Path(self.work_dir),
            cache_bytes=self.cache_bytes,
        )  # fmt: skip
        return CheckpointStore(store.child(self.name), self.producer)


@dataclass(frozen=True)
class _Stored:
    """Entry of one checkpoint in the store."""

    digest: str
    update: int
    score: float | None


class CheckpointStore:
    """Checkpoint store of one run; retains the newest two checkpoints and the best.

    Two machines with the same run at the same time cost each other some uploads, but stay correct:
    a checkpoint that the other deleted is treated as damaged and skipped.

    Args:
        store: The run's own store.
        producer: Goes into the checkpoints' manifests.
    """

    def __init__(self, store: Store, producer: Producer) -> None:
        self._store, self._producer = store, producer
        self._damaged: set[str] = set()

    @property
    def uri(self) -> str:
        """URI of the run's own store."""
        return self._store.uri

    def save(self, folder: Path, update: int, score: float | None) -> None:
        """Publish a checkpoint, append it to the history, delete those not to be retained.

        A failed deletion is logged as a warning and tried again by the next `save`.

        Raises:
            StoreError: The checkpoint can't be published.
        """
        if self._damaged:
            # A damaged checkpoint would prevent publishing the same checkpoint again.
            self._delete_all_but(_retained(_intact(self._store, self._damaged)))
            self._damaged.clear()
        ref = self._store.publish(
            folder, KIND, producer=self._producer, metrics={"update": update, "score": score},
            # Parents are not in this store; the checkpoint's identity refers to them.
            parents={},
        )  # fmt: skip
        intact = _intact(self._store, self._damaged)
        best = _best(intact)
        entry = {"digest": ref.digest, "update": update, "score": score}
        self._store.history.append(
            HISTORY, {**entry, "best": bool(best and best.digest == ref.digest)}
        )
        self._delete_all_but(_retained(intact))

    def newest_after(self, update: int) -> tuple[int, Path] | None:
        """Fetch update and verified files of the newest intact checkpoint after `update`.

        Damaged ones are logged as warnings and deleted by the next `save`.

        Raises:
            StoreError: The store does not answer.
        """
        for stored in reversed(_intact(self._store, self._damaged)):
            if stored.update <= update:
                break
            try:
                return stored.update, self._store.fetch(stored.digest)
            except (ArtifactMissing, ArtifactCorrupt) as error:
                log.warning(
                    "checkpoint of update %d in %s is damaged (%s); taking the one before it",
                    stored.update, self.uri, error,
                )  # fmt: skip
                self._damaged.add(stored.digest)
        return None

    def _delete_all_but(self, retained: Iterable[_Stored]) -> None:
        try:
            self._store.retain([stored.digest for stored in retained])
        except StoreError as error:
            log.warning("older checkpoints can't be dropped now (%s)", error)


def keep_best(store: Store) -> None:
    """Delete a completed run's checkpoints, except the best one, for inspection."""
    best = _best(_intact(store, set()))
    store.retain([best.digest] if best else [])


def _intact(store: Store, damaged: set[str]) -> list[_Stored]:
    """List intact checkpoints by update, except `damaged`; add newly found damage."""
    intact: dict[int, _Stored] = {}
    for digest in store.digests():
        if digest in damaged:
            continue
        try:
            manifest = store.manifest(digest)
        except ArtifactMissing:
            continue  # just deleted by another machine
        except ArtifactCorrupt as error:
            log.warning("a checkpoint is damaged and left out (%s)", error)
            damaged.add(digest)
            continue
        update, score = manifest.metrics.get("update"), manifest.metrics.get("score")
        if isinstance(update, int):
            score = score if isinstance(score, int | float) else None
            intact[update] = _Stored(digest, update, score)
    return [intact[update] for update in sorted(intact)]


def _best(checkpoints: Iterable[_Stored]) -> _Stored | None:
    """The checkpoint with the highest score; the earliest of equal ones."""
    scored = [stored for stored in checkpoints if stored.score is not None]
    return max(scored, key=lambda stored: stored.score or 0.0, default=None)


def _retained(checkpoints: list[_Stored]) -> list[_Stored]:
    best = _best(checkpoints)
    return [*checkpoints[-KEEP:], *([best] if best else [])]
