"""Running normalisation of a reward component."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

from rlhf.config import ComponentSection
from rlhf.statistics import RunningMoments


class ComponentScale(RunningMoments):
    """Running normalisation (z-score or min-max) and clipping of component values.

    A batch is added before it is normalised, so that the first one has a scale. If all values are
    equal, each becomes 0.
    """

    def __init__(self, config: ComponentSection) -> None:
        super().__init__()
        self.config = config
        self.low, self.high = math.inf, -math.inf

    def __call__(self, values: Sequence[float]) -> list[float]:
        """Add a batch of values; return them normalised and clipped."""
        scaled = list(values)
        if self.config.normalize != "none":
            self._add(scaled)
            scaled = self._normalise(scaled)
        limit = self.config.clip
        return scaled if limit is None else [max(-limit, min(limit, v)) for v in scaled]

    def _add(self, values: Sequence[float]) -> None:
        self.low, self.high = min(self.low, *values), max(self.high, *values)
        mean = math.fsum(values) / len(values)
        # Added by itself and not by `merge`: the order of additions decides the last bit, and equal
        # seeds must give the same rewards as in earlier versions.
        self.squares += math.fsum((v - mean) ** 2 for v in values)
        self.merge(len(values), mean, 0.0)

    def _normalise(self, values: Sequence[float]) -> list[float]:
        if self.config.normalize == "minmax":
            width = self.high - self.low
            return [(v - self.low) / width if width > 0 else 0.0 for v in values]
        deviation = math.sqrt(self.squares / self.count)
        return [(v - self.mean) / deviation if deviation > 1e-12 else 0.0 for v in values]

    def state_dict(self) -> dict[str, float]:
        """State for a checkpoint; empty before the first batch."""
        return super().state_dict() | {"low": self.low, "high": self.high} if self.count else {}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore a state of `state_dict`."""
        if state:
            super().load_state_dict(state)
            self.low, self.high = float(state["low"]), float(state["high"])
