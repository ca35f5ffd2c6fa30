"""Estimate of a run's memory and time, from configurations alone.

Models are built of torch's fake tensors, which have shapes and no data: their forward passes tell
what a backward pass would find stored, and what a cache holds, whatever the family.
"""

from __future__ import annotations

import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers.utils import logging as transformers_logging

from rlhf.config import LoraConfig, PipelineConfig, PPOConfig
from rlhf.config.training import FrozenDtype, TrainingSection
from rlhf.modeling.nf4 import NF4_BYTES

#: Bytes of a weight, its gradient and AdamW's two moments, in float32.
WEIGHT, GRADIENT, MOMENTS = 4, 4, 8
#: Tensors of the size of the logits that TRL's SFT loss holds at its peak: the logits, their
#: float32 copy, the log-softmax and its gradient.
SFT_LOGITS = 4
#: Memory of Python and the libraries (torch, transformers, TRL): measured on Linux.
PROCESS = 700e6
#: Where a container sees its limit of memory (control groups, version 2).
CGROUP = Path("/sys/fs/cgroup")


@dataclass(frozen=True)
class Estimate:
    """Peak memory of a training stage, in bytes, and its speed."""

    section: str
    """The stage's section of the configuration."""
    weights: float
    """Weights of all models in memory."""
    optimizer: float
    """The optimiser's moments, and gradients if they are summed over several passes."""
    gradients: float
    """Gradients that are made while the backward pass frees activations."""
    activations: float
    """States kept for a backward pass, with the logits."""
    cache: float
    """Keys and values of replies that are being sampled."""
    tokens_per_second: float
    """Of rows that are trained on or, in PPO, of prompts and replies."""

    @property
    def peak(self) -> float:
        """Peak memory: sampling and backward passes do not overlap."""
        passing = max(self.activations, self.cache, self.gradients)
        return PROCESS + self.weights + self.optimizer + passing


@dataclass(frozen=True)
class Shape:
    """A model's number of parameters, and what a forward pass stores."""

    parameters: int
    linear: int
    """Parameters in linear layers that may be held in fewer bits if they are frozen."""
    adapter: int
    """Trainable parameters with LoRA; 0 without."""
    vocabulary: int
    stored_per_row: float
    """Bytes stored for the backward pass by a row of the longest length, without logits."""
    cache_per_token: float
    """Bytes of keys, values and other state of a sequence, by its tokens."""


class Measurement:
    """A base model's shape at one length, and the device's speed, which take seconds to find.

    Args:
        base: Folder of the base model; its weights are not read.
        length: Tokens of the longest rows.
        device: Value of `runtime.device`.

    Raises:
        ValueError: The family's code does not run with fake tensors.
    """

    def __init__(self, base: Path, length: int, device: str) -> None:
        self.base, self.length = base, length
        self.speed = flops_per_second(device)
        self.plain = shape_of(base, length, None)
        self.exact = stored_bytes(base) if _is_on_gpu(device) else WEIGHT
        """Bytes of a weight with `frozen_dtype: auto`: those of the files, on a GPU."""
        self._adapted = dict[str, Shape]()

    def shape(self, lora: LoraConfig | None) -> Shape:
        """Return the shape with an adapter, which is counted once.

        Raises:
            ValueError: The family's code does not run on the meta device.
        """
        if lora is None:
            return self.plain
        key = lora.model_dump_json()
        if key not in self._adapted:
            self._adapted[key] = _adapted(self.plain, self.base, lora)
        return self._adapted[key]


def estimate(
    config: PipelineConfig, base: Path, measured: Measurement | None = None
) -> list[Estimate]:
    """Estimate the training stages of a run on one device, for rows of the longest length.

    Args:
        config: The run's configuration, with `base.path` set.
        base: Folder of the base model; its weights are not read.
        measured: That base at the configuration's length; None measures it.

    Raises:
        ValueError: The family's code does not run with fake tensors.
    """
    length = config.token_limits().max_length
    measured = measured or Measurement(base, length, config.runtime.device)
    speed, exact = measured.speed, measured.exact
    sections: list[tuple[str, TrainingSection, int]] = [
        ("sft", config.sft, 1),
        ("reward_model", config.reward_model, 2),
    ]
    result = [
        _training(name, section, replies, measured.shape(section.lora), length, speed, exact)
        for name, section, replies in sections
    ]
    shape = measured.shape(config.ppo.lora)
    ppo = _ppo(config.ppo, shape, length, speed, exact, judged=_is_judged(config))
    if config.ppo.watchdog is not None and not _is_on_gpu(config.runtime.device):
        # The weights of its best look, in the host's memory: rlhf/ppo/watchdog.py.
        retained = WEIGHT * (shape.adapter or shape.parameters)
        ppo = replace(ppo, weights=ppo.weights + retained)
    return [*result, ppo]


