"""The result that a training or evaluation stage returns."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

Scalar = float | int | str | bool | None


@dataclass(frozen=True)
class StageResult:
    """Metrics of a stage, beside the files it wrote.

    They go into the artifact's manifest, so they must be the same for identical runs: no durations,
    no paths.
    """

    metrics: Mapping[str, Scalar] = field(default_factory=dict)
