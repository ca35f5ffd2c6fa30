"""What SFT and reward-model training hand to TRL's trainers alike."""

from __future__ import annotations

import logging
import math
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import DistributedType, FullyShardedDataParallelPlugin
from torch.distributed.tensor import DTensor
from transformers import TrainerCallback
from transformers.utils import logging as transformers_logging

from rlhf.config.models import TrainingSection
from rlhf.errors import TrainingError
from rlhf.progress import Progress
from rlhf.ranks import world


def training_arguments(
    section: TrainingSection, rows: int, scratch: Path, seed: int, use_cpu: bool
) -> dict[str, Any]:
    """Our section as keyword arguments of `SFTConfig` and `RewardConfig`.

    Args:
        section: Hyper-parameters.
        rows: Number of training rows, for the length of the warm-up.
        scratch: Folder for whatever the trainer writes; nothing in it is kept.
        seed: Seed of shuffling.
        use_cpu: Train on the CPU even if there is an accelerator.
    """
    share = section.batch_size // world()[1]
    micro = min(section.micro_batch_size or share, share)
    steps = max(1, int(rows * section.epochs / section.batch_size))
    return {
        "output_dir": str(scratch),
        "num_train_epochs": section.epochs,
        "per_device_train_batch_size": micro,
        "gradient_accumulation_steps": share // micro,
        "learning_rate": section.learning_rate,
        "lr_scheduler_type": section.lr_scheduler,
        "warmup_steps": int(section.warmup_ratio * steps),
        "adam_beta1": 0.9,
        "adam_beta2": section.adam_beta2,
        "weight_decay": section.weight_decay,
        "max_grad_norm": section.max_grad_norm,
        "max_length": None,  # rows are rendered and cut before they get here
        "seed": seed,
        "data_seed": seed,
        "use_cpu": use_cpu,
        "bf16": False,
        "gradient_checkpointing": False,
        "dataloader_pin_memory": False,
        "train_sampling_strategy": "group_by_length",
        "logging_steps": 5,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **(_SHARDED if section.sharding == "fsdp" and section.processes else {}),
    }


#: Every block's weights, gradients and optimiser state are dealt out; a block's weights are whole
#: only while it computes.
_SHARDED: dict[str, Any] = {
    "fsdp": True,
    "fsdp_config": {"version": 2, "auto_wrap_policy": "TRANSFORMER_BASED_WRAP"},
}


class Together:
    """What a trainer needs to do in several processes what it does in one."""

    args: Any
    accelerator: Any
    is_fsdp_enabled: bool

    def _get_train_sampler(self, *args: Any, **options: Any) -> Any:
        """The sampler of rows grouped by length, dealing as one process would deal them.

        By itself it groups one process's share of a batch, and so takes other rows together.
        """
        sampler = super()._get_train_sampler(*args, **options)  # pyright: ignore
        sampler.batch_size *= world()[1]
        return sampler

    def create_accelerator_and_postprocess(self) -> None:
        """Shard on CPUs as on accelerators; accelerate 1.15 would keep whole copies, silently."""
        super().create_accelerator_and_postprocess()  # pyright: ignore
        state = self.accelerator.state
        if self.args.fsdp_plugin_args and state.distributed_type == DistributedType.MULTI_CPU:
            state.distributed_type = DistributedType.FSDP
            state.fsdp_plugin = FullyShardedDataParallelPlugin(**self.args.fsdp_plugin_args)
            self.is_fsdp_enabled = True


def unsharded(model: Any) -> Any:
    """The model with whole weights, where each process had a part of them."""
    for module in model.modules():
        for name, parameter in [*module.named_parameters(recurse=False)]:
            if isinstance(parameter, DTensor):
                whole = torch.nn.Parameter(parameter.full_tensor(), parameter.requires_grad)
                setattr(module, name, whole)
    if hasattr(model, "tie_weights"):
        model.tie_weights()
    return model


class ProgressCallback(TrainerCallback):
    """Forwards a trainer's steps to our progress and keeps the curve of its logs."""

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.curve: list[dict[str, float]] = []

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Tell the progress of a finished optimiser step."""
        if state.is_world_process_zero:
            self.progress(state.global_step, state.max_steps, {})

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **_: Any) -> None:
        """Keep a row of the curve, and tell it with the step it is of, which has ended before."""
        # The summary at the end holds durations, which would make equal runs differ.
        if logs and "loss" in logs:
            numbers = {k: v for k, v in logs.items() if isinstance(v, float)}
            if not all(math.isfinite(v) for v in numbers.values()):
                raise TrainingError(
                    f"training diverged by step {state.global_step} ({numbers}); lower this "
                    "stage's learning_rate or max_grad_norm"
                )
            self.curve.append({**numbers, "step": float(state.global_step)})
            if state.is_world_process_zero:
                self.progress(state.global_step, state.max_steps, numbers)


@contextmanager
def quiet_trainer() -> Iterator[None]:
    """Silence the trainers' own console output: progress is ours to show."""
    verbosity = transformers_logging.get_verbosity()
    transformers_logging.set_verbosity_error()
    logger = logging.getLogger("trl")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            # TRL's own default for gradient_checkpointing is what transformers warns of.
            warnings.filterwarnings("ignore", ".*is deprecated", FutureWarning)
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        logger.setLevel(level)