def cures(config: PipelineConfig, stage: Estimate) -> str:
    """Return what to change so that a stage needs less memory, the largest part first."""
    section: Any = getattr(config, stage.section)
    advice: list[str] = []
    if section.lora is None:
        advice.append(f"set {stage.section}.lora (configs/lora.yaml)")
    if stage.section == "ppo" and section.lora is not None and not section.shared_base:
        advice.append("set ppo.shared_base to true")
    is_4_bits = section.lora is None or section.frozen_dtype == "nf4"
    if stage.weights > 0.3 * stage.peak and not is_4_bits and _is_on_gpu(config.runtime.device):
        advice.append(f"set {stage.section}.frozen_dtype to nf4")
    if stage.activations > 0.3 * stage.peak:
        advice.append(f"lower {stage.section}.micro_batch_size or reward_model.max_length")
        if stage.section == "ppo" and not section.gradient_checkpointing:
            advice.append("set ppo.gradient_checkpointing to true")
    if stage.cache > 0.3 * stage.peak:
        advice.append("lower ppo.rollout_batch_size")
    needs_memory = _is_judged(config) or not _is_on_gpu(config.runtime.device)
    if stage.section == "ppo" and section.watchdog is not None and needs_memory:
        needless = "judge in memory" if _is_judged(config) else "second copy of the policy"
        advice.append(f"set ppo.watchdog to none, which needs no {needless}")
    return "; ".join([*advice, "take a smaller base or a larger device"])


def _is_judged(config: PipelineConfig) -> bool:
    """Return whether PPO holds a judge, for its watchdog."""
    return config.judge.enabled and config.ppo.watchdog is not None


def _training(
    name: str, section: TrainingSection, replies: int, shape: Shape, length: int, speed: float,
    exact: float,
) -> Estimate:  # fmt: skip
    """Estimate SFT or, with two replies to a row, reward model training."""
    micro = min(section.micro_batch_size or section.batch_size, section.batch_size)
    batch = replies * micro
    trained = shape.adapter or shape.parameters
    accumulates = micro < section.batch_size
    logits = SFT_LOGITS * 4 * batch * length * shape.vocabulary if replies == 1 else 0
    return Estimate(
        section=name,
        weights=_base(shape, _linear_bytes(section.frozen_dtype, exact)),
        optimizer=(MOMENTS + GRADIENT * accumulates) * trained,
        gradients=GRADIENT * trained,
        activations=batch * shape.stored_per_row + logits,
        cache=0,
        tokens_per_second=speed / (6 * shape.parameters),
    )  # fmt: skip


def _ppo(
    config: PPOConfig, shape: Shape, length: int, speed: float, exact: float, *, judged: bool
) -> Estimate:
    """Estimate PPO: four models, or adapters on one; and the watchdog's judge, of equal size."""
    trained = shape.adapter or shape.parameters
    separate = 0 if shape.adapter else 1  # a reference of its own
    separate += not config.shared_base  # the reward model
    separate += judged
    has_critic = config.critic in ("policy", "reward_model") and not config.shared_base
    exact = WEIGHT / 2 if config.precision == "bf16" else exact
    base, scorer = (_linear_bytes(d, exact) for d in (config.frozen_dtype, config.scorer_dtype))
    weights = _base(shape, base) + separate * _frozen(shape, scorer)
    if has_critic:
        weights, trained = weights + WEIGHT * shape.parameters, trained + shape.parameters
    elif config.critic != "head":
        weights, trained = weights + WEIGHT * shape.adapter, trained + shape.adapter
    batch = min(config.micro_batch_size, config.mini_batch_size)
    accumulates = batch < config.mini_batch_size
    # Log-probabilities are computed in slices; as much as this is kept (rlhf.modeling.logprobs).
    kept = min(4 * batch * config.max_new_tokens * shape.vocabulary, 128 * 2**20)
    decoded = min(config.rollout_batch_size or config.chunk_size, config.chunk_size)
    # Sampling, three scoring passes and the critic's; then forward and backward of policy and
    # critic in every epoch.
    passes = 2 * 5 + 6 * config.num_ppo_epochs * (1 + has_critic)
    return Estimate(
        section="ppo", weights=weights,
        optimizer=(MOMENTS + GRADIENT * accumulates) * trained,
        gradients=GRADIENT * trained,
        activations=batch * shape.stored_per_row + kept,
        cache=decoded * length * shape.cache_per_token,
        tokens_per_second=speed / (passes * shape.parameters),
    )  # fmt: skip


