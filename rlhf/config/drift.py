"""Section of drift: limits for the difference between new data and the champion's."""

from __future__ import annotations

from pydantic import Field

from rlhf.config.section import Section


class DriftLimits(Section):
    """Limits of four measures; none sets no limit."""

    tokens: float | None = Field(default=None, ge=0, le=1)
    """Jensen–Shannon divergence of the token distributions in bits, 0 to 1."""
    lengths: float | None = Field(default=None, ge=0, le=1)
    """Kolmogorov–Smirnov distance of the lengths in characters, 0 to 1."""
    shares: float | None = Field(default=None, ge=0, le=1)
    """Share of the prompts that would have to change their language or slice, 0 to 1."""
    labels: float | None = Field(default=None, ge=0, le=1)
    """Difference of a rate, such as longer replies preferred, or share of contrary labels."""


class DriftWarnings(DriftLimits):
    """Limits that draws of one distribution do not reach (benchmarks/RESULTS.md)."""

    tokens: float | None = Field(default=0.02, ge=0, le=1)
    """Jensen–Shannon divergence of the token distributions in bits, 0 to 1."""
    lengths: float | None = Field(default=0.1, ge=0, le=1)
    """Kolmogorov–Smirnov distance of the lengths in characters, 0 to 1."""
    shares: float | None = Field(default=0.1, ge=0, le=1)
    """Share of the prompts that would have to change their language or slice, 0 to 1."""
    labels: float | None = Field(default=0.1, ge=0, le=1)
    """Difference of a rate, such as longer replies preferred, or share of contrary labels."""


class DriftConfig(Section):
    """Consequences of a difference between new data and those of the model line's champion.

    A measure reaches a limit if it does so by more than chance explains (docs/data.md).
    """

    enabled: bool = True
    """False compares nothing."""
    warn: DriftWarnings = DriftWarnings()
    """Limits from which the terminal and the report warn."""
    veto: DriftLimits = DriftLimits()
    """Limits from which the run stops before any training."""
    trigger: DriftLimits = DriftLimits()
    """Limits from which the retraining flow starts, even with fewer than
    `retraining.min_new_pairs` new pairs."""
