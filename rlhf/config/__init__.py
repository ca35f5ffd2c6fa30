"""Configuration: frozen pydantic models and the loader that merges preset and command line."""

from rlhf.config.advice import advice
from rlhf.config.data import DataConfig, WorldConfig
from rlhf.config.load import Loaded, load_config
from rlhf.config.models import (
    ArchitectureConfig,
    BaseModelConfig,
    EvaluationConfig,
    GateRule,
    GatesConfig,
    LoraConfig,
    RewardModelConfig,
    SFTConfig,
)
from rlhf.config.pipeline import (
    PipelineConfig,
    PromotionConfig,
    RetryConfig,
    RuntimeConfig,
    StoreConfig,
)
from rlhf.config.ppo import PPOConfig

__all__ = [
    "ArchitectureConfig",
    "BaseModelConfig",
    "DataConfig",
    "EvaluationConfig",
    "GateRule",
    "GatesConfig",
    "Loaded",
    "LoraConfig",
    "PPOConfig",
    "PipelineConfig",
    "PromotionConfig",
    "RetryConfig",
    "RewardModelConfig",
    "RuntimeConfig",
    "SFTConfig",
    "StoreConfig",
    "WorldConfig",
    "advice",
    "load_config",
]
