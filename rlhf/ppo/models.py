"""The models of one PPO run, and the functions that PPO needs of them, whatever they share."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import partial
from typing import Any

import peft
import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.config import PPOConfig
from rlhf.modeling.critic import Critic
from rlhf.modeling.forward import copy_in
from rlhf.modeling.lora import CRITIC, using
from rlhf.modeling.precision import autocast, store_in_bfloat16
from rlhf.modeling.shared import AdapterCritic
from rlhf.ppo.kl import exact_kl
from rlhf.ppo.rollout import (
    Replies,
    Sampling,
    Stop,
    generate,
    joined,
    log_probs_and_entropy,
    log_probs_entropy_values,
    reply_logits,
    reply_values,
)
from rlhf.ranks import Ranks

LogProbs = Float[Tensor, "batch reply"]
Values = Float[Tensor, "batch states"]


class Models:
    """Policy, reference and critic, complete with all their adapters, brought to the device.

    `reference` is None when the policy has LoRA adapters: then it is the policy with them off.
    With `critic: head` the critic is a value head on the policy's own hidden states.
    """

    def __init__(
        self, config: PPOConfig, policy: Any, reference: Any, critic: Critic,
        accelerator: Accelerator, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        self.ranks = ranks or Ranks()
        for model in (policy, critic):
            model.eval()  # no dropout: the old and the new policy must be the same function
        if config.precision == "bf16":
            for model in filter(None, (policy, reference)):
                store_in_bfloat16(model)
        self.parameters = {
            "policy": _of_policy(policy),
            "critic": critic.trainable(),
        }
        # As for evaluation, or they were wrapped for DDP: gradients are added up by `ranks`.
        self.policy: Any = accelerator.prepare_model(policy, evaluation_mode=True)
        self.critic: Any = accelerator.prepare_model(critic, evaluation_mode=True)
        self.reference = None if reference is None else reference.to(self.device)
        self.optimizers = self._optimizers()

    @property
    def joint(self) -> bool:
        """Whether policy and critic are one network, trained by one loss."""
        return self.config.critic == "head"

    def _optimizers(self) -> dict[str, Any]:
        """One for the policy and one for the critic; one for both where they are one network."""
        config = self.config
        groups = {name: {"params": list(p.values())} for name, p in self.parameters.items()}
        parts = [["policy", "critic"]] if self.joint else [["policy"], ["critic"]]
        return {
            part[0]: self.accelerator.prepare(
                torch.optim.AdamW(
                    [groups[name] for name in part], lr=0.0, betas=(0.9, config.adam_beta2),
                    weight_decay=config.weight_decay, fused=True,
                )
            )
            for part in parts
        }  # fmt: skip

    def set_learning_rates(self, update: int) -> dict[str, float]:
        """Set the rates of both for this update; returns what they are."""
        config, scale = self.config, learning_rate_scale(self.config, update)
        rates = {
            "learning_rate": config.learning_rate * scale,
            "critic_learning_rate": (config.critic_learning_rate or config.learning_rate) * scale,
        }
        groups = [group for o in self.optimizers.values() for group in o.param_groups]
        for group, rate in zip(groups, rates.values(), strict=True):
            group["lr"] = rate
        return rates

    def checksum(self) -> float:
        """The sum of all weights that learn: equal weights, equal sums, to the last bit."""
        learning = [p for name in self.parameters for p in self.parameters[name].values()]
        return float(sum(p.detach().double().sum() for p in learning))

    def sample(
        self,
        prompts: list[list[int]],
        tokenizer: Any,
        sampling: Sampling,
        seed: int,
        stop: Stop | None,
    ) -> Replies:
        """The policy's replies."""
        policy = self.sampling_copy(self.accelerator.unwrap_model(self.policy))
        return self._generate(policy, prompts, tokenizer, sampling, seed, stop)

    def sample_reference(
        self,
        prompts: list[list[int]],
        tokenizer: Any,
        sampling: Sampling,
        seed: int,
        stop: Stop | None,
    ) -> Replies:
        """The frozen reference's replies."""
        with self._as_reference() as reference:
            model = self.sampling_copy(reference)
            return self._generate(model, prompts, tokenizer, sampling, seed, stop)

    def _generate(
        self, model: Any, prompts: list[list[int]], tokenizer: Any, sampling: Sampling, seed: int,
        stop: Stop | None,
    ) -> Replies:  # fmt: skip
        """All replies, of which each process draws its own."""
        own = self.ranks.share(len(prompts))
        replies = generate(
            model, prompts, tokenizer, sampling, seed, stop, own,
            batch_size=self.config.rollout_batch_size,
        )  # fmt: skip
        parts = [part.to(self.device) for part in self.ranks.gather(replies)]
        return joined(parts, tokenizer.pad_token_id)

    def sampling_copy(self, model: Any) -> Any:
        """The model that replies are drawn from: in bf16 a copy, cast once instead of per token."""
        if self.config.precision == "fp32":
            return model
        return copy_in(model, torch.bfloat16)

    def log_probs(self, replies: Replies, entropy: bool = True) -> tuple[LogProbs, LogProbs]:
        """The policy's log-probabilities of the reply tokens, and their entropies."""
        with self._precision():
            return log_probs_and_entropy(self.policy, replies, self.config.temperature, entropy)

    def reference_log_probs(self, replies: Replies) -> LogProbs:
        """The frozen reference's log-probabilities of the reply tokens."""
        with self._as_reference() as reference, self._precision():
            return log_probs_and_entropy(reference, replies, self.config.temperature, False)[0]

    def exact_kl(self, replies: Replies) -> Float[Tensor, " tokens"]:
        """KL of policy from reference over the whole vocabulary, at each reply token."""
        with self._precision():
            ours = reply_logits(self.policy, replies, self.config.temperature)
        with self._as_reference() as reference, self._precision():
            return exact_kl(ours, reply_logits(reference, replies, self.config.temperature))

    def values(self, replies: Replies) -> Values:
        """The critic's value of every state of the replies."""
        if self.joint:
            return self.log_probs_and_values(replies, False)[2]
        with self.critic.active(), self._precision():
            return reply_values(self.critic, replies)

    def log_probs_and_values(
        self, replies: Replies, entropy: bool
    ) -> tuple[LogProbs, LogProbs, Values]:
        """Log-probabilities, entropies and values by one forward pass of the one network."""
        with self._precision():
            return log_probs_entropy_values(
                self.policy, self.critic.value_head, replies, self.config.temperature, entropy
            )

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """With `gradient_checkpointing`: activations are not kept but computed again.

        transformers does this in training mode only, in which some blocks drop out.
        """
        networks = self._networks() if self.config.gradient_checkpointing else []
        blocks = [
            block
            for network in networks
            for block in network.modules()
            if isinstance(block, GradientCheckpointingLayer)
        ]
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _networks(self) -> list[Any]:
        """The transformers that learn, each once."""
        policy = self.accelerator.unwrap_model(self.policy)
        if isinstance(policy, peft.PeftModel):
            policy = policy.get_base_model()
        critic = self.accelerator.unwrap_model(self.critic)
        own = not self.joint and not isinstance(critic, AdapterCritic)
        return [policy, critic.backbone] if own else [policy]

    @contextmanager
    def _as_reference(self) -> Iterator[Any]:
        if self.reference is not None:
            yield self.reference
            return
        policy = self.accelerator.unwrap_model(self.policy)
        with using(policy, None):
            yield policy

    def _precision(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.config.precision)


def _of_policy(policy: Any) -> dict[str, torch.nn.Parameter]:
    """What training changes of the policy; with adapters, its own adapter only."""
    parameters = policy.named_parameters()
    return {n: p for n, p in parameters if p.requires_grad and f".{CRITIC}." not in n}


def learning_rate_scale(config: PPOConfig, update: int) -> float:
    """Share of the peak learning rate: a linear rise, then the decay that `lr_scheduler` names."""
    if update < config.lr_warmup_updates:
        return (update + 1) / (config.lr_warmup_updates + 1)
    final = config.lr_final_fraction
    done = (update - config.lr_warmup_updates) / max(1, config.updates - config.lr_warmup_updates)
    if config.lr_scheduler == "constant":
        return 1.0
    if config.lr_scheduler == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
    return 1 - (1 - final) * done
