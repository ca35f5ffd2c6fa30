"""TRL trainers: arguments, several processes, progress."""

from __future__ import annotations

import copy
import logging
import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from transformers import PreTrainedConfig, TrainerCallback
from transformers.utils import logging as transformers_logging

from rlhf.config.training import TrainingSection
from rlhf.errors import TrainingError
from rlhf.ranks import rank_and_count
from rlhf.stage import Progress

#: FSDP: weights, gradients and optimiser state of every block are sharded; a block's weights are
#: gathered only while it computes.
_SHARDED: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
}

#: Trainings of fewer optimiser steps log each of them: else their curve has a point or two.
FEW_STEPS = 50
#: transformers' own name for a constant rate leaves the warm-up out.
_SCHEDULERS = {"constant": "constant_with_warmup"}


def training_arguments(
    section: TrainingSection, rows: int, scratch: Path, seed: int, use_cpu: bool
) -> dict[str, Any]:
    """Translate a training section to arguments of TRL's configurations.

    Args:
        section: Hyper-parameters of SFT or of reward-model training.
        rows: Number of training rows, for the length of the warm-up.
        scratch: Temporary folder for the trainer's files.
        seed: Seed of shuffling.
        use_cpu: Train on the CPU even if an accelerator is available.
    """
    share = section.batch_size // rank_and_count()[1]
    micro = min(section.micro_batch_size or share, share)
    steps = max(1, int(rows * section.epochs / section.batch_size))
    return {
        "output_dir": str(scratch),
        "num_train_epochs": section.epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": _SCHEDULERS.get(section.lr_scheduler, section.lr_scheduler),
        "warmup_steps": int(section.warmup_ratio * steps),
        "adam_beta1": 0.9,
        "adam_beta2": section.adam_beta2,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "max_length": None,  # rows are rendered and cut already
        "seed": seed,
        "data_seed": seed,
        "use_cpu": use_cpu,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 1 if steps < FEW_STEPS else 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        # The leader alone computes the loss on held-out rows, and the others wait for it.
        "ddp_timeout": 7 * 24 * 3600,
        **(_SHARDED if section.sharding == "fsdp" and section.processes else {}),
    }


class MultiProcessMixin:
    """Mixin for a trainer: the same results in several processes as in one."""

    args: Any
    accelerator: Any
    is_fsdp_enabled: bool

    def _get_train_sampler(self, *args: Any, **options: Any) -> Any:
        """Return a sampler that makes the same batches as in a single process.

        The default groups rows by one process's share of a batch, which gives other batches.
        """
        sampler = super()._get_train_sampler(*args, **options)  # pyright: ignore
        sampler.batch_size *= rank_and_count()[1]
        return sampler

    def create_accelerator_and_postprocess(self) -> None:
        """Enable FSDP on CPUs too; accelerate 1.15 silently keeps full copies there."""
        super().create_accelerator_and_postprocess()  # pyright: ignore
        state = self.accelerator.state
        if self.args.fsdp_plugin_args and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True


class ProgressCallback(TrainerCallback):
    """Forwards a trainer's steps to `progress`, and collects the curve of its logs."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.curve: list[dict[str, float]] = []
        self.terminated: Callable[[], bool] = lambda: False
        """Whether SIGTERM arrived. Then progress is not told: the listener may block, and the save
        must not wait for it."""

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Report a finished optimiser step."""
        self._tell(state, {})
        # Otherwise the last steps would neither be in the curve nor be seen to diverge.
        control.should_log |= state.global_step >= state.max_steps

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Add a row to the curve, and report its metrics with the same step again.

        Raises:
            TrainingError: A metric is not finite.
        """
        # The summary at the end has no loss; it holds durations, which differ between equal runs.
        if logs and "loss" in logs:
            numbers = {k: v for k, v in logs.items() if isinstance(v, float)}
            check_finite(numbers, state.global_step)
            self.curve.append({**numbers, "step": float(state.global_step)})
            self._tell(state, numbers)

    def _tell(self, state: Any, metrics: dict[str, float]) -> None:
        if state.is_world_process_zero and not self.terminated():
            self.progress(state.global_step, state.max_steps, metrics)


def check_finite(numbers: Mapping[str, float], step: int) -> None:
    """Check metrics of a training.

    Raises:
        TrainingError: One is not finite.
    """
    if not all(math.isfinite(v) for v in numbers.values()):
        raise TrainingError(
            f"training diverged by step {step} ({dict(numbers)}); lower this stage's "
            "learning_rate or max_grad_norm"
        )


def gather_weights(model: Any) -> Any:
    """Replace sharded weights by full ones, in place, and return the model."""
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if isinstance(parameter, DTensor):
                full = torch.nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
                setattr(module, name, full)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


@contextmanager
def unchanged_config(model: Any) -> Iterator[None]:
    """Restore a model's configurations on exit.

    Trainers write to them: TRL switches `output_router_logits` on and adds end tokens, transformers
    writes `use_cache`. None of it belongs to the model that is published.
    """
    before = _state_of(model.config)
    generation = copy.deepcopy(getattr(model, "generation_config", None))
    try:
        yield
    finally:
        _restore(model.config, before)
        if generation is not None:
            model.generation_config = generation


def _state_of(config: PreTrainedConfig) -> dict[str, Any]:
    return {
        key: _state_of(value) if isinstance(value, PreTrainedConfig) else copy.deepcopy(value)
        for key, value in vars(config).items()
    }


def _restore(config: PreTrainedConfig, state: dict[str, Any]) -> None:
    """Restore in place: the model's parts share the configuration and those within it."""
    for key in vars(config).keys() - state.keys():
        del vars(config)[key]
    for key, value in state.items():
        own = vars(config).get(key)
        if isinstance(own, PreTrainedConfig) and isinstance(value, dict):
            _restore(own, value)
        else:
            vars(config)[key] = value


@contextmanager
def quiet_trainer() -> Iterator[None]:
    """Suppress the console output of TRL and transformers during training."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    logger = logging.getLogger("trl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # transformers warns of TRL's default for gradient_checkpointing.
            warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        logger.setLevel(level)
