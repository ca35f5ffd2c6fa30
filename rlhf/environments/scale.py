"""Puts the values of a component on a common scale, by what was seen so far."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from rlhf.config import ComponentSection


class Scale:
    """Running z-score or min-max of all values so far, then a clamp.

    A batch is taken up before it is scaled, so that the first one has a scale, too. Mean and
    squared deviations are merged by batch (Chan, Golub & LeVeque 1983, eq. 2.1). All values being
    equal, each is worth 0.
    """

    def __init__(self, config: ComponentSection) -> None:
        self.config = config
        self.count, self.mean, self.squares = 0, 0.0, 0.0
        self.low, self.high = math.inf, -math.inf

    def __call__(self, values: Sequence[float]) -> list[float]:
        """The values, normalised and clamped."""
        scaled = list(values)
        if self.config.normalize != "none":
            self._take_up(scaled)
            scaled = self._normalised(scaled)
        limit = self.config.clip
        return scaled if limit is None else [max(-limit, min(limit, v)) for v in scaled]

    def _take_up(self, values: Sequence[float]) -> None:
        self.low, self.high = min(self.low, *values), max(self.high, *values)
        n = len(values)
        mean = math.fsum(values) / n
        delta, total = mean - self.mean, self.count + n
        self.squares += math.fsum((v - mean) ** 2 for v in values)
        self.squares += delta**2 * self.count * n / total
        self.mean += delta * n / total
        self.count = total

    def _normalised(self, values: Sequence[float]) -> list[float]:
        if self.config.normalize == "minmax":
            width = self.high - self.low
            return [(v - self.low) / width if width > 0 else 0.0 for v in values]
        deviation = math.sqrt(self.squares / self.count)
        return [(v - self.mean) / deviation if deviation > 1e-12 else 0.0 for v in values]

    def state_dict(self) -> dict[str, Any]:
        """What was seen so far; empty before the first batch."""
        names = ("count", "mean", "squares", "low", "high")
        return {name: getattr(self, name) for name in names} if self.count else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from such a state."""
        for name, value in state.items():
            setattr(self, name, value)
