"""PPO checkpoints in the store, where a run on another machine finds them.

Each run has a store of its own, below the pipeline's: what is dropped there is nobody else's.
Its manifests say which checkpoints there are; its history tells people, who read `best` there.
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

KIND = "ppo_checkpoint"
HISTORY = "ppo"
KEEP = 2

log = logging.getLogger(__name__)


class CheckpointPlace(Section):
    """A run's store of checkpoints, in a form in which a child process can be told of it."""

    uri: str
    """The pipeline's store."""
    options: StoreConfig
    """How to reach it."""
    name: str
    """Of the run's own store below it."""
    work_dir: str
    """Local folder of the cache."""
    cache_bytes: int
    """Most that the cache may take."""
    producer: Producer
    """What made the checkpoints."""

    def open(self) -> StoredCheckpoints:
        """The checkpoints there."""
        store = open_store(
            self.uri, options=self.options, cache_dir=Path(self.work_dir),
            cache_bytes=self.cache_bytes,
        )  # fmt: skip
        return StoredCheckpoints(store.below(self.name), self.producer)


@dataclass(frozen=True)
class _Stored:
    """One checkpoint of the store."""

    digest: str
    update: int
    score: float | None


class StoredCheckpoints:
    """The last two checkpoints of a run, and the best one.

    `store` is the run's own. A second machine with the same run at the same time costs both some
    uploads, but no correctness: what it dropped too early is found damaged and left out.
    """

    def __init__(self, store: Store, producer: Producer) -> None:
        self._store, self._producer = store, producer
        self._damaged: set[str] = set()

    @property
    def uri(self) -> str:
        """Where they are."""
        return self._store.uri

    def save(self, folder: Path, update: int, score: float | None) -> None:
        """Publish a checkpoint, enter it in the history, and drop what need not stay.

        That something can't be dropped is a warning: the next time it is tried again.

        Raises:
            StoreError: It can't be published.
        """
        if self._damaged:
            # Else they would be in the way of the same checkpoint, when it is published again.
            self._drop_all_but(_to_keep(_found(self._store, self._damaged)))
            self._damaged.clear()
        ref = self._store.publish(
            folder, KIND, producer=self._producer, metrics={"update": update, "score": score},
            # They are not in this store. The checkpoint itself names them, and refuses others.
            parents={},
        )  # fmt: skip
        found = _found(self._store, self._damaged)
        best = _best(found)
        entry = {"digest": ref.digest, "update": update, "score": score}
        entry["best"] = bool(best and best.digest == ref.digest)
        self._store.history.append(HISTORY, entry)
        self._drop_all_but(_to_keep(found))

    def newest_after(self, update: int) -> tuple[int, Path] | None:
        """Update and verified files of the newest whole checkpoint that is newer than this.

        Damaged ones are logged as warnings and make room at the next `save`.

        Raises:
            StoreError: The store does not answer.
        """
        for stored in reversed(_found(self._store, self._damaged)):
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

    def _drop_all_but(self, kept: Iterable[_Stored]) -> None:
        try:
            self._store.retain([stored.digest for stored in kept])
        except StoreError as error:
            log.warning("older checkpoints can't be dropped now (%s)", error)


def keep_best(store: Store) -> None:
    """Remove all checkpoints of a run that is done, but the best one, for people to look at."""
    best = _best(_found(store, set()))
    store.retain([best.digest] if best else [])


def _found(store: Store, damaged: set[str]) -> list[_Stored]:
    """All that are known to be whole, by update; adds to the damaged ones."""
    found: dict[int, _Stored] = {}
    for digest in store.digests():
        if digest in damaged:
            continue
        try:
            manifest = store.manifest(digest)
        except ArtifactMissing:
            continue  # dropped by another machine a moment ago
        except ArtifactCorrupt as error:
            log.warning("a checkpoint is damaged and left out (%s)", error)
            damaged.add(digest)
            continue
        update, score = manifest.metrics.get("update"), manifest.metrics.get("score")
        if isinstance(update, int):
            score = score if isinstance(score, int | float) else None
            found[update] = _Stored(digest, update, score)
    return [found[update] for update in sorted(found)]


def _best(found: Iterable[_Stored]) -> _Stored | None:
    """The highest score; of equals the first."""
    scored = [stored for stored in found if stored.score is not None]
    return max(scored, key=lambda stored: stored.score or 0.0, default=None)


def _to_keep(found: list[_Stored]) -> list[_Stored]:
    best = _best(found)
    return [*found[-KEEP:], *([best] if best else [])]
