"""TRL 1.12's side of `benchmarks.ppo`: its PPOTrainer, unmodified.

TRL runs its own loop; a callback at the end of each update hands over, so that the other side can
run the same update while TRL waits. Its files are not edited: two module-level functions
(`batch_generation`, `forward`) are wrapped with time stamps, and the results of an update are read
from the local variables of `train`.
"""

from __future__ import annotations

import importlib
import os
import sys
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer, TrainerCallback
from transformers.trainer_callback import PrinterCallback

from benchmarks.ppo.process import Clock, Update
from benchmarks.ppo.workload import LORA, Workload, load_biased_policy
from rlhf.errors import ConfigError

VERSION = "1.12.0"


def import_trl(path: str) -> Any:
    """Import TRL's module with its PPO trainer from a folder of its own.

    Raises:
        ConfigError: There is no TRL 1.12.0 there.
    """
    os.environ["TRL_EXPERIMENTAL_SILENCE"] = "1"
    sys.path.insert(0, path)
    import trl

    if trl.__version__ != VERSION:
        raise ConfigError(
            f"--trl {path}: the trl found is {trl.__version__}, not {VERSION}; run "
            f"pip install --no-deps --target {path} trl=={VERSION}"
        )
    return importlib.import_module("trl.experimental.ppo.ppo_trainer")


class TRLSide(TrainerCallback):
    """TRL's trainer on the workload."""

    def __init__(self, work: Workload, folder: Path, path: str) -> None:
        self.module = import_trl(path)
        self.work, self.update, self.optimising = work, 0, False
        self.clock = Clock(torch.device(work.device))
        self.tokenizer = AutoTokenizer.from_pretrained(str(folder / "policy"))
        classifier = AutoModelForSequenceClassification
        lora = self._lora() if work.lora else None
        torch.manual_seed(work.seed)  # for the adapters
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            self.trainer: Any = self.module.PPOTrainer(
                args=self._arguments(),
                processing_class=self.tokenizer,
                model=load_biased_policy(folder),
                ref_model=None if lora else load_biased_policy(folder),
                reward_model=classifier.from_pretrained(folder / "reward", dtype=torch.float32),
                value_model=classifier.from_pretrained(folder / "reward", dtype=torch.float32),
                train_dataset=Dataset.from_dict({"input_ids": work.prompts()}),
                callbacks=[self],
                peft_config=lora,
            )
        self.trainer.remove_callback(PrinterCallback)
        self._watch()

    def _lora(self) -> Any:
        import peft

        return peft.LoraConfig(
            r=LORA.r, lora_alpha=int(LORA.alpha), lora_dropout=0.0,
            target_modules=str(LORA.target_modules), task_type="CAUSAL_LM",
        )  # fmt: skip

    def _arguments(self) -> Any:
        work, size = self.work, self.work.size
        scratch = tempfile.mkdtemp(prefix="trl-ppo-")
        return self.module.PPOConfig(
            output_dir=scratch, seed=work.seed, use_cpu=work.device == "cpu", bf16=False,
            gradient_checkpointing=False, report_to="none", save_strategy="no",
            eval_strategy="no", disable_tqdm=True, num_sample_generations=0,
            # One optimiser step per PPO epoch on the whole batch: TRL's other divisions of a
            # batch give another number of steps than configured.
            per_device_train_batch_size=size.batch, gradient_accumulation_steps=1,
            num_mini_batches=1, local_rollout_forward_batch_size=max(64, size.batch),
            total_episodes=work.updates * size.batch, num_ppo_epochs=size.epochs,
            learning_rate=work.learning_rate, lr_scheduler_type="constant",
            response_length=size.new_tokens, temperature=1.0,
            stop_token="eos" if work.lengths == "varying" else None,
            missing_eos_penalty=work.missing_eos_penalty, kl_coef=work.kl_coef, gamma=work.gamma,
            lam=work.gae_lambda, cliprange=work.clip_range, cliprange_value=work.value_clip_range,
            vf_coef=work.value_loss_coef, whiten_rewards=False,
        )  # fmt: skip

    def _watch(self) -> None:
        generate, forward = self.module.batch_generation, self.module.forward

        def batch_generation(*arguments: Any, **keywords: Any) -> Any:
            torch.manual_seed(self.work.sampling_seed(self.update))
            result = generate(*arguments, **keywords)
            self.clock.mark("rollout")
            return result

        def first_forward(*arguments: Any, **keywords: Any) -> Any:
            if torch.is_grad_enabled() and not self.optimising:
                self.optimising = True
                self.clock.mark("scoring")
            return forward(*arguments, **keywords)

        self.module.batch_generation, self.module.forward = batch_generation, first_forward

    def run(self, after_update: Callable[[int, Update], None] | None) -> None:
        """Train; call `after_update(number, update)`, if given, while TRL waits."""
        self.after_update = after_update
        self.clock.start()
        self.trainer.train()

    def on_step_end(self, args: Any, state: Any, control: Any, **_: Any) -> None:
        """Read the update's results and pass them to `after_update`."""
        self.clock.mark("optimisation")
        if self.after_update:
            self.after_update(self.update, self._result())
        self.update += 1
        self.optimising = False
        self.clock.start()

    def _result(self) -> Update:
        frame: FrameType | None = sys._getframe()
        while frame is not None and frame.f_code.co_name != "train":
            frame = frame.f_back
        assert frame is not None
        local = frame.f_locals
        mask = ~local["padding_mask"].cpu()
        queries = [[t for t in row if t != 0] for row in local["queries"].tolist()]
        lengths = mask.sum(1).tolist()
        replies = [r[:n] for r, n in zip(local["responses"].tolist(), lengths, strict=True)]
        names = {
            "log_probs": "logprobs",
            "reference_log_probs": "ref_logprobs",
            "values": "values",
            "advantages": "advantages",
        }
        tensors = {ours: local[theirs].clone().cpu() for ours, theirs in names.items()}
        if sys.version_info < (3, 13):
            # A copy, which would hold TRL's tensors through its next update.
            local.clear()
        return Update(
            self.clock.wall, self.clock.cpu, queries, replies, mask, tensors, self._weights
        )

    def _weights(self) -> dict[str, Tensor]:
        """Return the trained weights, under the names of our side."""
        model = self.trainer.accelerator.unwrap_model(self.trainer.model)
        policy = {f"policy.{n}": p for n, p in _trained(model.policy)}
        critic = {f"critic.{n}": p for n, p in _trained(model.value_model)}
        return policy | critic


def _trained(model: Any) -> list[tuple[str, Tensor]]:
    return [(n, p.detach()) for n, p in model.named_parameters() if p.requires_grad]
