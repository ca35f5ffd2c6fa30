"""Types of a pipeline stage: its declaration, and the arguments of its body."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeAlias

from rlhf.budget import Deadline
from rlhf.config import PipelineConfig, apply_machine_settings
from rlhf.config.pipeline import StageName
from rlhf.files import expand_home
from rlhf.markdown import Markdown
from rlhf.modeling.source import ExternalModel
from rlhf.stage import Progress, StageResult
from rlhf.store import ArtifactRef, Producer, Store, open_store

#: A page of Markdown, or the rows of a table.
Shown: TypeAlias = Markdown | list[dict[str, Any]]


@dataclass(frozen=True)
class StageRun:
    """Arguments of a stage's body; inputs are verified local folders."""

    config: PipelineConfig
    refs: Mapping[str, ArtifactRef]
    folders: Mapping[str, Path]
    out_dir: Path
    checkpoints: Path
    store: Store
    producer: Producer
    progress: Progress
    deadline: Deadline | None = None
    """When it has to stop, as the run's budget is used up then; None has no limit."""


@dataclass(frozen=True, kw_only=True)
class Stage:
    """Declaration of a stage: one node of the pipeline."""

    name: StageName
    kind: str
    """Kind of the artifact that it makes."""
    inputs: Mapping[str, StageName]
    """Roles of its inputs, each with the stage that makes it."""
    depends_on: Callable[[PipelineConfig], Mapping[str, Any]]
    """The configuration that changes the result, without paths: content counts, not location."""
    body: Callable[[StageRun], StageResult]
    headline: tuple[tuple[str, ...], ...] = ()
    """Parts of the one-line summary: a format, and the metrics that it takes."""
    section: str | None = None
    """Section of the configuration that experiment trackers get; None sends them nothing."""
    tracks_steps: bool = False
    """Whether trackers get the metrics of every step, and not those of the result alone."""
    stops_at_deadline: bool = False
    """Whether it stops when the run's budget is used up, with a result."""
    length: str | None = None
    """Field of its section that its time is proportional to, for estimates."""
    is_off: Callable[[PipelineConfig], bool] = lambda _: False
    """Whether the configuration switches its training off."""
    needs_approval: bool = False
    """Whether a person may have to approve `inputs["policy"]` before it runs."""
    source_digest: Callable[[PipelineConfig], str] | None = None
    """Digest of the external data that it reads, as a part of its fingerprint."""
    external_model: Callable[[PipelineConfig], ExternalModel | None] = lambda _: None
    """The external model that it starts from; its files are in `StageRun.folders["base"]`."""
    holds: Callable[[PipelineConfig, Mapping[str, ArtifactRef], Store], bool] = lambda *_: True
    """Whether its effect outside of the artifact is still in place; if not, it runs again."""
    show: Callable[[Path, PipelineConfig], Mapping[str, Shown]] | None = None
    """Makes pages for Prefect's UI, by key, from its artifact's folder."""

    optional: Mapping[str, str] = field(default_factory=dict[str, str])
    """Roles of inputs that it may have beside `inputs`, each with the kind of artifact."""
    find_optional: Callable[
        [PipelineConfig, Mapping[str, ArtifactRef], Store], Mapping[str, ArtifactRef]
    ] = lambda *_: {}
    """Finds the optional inputs in the store, from the others."""

    def trains(self, config: PipelineConfig) -> bool:
        """Return whether it trains a model: it is not switched off, and none is given ready."""
        external = self.external_model(config)
        is_ready = external is not None and external.ready
        return self.tracks_steps and not self.is_off(config) and not is_ready

    def needed_inputs(self, config: PipelineConfig) -> Mapping[str, StageName]:
        """Return `inputs`, or none where a ready external model takes the stage's place."""
        external = self.external_model(config)
        return {} if external and external.ready else self.inputs


def store_of(config: PipelineConfig) -> Store:
    """Open the configured store, with its cache in this machine's work folder."""
    config = apply_machine_settings(config)
    return open_store(
        config.store,
        options=config.store_options,
        cache_dir=expand_home(config.runtime.work_dir),
        cache_bytes=int(config.runtime.cache_gb * 1e9),
    )
