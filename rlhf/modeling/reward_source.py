"""Checks of an external reward model's configuration against a run's settings.

They need neither its weights nor its tokenizer, so that they precede any training.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.config import PipelineConfig
from rlhf.errors import ConfigError
from rlhf.files import is_file
from rlhf.modeling.source import CONTEXT_FIELDS, ExternalModel


def check_reward_source(
    config: PipelineConfig, model: ExternalModel, data: Mapping[str, Any]
) -> None:
    """Refuse a reward model that the run could not train, use for its replies, or as its critic.

    Args:
        config: The run's settings.
        model: The external reward model, ready or to train from.
        data: Its `config.json`.

    Raises:
        ConfigError: A setting does not fit it.
    """
    name, context = f"{model.field} = {model.uri!r}", context_in(data)
    limits, new_tokens = config.token_limits(), config.ppo.max_new_tokens
    check_context(config, model, data)
    encoder = is_encoder(data)
    options = (("pooling", "sum", "last"), ("lm_loss_coef", None, 0), ("members", None, 1))
    for field, only, default in options if encoder and not model.ready else ():
        value = getattr(config.reward_model, field)
        if value == only or (only is None and value != default):
            raise ConfigError(
                f"reward_model.{field} = {value!r} is for decoders, and {name} is an encoder "
                f"({data.get('model_type')}); set it to {default}"
            )
    if config.ppo.critic != "reward_model" or config.ppo.shared_base:
        return
    longest = limits.prompt + new_tokens
    reason = None
    if encoder:
        reason = (
            f"is an encoder ({data.get('model_type')}), in which the value of a prefix would see "
            "the rest of the reply"
        )
    elif context is not None and context < longest:
        reason = (
            f"reads at most {context:,} tokens, and a prompt with its reply has up to {longest:,}"
        )
    elif config.base.path is None and not _is_own(model):
        reason = "has another tokenizer than a policy that is trained from scratch"
    if reason:
        raise ConfigError(
            f"ppo.critic = 'reward_model', but {name} {reason}; set ppo.critic to policy"
        )


def check_context(config: PipelineConfig, model: ExternalModel, data: Mapping[str, Any]) -> None:
    """Refuse a model that can't read the policy's longest replies.

    Raises:
        ConfigError: They leave no room for a prompt.
    """
    context, new_tokens = context_in(data), config.ppo.max_new_tokens
    if context is not None and context <= new_tokens:
        raise model.error(
            f"reads at most {context:,} tokens, and ppo.max_new_tokens = {new_tokens:,} leave no "
            "room for a prompt; lower that, or give another reward model"
        )


def _is_own(model: ExternalModel) -> bool:
    """Return whether a reward model may be of this pipeline's making, with a policy's tokenizer."""
    if model.is_artifact or model.uri.startswith("s3://"):
        return True
    return model.is_path() and is_file(model.path / "rlhf.json")


def is_encoder(data: Mapping[str, Any]) -> bool:
    """Return whether transformers knows a `config.json`'s type as one that reads both ways."""
    # Imports torch, which takes seconds.
    from transformers.models.auto.modeling_auto import (
        MODEL_FOR_MASKED_LM_MAPPING_NAMES,
        MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    )

    name = data.get("model_type")
    if data.get("is_decoder"):
        return False
    return (
        name in MODEL_FOR_MASKED_LM_MAPPING_NAMES
        or name in MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES
    )


def context_in(data: Mapping[str, Any]) -> int | None:
    """Return the limit of a `config.json` on positions, of its text model; None without one."""
    text = data.get("text_config")
    parts = [text, data] if isinstance(text, dict) else [data]
    limits = [part.get(field) for part in parts for field in CONTEXT_FIELDS]
    return next((n for n in limits if isinstance(n, int) and n > 0), None)
