"""Whether there is something to retrain on, and the configuration that starts from the champion."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rlhf.config import Loaded, PipelineConfig
from rlhf.data.rows import PAIRS_TRAIN, Pair, read_rows
from rlhf.data.sources import source_digest
from rlhf.store import ArtifactRef, Store
from rlhf.store.manifest import canonical_json, sha256_bytes


@dataclass(frozen=True)
class Situation:
    """What a retraining finds: the data's fingerprint, the last retraining, the champion."""

    config: PipelineConfig
    data: str
    last: Mapping[str, Any] | None
    champion: Mapping[str, Any] | None

    @property
    def same_data(self) -> bool:
        """Whether the last retraining had these very data."""
        return self.last is not None and self.last["data"] == self.data

    @property
    def overdue(self) -> bool:
        """Whether the champion is older than it may be."""
        days = self.config.retraining.max_age_days
        when = (self.champion or {}).get("when")
        if days is None or when is None:
            return False
        return datetime.now(UTC) - datetime.fromisoformat(when) > timedelta(days=days)


def situation(config: PipelineConfig, store: Store) -> Situation:
    """Look at the data, without reading more of them than their fingerprint takes."""
    line = config.promotion.name
    latest = store.history.latest
    return Situation(
        config, data_digest(config), latest(_history(line)), latest(f"champion/{line}")
    )


def data_digest(config: PipelineConfig) -> str:
    """Identity of the data and of how they are read; moved data are the same data."""
    identity = {
        "source": source_digest(config.data, config.store_options),
        "data": config.data.model_dump(mode="json", exclude={"source"}),
        "seed": config.seed if config.data.source == "world" else None,
    }
    return sha256_bytes(canonical_json(identity))


def new_pairs(found: Situation, dataset: ArtifactRef, store: Store) -> int:
    """How many training pairs the last retraining did not have; all, if there was none."""
    pairs = _pairs(store.fetch(dataset))
    before = (found.last or {}).get("dataset")
    if before is None or not store.exists(before):
        return len(pairs)
    return len(pairs - _pairs(store.fetch(before)))


def _pairs(folder: Path) -> set[str]:
    return {repr((p.prompt, p.chosen, p.rejected)) for p in read_rows(folder / PAIRS_TRAIN, Pair)}


def warm_started(loaded: Loaded, champion: Mapping[str, Any] | None, store: Store) -> Loaded:
    """The configuration with the champion, or its SFT policy, in the place of the base model."""
    start = loaded.config.retraining.warm_start
    if start == "none" or champion is None:
        return loaded
    digest = champion["policy"]
    if start == "sft":
        digest = store.manifest(digest).parents["sft"]
    base = loaded.config.base.model_copy(update={"path": f"artifact:{digest}", "revision": None})
    config = loaded.config.model_copy(update={"base": base})
    return Loaded(config, {**loaded.sources, "base.path": f"champion ({start})"})


def remember(found: Situation, dataset: ArtifactRef, run: str, outcome: str, store: Store) -> None:
    """Note which data were decided upon, so that the same are not trained on again."""
    entry = {
        "data": found.data,
        "dataset": dataset.digest,
        "run": run,
        "outcome": outcome,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.history.append(_history(found.config.promotion.name), entry)


def _history(line: str) -> str:
    return f"retrainings/{line}"
