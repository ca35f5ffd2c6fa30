"""Configuration: frozen pydantic models and the loader that merges preset and command line."""

from rlhf.config.advice import advice
from rlhf.config.components import (
    ComponentSection,
    CorrectnessComponent,
    CorrectnessConfig,
    CustomComponent,
    CustomConfig,
    JsonValidComponent,
    KeywordComponent,
    LengthComponent,
    LengthPenaltyConfig,
    RegexComponent,
    RemoteComponent,
    RepetitionComponent,
    RewardModelComponent,
)
from rlhf.config.data import DataConfig, WorldConfig
from rlhf.config.environments import (
    MultiObjectiveConfig,
    PreferenceConfig,
    TextGenerationConfig,
)
from rlhf.config.load import Loaded, load_config, load_preset, presets
from rlhf.config.machine import on_this_machine
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
from rlhf.config.retraining import RetrainingConfig
from rlhf.config.tracking import TrackingConfig

__all__ = [
    "ArchitectureConfig",
    "BaseModelConfig",
    "ComponentSection",
    "CorrectnessComponent",
    "CorrectnessConfig",
    "CustomComponent",
    "CustomConfig",
    "DataConfig",
    "EvaluationConfig",
    "GateRule",
    "GatesConfig",
    "JsonValidComponent",
    "KeywordComponent",
    "LengthComponent",
    "LengthPenaltyConfig",
    "Loaded",
    "LoraConfig",
    "MultiObjectiveConfig",
    "PPOConfig",
    "PipelineConfig",
    "PreferenceConfig",
    "PromotionConfig",
    "RegexComponent",
    "RemoteComponent",
    "RepetitionComponent",
    "RetrainingConfig",
    "RetryConfig",
    "RewardModelComponent",
    "RewardModelConfig",
    "RuntimeConfig",
    "SFTConfig",
    "StoreConfig",
    "TextGenerationConfig",
    "TrackingConfig",
    "WorldConfig",
    "advice",
    "load_config",
    "load_preset",
    "on_this_machine",
    "presets",
]
