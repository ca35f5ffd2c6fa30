"""Configuration: its sections, and loading it from presets and overrides."""

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
from rlhf.config.data import DataConfig, SourceConfig, WorldConfig
from rlhf.config.gates import ChampionGateConfig, GateRule, GatesConfig
from rlhf.config.load import (
    LoadedConfig,
    apply_machine_settings,
    load_config,
    load_preset,
    load_source,
    presets,
)
from rlhf.config.pipeline import (
    PipelineConfig,
    RuntimeConfig,
    StoreConfig,
    TrackingConfig,
)
from rlhf.config.ppo import PPOConfig
from rlhf.config.rewards import PreferenceConfig
from rlhf.config.training import (
    ArchitectureConfig,
    BaseModelConfig,
    EvaluationConfig,
    JudgeConfig,
    LoraConfig,
    RewardModelConfig,
    SFTConfig,
)

__all__ = [
    "ArchitectureConfig",
    "BaseModelConfig",
    "ChampionGateConfig",
    "ComponentSection",
    "CorrectnessConfig",
    "CustomComponent",
    "CustomConfig",
    "DataConfig",
    "EvaluationConfig",
    "GateRule",
    "GatesConfig",
    "JsonValidComponent",
    "JudgeConfig",
    "KeywordComponent",
    "LengthComponent",
    "LengthPenaltyConfig",
    "LoadedConfig",
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
    "SourceConfig",
    "StoreConfig",
    "TrackingConfig",
    "WorldConfig",
    "apply_machine_settings",
    "load_config",
    "load_preset",
    "load_source",
    "presets",
]
