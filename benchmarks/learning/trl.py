"""TRL's side of `benchmarks.learning`: its PPOTrainer with our settings.

What has no counterpart: TRL clips no gradients, puts the score one past the end token, and takes a
padding token that was sampled for the end. Its critic starts, as ours does, from the reward model's
backbone with a zeroed head.
"""

from __future__ import annotations

import tempfile
import warnings
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from benchmarks.learning.runs import Run
from benchmarks.ppo.trl import import_trl
from rlhf.errors import ConfigError, TrainingError
from rlhf.modeling.base import load_policy
from rlhf.modeling.reward import counted_tokens


def train_by_trl(run: Run, path: str) -> None:
    """Train by TRL's trainer on the same prompts and settings.

    Raises:
        ConfigError: Our settings have no counterpart in TRL.
        TrainingError: TRL did other work than ours.
    """
    module, config = import_trl(path), run.config.ppo
    if (
        config.top_k
        or config.top_p != 1
        or config.lora
        or config.chunk_size % config.mini_batch_size
    ):
        raise ConfigError(
            "ppo.top_k, top_p, lora or a mini_batch_size that does not divide chunk_size have no "
            "counterpart in TRL; take them out of the overrides"
        )
    policy, value, optimizer, schedule = _models(run)
    after = _AfterUpdate(run)
    tokenizer = run.renderer.tokenizer
    tokenizer.padding_side = "left"
    rows = [run.renderer.encode_prompt(row.prompt, run.max_prompt) for row in run.prompts]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        trainer: Any = module.PPOTrainer(
            args=_arguments(run, module),
            processing_class=tokenizer,
            model=policy,
            ref_model=load_policy(run.sft),
            reward_model=_reward_model(run),
            value_model=value,
            train_dataset=Dataset.from_dict({"input_ids": rows}),
            callbacks=[after],
            optimizers=(optimizer, schedule),
        )
    trainer.remove_callback(PrinterCallback)
    after.watch(trainer)
    trainer.train()


def _models(run: Run) -> tuple[Any, Any, Any, Any]:
    """Return policy, critic, optimiser and schedule.

    The schedule is ours: linear, down to a share of the peak.
    """
    config = run.config.ppo
    policy = load_policy(run.sft)
    value = AutoModelForSequenceClassification.from_pretrained(
        run.reward_model, dtype=torch.float32
    )
    nn.init.zeros_(value.score.weight)
    optimizer = torch.optim.AdamW(
        [*policy.parameters(), *value.parameters()], lr=config.learning_rate,
        betas=(0.9, config.adam_beta2), weight_decay=config.weight_decay,
    )  # fmt: skip
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda u: 1 - (1 - config.lr_final_fraction) * u / config.updates
    )
    return policy, value, optimizer, schedule


def _reward_model(run: Run) -> Any:
    if run.scorer.model.pooling == "sum":
        return SummedReward(run.scorer.model)
    return run.scorer.model


class SummedReward(nn.Module):
    """Adapter of our reward model to TRL: `score` sums token scores over the reply.

    TRL calls the backbone, then `score` on its hidden states, and takes the last real token's.
    """

    base_model_prefix = "backbone"

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.model = [model]  # in a list, so that it is no second submodule
        self.inner = getattr(model, model.base_model_prefix)
        self.counted: Tensor | None = None

    def backbone(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Any:
        """Return the backbone's output, and store which tokens count."""
        self.counted = counted_tokens(input_ids, attention_mask.long(), self.model[0].marker)
        return self.inner(input_ids=input_ids, attention_mask=attention_mask, **options)

    def score(self, hidden: Tensor) -> Tensor:
        """Return cumulative sums of the token scores, (batch, time, 1)."""
        assert self.counted is not None
        scores = self.model[0].score(hidden).squeeze(-1).float()
        return (scores * self.counted).cumsum(1)[..., None]


def _arguments(run: Run, module: Any) -> Any:
    config = run.config.ppo
    scratch = tempfile.mkdtemp(prefix="trl-ppo-")
    return module.PPOConfig(
        output_dir=scratch, seed=run.seed, use_cpu=run.device.type == "cpu", bf16=False,
        gradient_checkpointing=False, report_to="none", save_strategy="no", eval_strategy="no",
        disable_tqdm=True, num_sample_generations=0,
        # Without accumulation each minibatch is one optimiser step.
        per_device_train_batch_size=config.chunk_size, gradient_accumulation_steps=1,
        num_mini_batches=config.chunk_size // config.mini_batch_size,
        local_rollout_forward_batch_size=config.chunk_size,
        total_episodes=config.updates * config.chunk_size, num_ppo_epochs=config.num_ppo_epochs,
        response_length=config.max_new_tokens, temperature=config.temperature, stop_token="eos",
        missing_eos_penalty=config.missing_eos_penalty, kl_coef=config.kl_coef,
        gamma=config.gamma, lam=config.gae_lambda, cliprange=config.clip_range,
        cliprange_value=config.value_clip_range, vf_coef=config.value_loss_coef,
        whiten_rewards=config.whiten_rewards,
    )  # fmt: skip


class _AfterUpdate(TrainerCallback):
    """Callback that evaluates the policy and checks the count of optimiser steps."""

    def __init__(self, run: Run) -> None:
        self.run, self.updates, self.steps = run, 0, 0
        self.trainer: Any = None

    def watch(self, trainer: Any) -> None:
        """Count the steps of the trainer's optimiser."""
        self.trainer, step = trainer, trainer.optimizer.step

        def counted(*arguments: Any, **options: Any) -> Any:
            self.steps += 1
            return step(*arguments, **options)

        trainer.optimizer.step = counted

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Check the optimiser steps of the update, then evaluate the policy."""
        self.updates += 1
        config = self.run.config.ppo
        expected = config.num_ppo_epochs * -(-config.chunk_size // config.mini_batch_size)
        if self.steps != self.updates * expected:
            raise TrainingError(
                f"TRL took {self.steps} optimiser steps in {self.updates} updates, not {expected} "
                "each: the comparison would not be fair"
            )
        policy = self.trainer.accelerator.unwrap_model(self.trainer.model).policy
        self.run.after_update(self.updates, policy)
