"""Estimate of a run's memory and time, from configurations alone.

Models are built on torch's meta device, which has shapes and no data: their forward passes tell
exactly what a backward pass would find stored, and what a cache holds, whatever the family.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rlhf.config import LoraConfig, PipelineConfig, PPOConfig
from rlhf.config.training import TrainingSection

#: Bytes of a weight, its gradient and AdamW's two moments, in float32.
WEIGHT, TRAINED = 4, 12
#: Tensors of the size of the logits that TRL's SFT loss holds at its peak: the logits, their
#: float32 copy, the log-softmax and its gradient.
SFT_LOGITS = 4
#: Memory of Python and the libraries (torch, transformers, TRL): measured on Linux.
PROCESS = 700e6


@dataclass(frozen=True)
class Estimate:
    """Peak memory of a training stage, in bytes, and its time in seconds."""

    stage: str
    weights: float
    """Weights of all models in memory."""
    optimizer: float
    """Gradients and the optimiser's moments."""
    activations: float
    """States kept for a backward pass, with the logits."""
    cache: float
    """Keys and values of replies that are being sampled."""
    seconds: float

    @property
    def total(self) -> float:
        """Peak: sampling and backward passes do not overlap."""
        return PROCESS + self.weights + self.optimizer + max(self.activations, self.cache)


@dataclass(frozen=True)
class Shape:
    """A model's number of parameters, and what a forward pass stores."""

    parameters: int
    adapter: int
    """Trainable parameters with LoRA; 0 without."""
    vocabulary: int
    stored_per_row: float
    """Bytes stored for the backward pass by a row of the longest length, without logits."""
    cache_per_token: float
    """Bytes of keys, values and other state of a sequence, by its tokens."""


def estimate(config: PipelineConfig, base: Path, rows: Sequence[int]) -> list[Estimate]:
    """Estimate the training stages of a run on one device.

    Args:
        config: The run's configuration, with `base.path` set.
        base: Folder of the base model; its weights are not read.
        rows: Number of demonstrations, of pairs and of prompts.

    Raises:
        ValueError: The family's code does not run on the meta device.
    """
    limits = config.token_limits()
    speed = flops_per_second(config.runtime.device)
    result = []
    sections: list[tuple[str, TrainingSection, int, int]] = [
        ("train-sft", config.sft, rows[0], 1),
        ("train-reward-model", config.reward_model, rows[1], 2),
    ]
    for stage, section, count, replies in sections:
        shape = shape_of(base, limits.max_length, section.lora)
        batch = replies * min(section.micro_batch_size or section.batch_size, section.batch_size)
        logits = SFT_LOGITS * 4 * batch * limits.max_length * shape.vocabulary
        trained = shape.adapter or shape.parameters
        tokens = count * section.epochs * replies * limits.max_length
        result.append(
            Estimate(
                stage, WEIGHT * (shape.parameters + shape.adapter), TRAINED * trained,
                batch * shape.stored_per_row + (logits if replies == 1 else 0), 0,
                6 * shape.parameters * tokens / speed,
            )
        )  # fmt: skip
    shape = shape_of(base, limits.max_length, config.ppo.lora)
    result.append(_ppo(config.ppo, shape, limits.max_length, speed))
    return result


