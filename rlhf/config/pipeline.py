"""The whole pipeline's configuration."""

from __future__ import annotations

from typing import Literal, Self
from urllib.parse import urlsplit

from pydantic import Field, field_validator, model_validator

from rlhf.config.data import DataConfig
from rlhf.config.models import (
    BaseModelConfig,
    EvaluationConfig,
    GatesConfig,
    RewardModelConfig,
    SFTConfig,
)
from rlhf.config.ppo import PPOConfig
from rlhf.config.section import Section


class StoreConfig(Section):
    """S3 options that the standard AWS chain does not carry; credentials never stand here."""

    endpoint_url: str | None = None
    """Endpoint of an S3-compatible server; none uses the AWS chain's."""
    region: str | None = None
    """Region; none uses the AWS chain's."""
    profile: str | None = None
    """Named profile of the AWS configuration files."""
    ca_bundle: str | None = None
    """Certificate file to trust, for a server with a certificate of its own."""

    @field_validator("endpoint_url")
    @classmethod
    def _no_userinfo(cls, value: str | None) -> str | None:
        if value and "@" in urlsplit(value).netloc:
            # As above: the value may hold a password.
            raise ValueError("holds user info; give credentials by the AWS chain instead")
        return value


class RuntimeConfig(Section):
    """Where a stage runs: changes speed, never what is learnt, so no part of a fingerprint."""

    work_dir: str = ".rlhf/work"
    """Local folder for checkpoints and the artifact cache; safe to delete."""
    report_dir: str = ".rlhf/reports"
    """Local folder for the HTML reports."""
    device: Literal["auto", "cpu", "cuda", "mps"] = "auto"
    """Device to train on; auto takes an accelerator if there is one."""
    threads: int = Field(default=2, ge=1)
    """CPU threads for torch."""


class RetryConfig(Section):
    """Retries of a stage, for errors that trying again can cure."""

    attempts: int = Field(default=3, ge=0)
    """Retries after the first try."""
    delay_seconds: float = Field(default=5.0, ge=0)
    """First delay; doubles with every further retry."""
    jitter: float = Field(default=0.5, ge=0)
    """Random share added to each delay."""


class PromotionConfig(Section):
    """What happens to a policy that passed every gate."""

    name: str = Field(default="default", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Model line whose champion this pipeline updates."""


class PipelineConfig(Section):
    """Everything that a run depends on."""

    name: str = Field(default="rlhf", pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")
    """Name shown in run names and reports."""
    seed: int = Field(default=0, ge=0, lt=2**31)
    """Seeds data, initial weights, shuffling and sampling."""
    store: str = ".rlhf/store"
    """`file:///folder`, a plain folder, or `s3://bucket/prefix`."""
    store_options: StoreConfig = StoreConfig()
    """S3 endpoint, region, profile."""
    data: DataConfig = DataConfig()
    """Preference data."""
    base: BaseModelConfig = BaseModelConfig()
    """Base model."""
    sft: SFTConfig = SFTConfig()
    """Supervised fine-tuning."""
    reward_model: RewardModelConfig = RewardModelConfig()
    """Reward model."""
    ppo: PPOConfig = PPOConfig()
    """Policy optimisation."""
    evaluation: EvaluationConfig = EvaluationConfig()
    """Held-out evaluation."""
    gates: GatesConfig = GatesConfig()
    """Gates."""
    promotion: PromotionConfig = PromotionConfig()
    """Promotion."""
    retries: RetryConfig = RetryConfig()
    """Retries of each stage."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Folders, device, threads."""

    @field_validator("store")
    @classmethod
    def _known_store(cls, value: str) -> str:
        parts = urlsplit(value)
        if "@" in parts.netloc:
            # The value itself must not be repeated: it may hold a password.
            raise ValueError("holds user info; give credentials by the AWS chain instead")
        if parts.scheme not in ("", "file", "s3"):
            raise ValueError(f"scheme {parts.scheme!r} is not supported; use file:// or s3://")
        if parts.scheme == "s3" and not parts.netloc:
            raise ValueError("names no bucket; write s3://bucket/prefix")
        return value

    @model_validator(mode="after")
    def _judge_needs_world(self) -> Self:
        if self.evaluation.judge == "world" and self.data.source != "world":
            raise ValueError(
                f"evaluation.judge = 'world' can't judge data.source = {self.data.source!r}; "
                "set evaluation.judge to none"
            )
        if self.base.path is None and not self.sft.enabled:
            raise ValueError(
                "sft.enabled = false needs base.path: an untrained model can't be a policy"
            )
        return self
