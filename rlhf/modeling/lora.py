"""Low-rank adapters by peft."""

from __future__ import annotations

from typing import Any, Literal

import peft

from rlhf.config import LoraConfig


def lora_config(
    config: LoraConfig, task: Literal["CAUSAL_LM", "SEQ_CLS"], dropout: float | None = None
) -> peft.LoraConfig:
    """Our section as peft's; a reward model's head is trained in full beside its adapters."""
    return peft.LoraConfig(
        r=config.r,
        lora_alpha=config.alpha,  # pyright: ignore[reportArgumentType]  (a float is fine)
        lora_dropout=config.dropout if dropout is None else dropout,
        target_modules=config.target_modules,
        task_type=task,
        modules_to_save=["score"] if task == "SEQ_CLS" else None,
    )


def merged(model: Any) -> Any:
    """The plain model with any adapters merged into its weights, as later stages expect it."""
    return model.merge_and_unload() if isinstance(model, peft.PeftModel) else model