def _ppo(config: PPOConfig, shape: Shape, length: int, speed: float) -> Estimate:
    """Estimate PPO: four models, or adapters on one."""
    trained = shape.adapter or shape.parameters
    separate = 0 if shape.adapter else 1  # a reference of its own
    separate += not config.shared_base  # the reward model
    has_critic = config.critic in ("policy", "reward_model") and not config.shared_base
    frozen = WEIGHT / 2 if config.precision == "bf16" else WEIGHT
    weights = WEIGHT * (shape.parameters + shape.adapter) + frozen * separate * shape.parameters
    optimizer = TRAINED * trained
    if has_critic:
        weights += WEIGHT * shape.parameters
        optimizer += TRAINED * shape.parameters
    elif config.critic == "adapter" or config.shared_base:
        weights, optimizer = weights + WEIGHT * trained, optimizer + TRAINED * trained
    batch = min(config.micro_batch_size, config.mini_batch_size)
    stored = batch * shape.stored_per_row
    # Log-probabilities are computed in slices; as much as this is kept (rlhf.modeling.logprobs).
    kept = min(4 * batch * config.max_new_tokens * shape.vocabulary, 128 * 2**20)
    decoded = min(config.rollout_batch_size or config.chunk_size, config.chunk_size)
    episodes = config.updates * config.chunk_size
    # Sampling, three scoring passes and the critic's; then forward and backward of policy and
    # critic in every epoch.
    passes = 2 * 5 + 6 * config.num_ppo_epochs * (1 + has_critic)
    return Estimate(
        "train-policy", weights, optimizer, stored + kept,
        decoded * length * shape.cache_per_token,
        passes * shape.parameters * episodes * length / speed,
    )  # fmt: skip


def shape_of(base: Path, length: int, lora: LoraConfig | None) -> Shape:
    """Measure a model's shape on the meta device.

    Raises:
        ValueError: The family's code does not run there.
    """
    import peft
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf.modeling.lora import lora_config
    from rlhf.modeling.packed import backbone_of, head_of

    config = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            parameters, adapter = model.num_parameters(), 0
            if lora:
                model = peft.get_peft_model(model, lora_config(lora, "CAUSAL_LM"))
                adapter = model.num_parameters() - parameters
            ids = torch.zeros(1, length, dtype=torch.long)
            stored = _stored_bytes(backbone_of(model), ids)
            cached = _cached_bytes(backbone_of(model), ids)
        head = head_of(model)
        vocabulary = head.weight.shape[0] if hasattr(head, "weight") else config.vocab_size
    except Exception as error:  # a family's code can raise anything
        raise ValueError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    return Shape(parameters, adapter, vocabulary, stored, cached / length)


def _stored_bytes(backbone: Any, ids: Tensor) -> float:
    """Return the bytes that a forward pass keeps for the backward pass, without parameters."""
    parameters = {p.untyped_storage()._cdata for p in backbone.parameters()}
    storages: dict[int, tuple[int, Any]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in parameters:
            storages[storage._cdata] = (storage.nbytes(), storage)  # held, so that no id recurs
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        backbone.train()(**_arguments(ids), use_cache=False)
    return float(sum(size for size, _ in storages.values()))


@torch.no_grad()
def _cached_bytes(backbone: Any, ids: Tensor) -> float:
    """Return the bytes of a sequence's cache."""
    output = backbone.eval()(**_arguments(ids), use_cache=True)
    cache = getattr(output, "past_key_values", None) or getattr(output, "cache_params", None)
    tensors = {id(t): t for layer in getattr(cache, "layers", ()) for t in vars(layer).values()}
    return float(sum(t.nbytes for t in tensors.values() if isinstance(t, Tensor)))


def _arguments(ids: Tensor) -> dict[str, Tensor]:
    # To build a mask transformers reads values, which the meta device lacks; it takes one of four
    # dimensions as it is.
    return {
        "input_ids": ids,
        "position_ids": torch.arange(ids.shape[1])[None],
        "attention_mask": torch.ones(1, 1, 1, 1, dtype=torch.bool),
    }


def flops_per_second(device_name: str) -> float:
    """Measure the speed of matrix products in float32, in operations per second."""
    name = device_name if device_name != "auto" else "cuda" if torch.cuda.is_available() else "cpu"
    size = 4096 if name == "cuda" else 1024
    matrix = torch.rand(size, size, device=name)
    best = float("inf")
    for _ in range(4):
        started = time.perf_counter()
        float((matrix @ matrix)[0, 0])  # waits for the device
        best = min(best, time.perf_counter() - started)
    return 2 * size**3 / best


def available_bytes(device_name: str) -> float:
    """Return the free memory of the device."""
    if torch.cuda.is_available() and device_name in ("auto", "cuda"):
        return float(torch.cuda.mem_get_info()[0])
    return float(os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
