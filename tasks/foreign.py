"""Which models of others the configuration names, and which stage takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.config import PipelineConfig
from rlhf.modeling.foreign import ForeignModel


def base_of_others(config: PipelineConfig) -> ForeignModel | None:
    """The model that SFT starts from."""
    base = config.base
    if base.path is None:
        return None
    return ForeignModel("base.path", base.path, base.revision, config.store_options)


def reward_model_of_others(config: PipelineConfig) -> ForeignModel | None:
    """A ready reward model, or one to start training from."""
    for name, place, ready in (
        ("ppo.reward_model_path", config.ppo.reward_model_path, True),
        ("reward_model.base", config.reward_model.base, False),
    ):
        if place is not None:
            return ForeignModel(name, place, options=config.store_options, ready=ready)
    return None


def reward_settings(config: PipelineConfig) -> Mapping[str, Any]:
    """What of the configuration shapes the reward model, beside the model of others itself."""
    if config.ppo.reward_model_path is not None:
        return {"reward_model": "ready"}  # nothing is trained
    return {"reward_model": config.reward_model.model_dump(exclude={"base"})}
