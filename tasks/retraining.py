"""Retraining: its decision, its history, and the configuration of a warm start."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

from rlhf.champions import latest_entry
from rlhf.config import LoadedConfig, PipelineConfig
from rlhf.config.data import CONSEQUENCES
from rlhf.data.rows import PAIRS_TRAIN, Pair, read_rows
from rlhf.data.sources import source_digest
from rlhf.store import ArtifactRef, Store
from rlhf.store.manifest import canonical_json, sha256_bytes


@dataclass(frozen=True)
class Situation:
    """State before a retraining: the data's digest, the last retraining, the champion."""

    config: PipelineConfig
    data: str
    last: Mapping[str, Any] | None
    champion: Mapping[str, Any] | None

    @property
    def same_data(self) -> bool:
        """True if the last retraining had the same data."""
        return self.last is not None and self.last["data"] == self.data

    @property
    def overdue(self) -> bool:
        """True if the champion is older than `retraining.max_age_days`."""
        days = self.config.retraining.max_age_days
        when = (self.champion or {}).get("when")
        if days is None or when is None:
            return False
        return datetime.now(UTC) - datetime.fromisoformat(when) > timedelta(days=days)


def situation(config: PipelineConfig, store: Store) -> Situation:
    """Return the state before a retraining; of the data only the digest is read."""
    line = config.promotion.name
    last = store.history.latest(_history(line))
    return Situation(config, data_digest(config), last, latest_entry(store, line))


#: Fields of section data whose content `source_digest` identifies.
_LOCATIONS = {"source", "eval_source", "sft_source", "prompts_source"}


def data_digest(config: PipelineConfig) -> str:
    """Return a digest of the data's content and settings, without their location."""
    identity = {
        "source": source_digest(config.data, config.store_options),
        "data": config.data.model_dump(mode="json", exclude=_LOCATIONS | CONSEQUENCES),
        "seed": config.seed if config.data.source == "world" else None,
    }
    return sha256_bytes(canonical_json(identity))


def new_pairs(state: Situation, dataset: ArtifactRef, store: Store) -> int:
    """Count the training pairs that the last retraining, if any, did not have."""
    pairs = _pairs(store.fetch(dataset))
    before = (state.last or {}).get("dataset")
    if before is None or not store.exists(before):
        return len(pairs)
    return len(pairs - _pairs(store.fetch(before)))


def warm_started(
    loaded: LoadedConfig, champion: Mapping[str, Any] | None, store: Store
) -> LoadedConfig:
    """Return the configuration with the champion or its SFT policy as base model."""
    start = loaded.config.retraining.warm_start
    if start == "none" or champion is None:
        return loaded
    digest = champion["policy"]
    if start == "sft":
        digest = store.manifest(digest).parents["sft"]
    base = loaded.config.base.model_copy(update={"path": f"artifact:{digest}", "revision": None})
    config = loaded.config.model_copy(update={"base": base})
    sources = {**loaded.sources, "base.path": f"champion ({start})"}
    return loaded.model_copy(update={"config": config, "sources": sources})


def record_retraining(
    state: Situation, dataset: ArtifactRef, run: str, outcome: str, store: Store
) -> None:
    """Add a retraining to the line's history, so that its data count as used."""
    entry = {
        "data": state.data,
        "dataset": dataset.digest,
        "run": run,
        "outcome": outcome,
        "when": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    store.history.append(_history(state.config.promotion.name), entry)


def _history(line: str) -> str:
    return f"retrainings/{line}"


def _pairs(folder: Path) -> set[str]:
    return {repr((p.prompt, p.chosen, p.rejected)) for p in read_rows(folder / PAIRS_TRAIN, Pair)}
