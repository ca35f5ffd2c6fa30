"""Section of experiment trackers."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator

from rlhf.config.section import Section

Tracker = Literal["tensorboard", "wandb", "mlflow", "trackio"]


class TrackingConfig(Section):
    """Where metrics are sent: changes what is seen, never what is learnt, so no part of a
    fingerprint. Addresses and credentials stand in each tracker's own environment variables."""

    trackers: tuple[Tracker, ...] = ("tensorboard",)
    """Any of `tensorboard`, `wandb`, `mlflow` and `trackio`; an empty list sends nothing."""
    project: str = Field(default="rlhf", min_length=1)
    """Project of wandb and trackio, and experiment of MLflow."""
    log_dir: str = Field(default=".rlhf/logs", min_length=1)
    """Local folder for TensorBoard's files (one folder per run, and in it one per stage) and
    wandb's; a machine's own RLHF_LOG_DIR wins."""

    @field_validator("trackers")
    @classmethod
    def _without_duplicates(cls, value: tuple[Tracker, ...]) -> tuple[Tracker, ...]:
        return tuple(dict.fromkeys(value))
