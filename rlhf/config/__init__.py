"""Configuration: its sections, and loading it from presets and overrides."""

from rlhf.config.advice import advice
from rlhf.config.components import (
    ComponentSection,
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
)
from rlhf.config.data import DataConfig, WorldConfig
from rlhf.config.environments import PreferenceConfig
from rlhf.config.load import Loaded, load_config, load_preset, presets
from rlhf.config.machine import on_this_machine
from rlhf.config.models import (
    ArchitectureConfig,
    BaseModelConfig,
    EvaluationConfig,
    GateRule,
    LoraConfig,
    RewardModelConfig,
    SFTConfig,
)
from rlhf.config.pipeline import (
    PipelineConfig,
    RuntimeConfig,
    StoreConfig,
)
from rlhf.config.ppo import PPOConfig
from rlhf.config.tracking import TrackingConfig

__all__ = [
    "ArchitectureConfig",
    "BaseModelConfig",
    "ComponentSection",
    "CorrectnessConfig",
    "CustomComponent",
    "CustomConfig",
    "DataConfig",
    "EvaluationConfig",
    "GateRule",
    "JsonValidComponent",
    "KeywordComponent",
    "LengthComponent",
    "LengthPenaltyConfig",
    "Loaded",
    "LoraConfig",
    "PPOConfig",
    "PipelineConfig",
    "PreferenceConfig",
    "RegexComponent",
    "RemoteComponent",
    "RepetitionComponent",
    "RewardModelConfig",
    "RuntimeConfig",
    "SFTConfig",
    "StoreConfig",
    "TrackingConfig",
    "WorldConfig",
    "advice",
    "load_config",
    "load_preset",
    "on_this_machine",
    "presets",
]