def _base(shape: Shape, linear: float) -> float:
    """Return the bytes of a model that is trained: all weights, or adapters on a frozen base."""
    adapted = _frozen(shape, linear) + WEIGHT * shape.adapter
    return adapted if shape.adapter else WEIGHT * shape.parameters


def _frozen(shape: Shape, linear: float) -> float:
    """Return the bytes of a frozen model, with so many for a weight of its linear layers."""
    return WEIGHT * (shape.parameters - shape.linear) + linear * shape.linear


def _linear_bytes(dtype: FrozenDtype, exact: float) -> float:
    """Return the bytes in which a weight of a frozen linear layer is held."""
    return {"auto": exact, "float32": WEIGHT, "bfloat16": WEIGHT / 2, "nf4": NF4_BYTES}[dtype]


def stored_bytes(base: Path) -> float:
    """Return the bytes of a weight in a model's files."""
    from transformers import AutoConfig

    from rlhf.modeling.headers import DamagedWeights, read_headers
    from rlhf.modeling.weights import StoredDtypes

    try:
        return StoredDtypes.of(read_headers(base)).main.itemsize
    except DamagedWeights:  # of a remote base, whose weights are not fetched
        dtype = AutoConfig.from_pretrained(str(base), trust_remote_code=False).dtype
        return dtype.itemsize if isinstance(dtype, torch.dtype) else WEIGHT


def _is_on_gpu(device_name: str) -> bool:
    """Return whether stages with this `runtime.device` train on a GPU."""
    return torch.cuda.is_available() and device_name in ("auto", "cuda")


def shape_of(base: Path, length: int, lora: LoraConfig | None) -> Shape:
    """Measure a model's shape with fake tensors.

    Raises:
        ValueError: The family's code does not run with them.
    """
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf.modeling.frozen import storable_layers

    config = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
    with _family_errors():
        with FakeTensorMode():
            model: Any = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
            parameters = model.num_parameters()
            linear = sum(layer.weight.numel() for layer in storable_layers(model))
            ids = torch.zeros(1, length, dtype=torch.long)
            stored = _stored_bytes(model.base_model, ids)
            cached = _cached_bytes(model.base_model, ids)
        head = model.get_output_embeddings()
        vocabulary = head.weight.shape[0] if hasattr(head, "weight") else config.vocab_size
    shape = Shape(parameters, linear, 0, vocabulary, stored, cached / length)
    return _adapted(shape, base, lora)


def _adapted(shape: Shape, base: Path, lora: LoraConfig | None) -> Shape:
    """Return a shape with the parameters that an adapter adds; without LoRA as it is.

    Raises:
        ValueError: The family's code does not run on the meta device.
    """
    if lora is None:
        return shape
    from transformers import AutoConfig, AutoModelForCausalLM

    from rlhf.modeling.lora import with_adapter

    config = AutoConfig.from_pretrained(str(base), trust_remote_code=False)
    with _family_errors(), torch.device("meta"):  # peft can't add an adapter to fake tensors
        model = AutoModelForCausalLM.from_config(config)
        adapted = with_adapter(model, lora, "ppo", quiet=True)
        added = sum(p.numel() for p in adapted.parameters()) - shape.parameters
    return replace(shape, adapter=added)


@contextmanager
def _family_errors() -> Iterator[None]:
    """Turn whatever a family's code raises into a ValueError of one line; hide its warnings."""
    level = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {str(error).partition(chr(10))[0]}") from error
    finally:
        transformers_logging.set_verbosity(level)


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
        backbone.train()(input_ids=ids, use_cache=False)
    return float(sum(size for size, _ in storages.values()))


@torch.no_grad()
def _cached_bytes(backbone: Any, ids: Tensor) -> float:
    """Return the bytes of a sequence's cache."""
    output = backbone.eval()(input_ids=ids, use_cache=True)
    cache = getattr(output, "past_key_values", None) or getattr(output, "cache_params", None)
    tensors = {id(t): t for layer in getattr(cache, "layers", ()) for t in vars(layer).values()}
    return float(sum(t.nbytes for t in tensors.values() if isinstance(t, Tensor)))


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
    """Return the memory of the device that a new process can take."""
    if _is_on_gpu(device_name):
        return float(torch.cuda.mem_get_info()[0])
    return min(float(psutil.virtual_memory().available), _left_of_container())


def _left_of_container() -> float:
    """Return what this process's container or job may still take; infinite without a limit."""
    try:
        limit, used = ((CGROUP / name).read_text() for name in ("memory.max", "memory.current"))
        return float(int(limit) - int(used))
    except (OSError, ValueError):  # no control group, or "max"
        return float("inf")
