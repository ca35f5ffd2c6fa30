"""Types that every stage uses: its result and the listener to its progress."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

Scalar = float | int | str | bool | None


@dataclass(frozen=True)
class StageResult:
    """Metrics of a stage, beside the files it wrote.

    They go into the artifact's manifest, so they must be the same for identical runs: no durations,
    no paths.
    """

    metrics: Mapping[str, Scalar] = field(default_factory=dict)


@runtime_checkable
class Progress(Protocol):
    """Listener to a stage's progress. It is called often, so implementations throttle."""

    def __call__(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Report that `step` of `total` is done, with its metrics (reward, kl …), if any.

        Metrics that are known only later are reported with the same step again.
        """


def silent(step: int, total: int, metrics: Mapping[str, float]) -> None:
    """Ignore progress: the default when a stage is called from Python."""
