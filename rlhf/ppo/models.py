"""Policy, reference and critic of a PPO run, and their forward passes."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import peft
import torch
from accelerate import Accelerator
from accelerate.utils import InitProcessGroupKwargs
from jaxtyping import Float
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from rlhf.config import PPOConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.rendering import Renderer, load_renderer
from rlhf.data.rows import PromptRow
from rlhf.environments import Environment, build_environment, check_rendering
from rlhf.errors import ConfigError
from rlhf.gates import Approved
from rlhf.modeling.base import context_length, load_policy
from rlhf.modeling.classifier import input_limit, is_causal
from rlhf.modeling.critic import AdapterCritic, Critic, HeadCritic, critic_from, freeze
from rlhf.modeling.decoders import frozen_copy
from rlhf.modeling.frozen import store_frozen
from rlhf.modeling.generate import Replies, Stop, concatenate, generate
from rlhf.modeling.kept_sets import exclude
from rlhf.modeling.logprobs import (
    log_probs_and_entropy,
    log_probs_entropy_values,
    reply_logits,
    reply_values,
)
from rlhf.modeling.lora import (
    CRITIC,
    REWARD,
    active_adapter,
    copy_adapter,
    fit_targets,
    lora_config,
    target_module_errors,
    with_adapter,
)
from rlhf.modeling.precision import autocast, store_in_bfloat16
from rlhf.modeling.reward import Scorer, SharedScorer, load_reward_model, reference_scale
from rlhf.modeling.sampling import Sampling
from rlhf.modeling.structure import hidden_width
from rlhf.ppo.losses import exact_kl, kept_mass
from rlhf.ranks import Ranks

LogProbs = Float[Tensor, "batch reply"]
Values = Float[Tensor, "batch states"]


class Models:
    """Policy, reference and critic with their optimizers, on the device.

    `reference` is None if the policy has LoRA adapters: then the policy with its adapters off is
    the reference. With `critic: head` the critic is a value head on the policy's hidden states.
    All adapters must be attached before: frozen layers may be stored in bfloat16 here.
    """

    def __init__(
        self, config: PPOConfig, policy: Any, reference: Any, critic: Critic,
        accelerator: Accelerator, ranks: Ranks | None = None,
    ) -> None:  # fmt: skip
        self.config, self.accelerator, self.device = config, accelerator, accelerator.device
        self.scorer: Scorer | None = None
        """The reward model that scores replies, if there is one."""
        self.reward_scale: tuple[float, float] | None = None
        """Mean and deviation of its scores of reference replies, if rewards are so normalised."""
        self.ranks = ranks or Ranks()
        for model in (policy, critic):
            model.eval()  # no dropout: the old and the new policy must be the same function
        if config.precision == "bf16":
            for model in filter(None, (policy, reference)):
                store_in_bfloat16(model)
        self.parameters = {
            "policy": {
                name: parameter
                for name, parameter in policy.named_parameters()
                if parameter.requires_grad and f".{CRITIC}." not in name
            },
            "critic": critic.trainable(),
        }
        # evaluation_mode avoids a DDP wrapper: `ranks` sums the gradients.
        self.policy: Any = accelerator.prepare_model(policy, evaluation_mode=True)
        self.critic: Any = accelerator.prepare_model(critic, evaluation_mode=True)
        self.reference = None if reference is None else reference.to(self.device)
        self.optimizers = self._build_optimizers()

    @property
    def joint(self) -> bool:
        """True if policy and critic are one network, trained by one loss."""
        return self.config.critic == "head"

    def _build_optimizers(self) -> dict[str, Any]:
        """Make one optimizer each for policy and critic, or one for both if `joint`."""
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
        """Set the learning rates for an update and return them as metrics."""
        config = self.config
        own = learning_rate_scale(config, update, config.critic_warmup_updates)
        critic = learning_rate_scale(config, update)
        rates = {
            "learning_rate": config.learning_rate * own,
            "critic_learning_rate": (config.critic_learning_rate or config.learning_rate) * critic,
        }
        groups = [group for o in self.optimizers.values() for group in o.param_groups]
        for group, rate in zip(groups, rates.values(), strict=True):
            group["lr"] = rate
        return rates

    def checksum(self) -> float:
        """Sum of all trained weights; equal weights have bit-equal sums."""
        trained = [p for name in self.parameters for p in self.parameters[name].values()]
        return float(sum(p.detach().double().sum() for p in trained))

    def sample(
        self,
        prompts: list[list[int]],
        tokenizer: Any,
        sampling: Sampling,
        seed: int,
        stop: Stop | None,
        *,
        ends: Sequence[int] | None = None,
        reference: bool = False,
    ) -> Replies:
        """Draw replies of the policy, or of the reference; each process draws its share.

        All processes return all replies. For `ends` see `generate`.
        """
        own = self.ranks.share(len(prompts))
        with self._as_reference() if reference else nullcontext(self._policy()) as model:
            replies = generate(
                self.sampling_copy(model), prompts, tokenizer, sampling, seed, stop, own, ends=ends,
                batch_size=self.config.rollout_batch_size,
            )  # fmt: skip
        parts = [part.to(self.device) for part in self.ranks.gather(replies)]
        return concatenate(parts, tokenizer.pad_token_id)

    def sampling_copy(self, model: Any) -> Any:
        """The model for sampling; with bf16 a copy, cast once instead of at every token."""
        if self.config.precision == "fp32":
            return model
        return frozen_copy(model, torch.bfloat16)

    def log_probs(self, replies: Replies, entropy: bool = True) -> tuple[LogProbs, LogProbs]:
        """Compute the policy's log-probabilities of the reply tokens, and their entropies."""
        with self._autocast():
            return log_probs_and_entropy(self.policy, replies, self.config.temperature, entropy)

    def reference_log_probs(self, replies: Replies) -> LogProbs:
        """Compute the frozen reference's log-probabilities of the reply tokens."""
        with self._as_reference() as reference, self._autocast():
            return log_probs_and_entropy(reference, replies, self.config.temperature, False)[0]

    def audit(self, replies: Replies) -> dict[str, Float[Tensor, " tokens"]]:
        """Compute the exact KL(π‖π_ref) at each valid reply token (`kl_exact`).

        With kept sets it is over these, and `kept_mass` and `kept_mass_reference` are the
        probabilities that policy and reference give them.
        """
        temperature, kept = self.config.temperature, replies.kept
        with self._autocast():
            logits = reply_logits(self.policy, replies, temperature)
        with self._as_reference() as reference, self._autocast():
            reference_logits = reply_logits(reference, replies, temperature)
        if kept is None:
            return {"kl_exact": exact_kl(logits, reference_logits)}
        excluded = kept.excluded(0, len(logits))
        masses = {
            "kept_mass": kept_mass(logits, excluded),
            "kept_mass_reference": kept_mass(reference_logits, excluded),
        }
        kl = exact_kl(exclude(logits, excluded), exclude(reference_logits, excluded))
        return {"kl_exact": kl, **masses}

    def values(self, replies: Replies) -> Values:
        """Compute the critic's value of every state of the replies."""
        if self.joint:
            return self.log_probs_and_values(replies, False)[2]
        with self.critic.active(), self._autocast():
            return reply_values(self.critic, replies)

    def log_probs_and_values(
        self, replies: Replies, entropy: bool
    ) -> tuple[LogProbs, LogProbs, Values]:
        """Compute log-probabilities, entropies and values in one pass; only if `joint`."""
        with self._autocast():
            return log_probs_entropy_values(
                self.policy, self.critic.value_head, replies, self.config.temperature, entropy
            )

    @contextmanager
    def recomputing(self) -> Iterator[None]:
        """Recompute activations in backward passes, if `gradient_checkpointing` is on.

        transformers implements this for training mode only, where some blocks apply dropout.
        """
        networks = self._trained_networks() if self.config.gradient_checkpointing else []
        blocks = [
            block
            for network in networks
            for block in network.modules()
            if isinstance(block, GradientCheckpointingLayer)
        ]
        if self.config.gradient_checkpointing and not blocks:
            raise ConfigError(
                f"ppo.gradient_checkpointing = true: {type(networks[0]).__name__} has no layers "
                "that transformers can recompute; set it to false"
            )
        for block in blocks:
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
        try:
            yield
        finally:
            for block in blocks:
                del block.forward

    def _trained_networks(self) -> list[Any]:
        """The transformers in training, each once even if policy and critic share it."""
        policy = self._policy()
        if isinstance(policy, peft.PeftModel):
            policy = policy.get_base_model()
        critic = self.accelerator.unwrap_model(self.critic)
        separate = not self.joint and not isinstance(critic, AdapterCritic)
        return [policy, critic.backbone] if separate else [policy]

    @contextmanager
    def _as_reference(self) -> Iterator[Any]:
        """The reference model; without one of its own, the policy with its adapters off."""
        if self.reference is not None:
            yield self.reference
            return
        policy = self._policy()
        with active_adapter(policy, None):
            yield policy

    def _policy(self) -> Any:
        return self.accelerator.unwrap_model(self.policy)

    def _autocast(self) -> AbstractContextManager[Any]:
        return autocast(self.device, self.config.precision)


def load_models(
    config: PPOConfig,
    sft: Path,
    reward_model: Approved[Path] | None,
    seed: int,
    device: torch.device,
    rows: Sequence[PromptRow] = (),
    limits: TokenLimits | None = None,
) -> tuple[Models, Environment, Renderer]:
    """Load the models, environment and renderer of a PPO run.

    The environment, which scores replies, is built here because it shares the loaded reward model
    with the critic and the policy.

    Args:
        config: Determines the models and what they share.
        sft: Folder of the starting policy.
        reward_model: Folder of the approved reward model; None for an environment without one.
        seed: Seed of torch's global generator, which initialises adapters.
        device: Device of the models.
        rows: Training prompts, which the environment checks.
        limits: Most tokens that the reward model reads; None is the policy's context.

    Raises:
        ConfigError: A reward model is required and missing, or does not fit the policy or, with
            `shared_base`, its weights; or the environment does not work.
    """
    scale = None
    if config.reward_normalization == "reference" and reward_model is not None:
        scale = reference_scale(reward_model.subject)
    torch.manual_seed(seed)
    # Effectively no timeout: a dead process is detected by its closed connections.
    timeout = InitProcessGroupKwargs(timeout=timedelta(days=7))
    accelerator = Accelerator(cpu=device.type == "cpu", kwargs_handlers=[timeout])
    ranks = Ranks(accelerator.process_index, accelerator.num_processes, accelerator.device)
    renderer = load_renderer(sft)
    policy, reference = _load_policy_and_reference(config, sft, device)
    context = context_length(policy)
    scorer, scored = None, ppo_limits(config, context, limits)
    if reward_model is not None:
        folder = reward_model.subject
        if config.shared_base:
            scorer = SharedScorer(policy, sft, folder, device, scored, config.precision)
        else:
            dtype = config.scorer_dtype
            scorer = Scorer(folder, device, scored, precision=config.precision, frozen_dtype=dtype)
        check_rendering(renderer, folder, scorer)
    environment = build_environment(
        config, scorer, renderer, rows, device=device, context=context, ranks=ranks,
    )  # fmt: skip
    longest = min(max(scored.prompt, 0) + config.max_new_tokens, context)
    critic = _load_critic(config, sft, policy, renderer, scorer, reward_model, longest)
    models = Models(config, policy, reference, critic, accelerator, ranks)
    models.scorer, models.reward_scale = scorer, scale
    return models, environment, renderer


def ppo_limits(config: PPOConfig, context: int, limits: TokenLimits | None) -> TokenLimits:
    """Return the limits within the policy's context; None lets prompt and reply fill it."""
    if limits is None:
        length = max(context, 2)
        return TokenLimits(max_length=length, max_new_tokens=config.max_new_tokens)
    return limits.within(context)


def learning_rate_scale(config: PPOConfig, update: int, start: int = 0) -> float:
    """Fraction of the peak learning rate: linear warm-up, then `lr_scheduler`'s decay.

    Args:
        config: Length of the warm-up, and the decay.
        update: Number of the update, from 0.
        start: First update of the warm-up.
    """
    begin = start + config.lr_warmup_updates
    if update < begin:
        return (max(0, update - start) + 1) / (config.lr_warmup_updates + 1)
    final = config.lr_final_fraction
    done = (update - begin) / max(1, config.updates - begin)
    if config.lr_scheduler == "constant":
        return 1.0
    if config.lr_scheduler == "cosine":
        return final + (1 - final) * (1 + math.cos(math.pi * done)) / 2
    return 1 - (1 - final) * done


def _load_policy_and_reference(
    config: PPOConfig, sft: Path, device: torch.device
) -> tuple[Any, Any]:
    """Load the policy, and a reference unless the policy with its adapters off is one."""
    policy = load_policy(sft)
    frozen = policy if config.lora else freeze(load_policy(sft))
    # With bf16 `Models` stores what is not in 4 bits, once all adapters are there.
    if config.precision == "fp32" or config.frozen_dtype == "nf4":
        store_frozen(frozen, config.frozen_dtype, device, "ppo")
    if not config.lora:
        return policy, frozen
    return with_adapter(policy, config.lora, "ppo"), None


def _load_critic(
    config: PPOConfig, sft: Path, policy: Any, renderer: Renderer, scorer: Scorer | None,
    reward_model: Approved[Path] | None, longest: int,
) -> Critic:  # fmt: skip
    """Load the critic that `config.critic` names, for sequences of up to `longest` tokens."""
    if config.critic == "policy":
        return critic_from(load_policy(sft))
    if config.critic == "head":
        return HeadCritic(hidden_width(policy))
    if config.critic == "adapter":
        assert config.lora is not None
        lora = fit_targets(config.lora, policy, "ppo")
        with target_module_errors("ppo", lora):
            policy.add_adapter(CRITIC, lora_config(lora, "CAUSAL_LM", dropout=0.0))
        return AdapterCritic(policy)
    if scorer is None or reward_model is None:
        raise ConfigError(
            "ppo.critic = 'reward_model', but there is none; set ppo.critic to "
            + ("adapter" if config.shared_base else "policy")
        )
    _check_critic(scorer, reward_model.subject, renderer, longest)
    if config.shared_base:
        copy_adapter(policy, REWARD, CRITIC)
        return AdapterCritic(policy)
    critic = load_reward_model(reward_model.subject, scorer.renderer)
    rows, needed = (m.get_input_embeddings().num_embeddings for m in (critic, policy))
    if rows < needed:  # the policy may sample any of its ids, also those of a padded vocabulary
        raise ConfigError(
            f"ppo.critic = 'reward_model', but {str(reward_model.subject)!r} has {rows:,} "
            f"embeddings and the policy {needed:,}; set ppo.critic to policy"
        )
    return critic_from(critic)


def _check_critic(scorer: Scorer, folder: Path, renderer: Renderer, longest: int) -> None:
    """Refuse a reward model whose backbone can't give the values of a reply's prefixes.

    Raises:
        ConfigError: It reads other tokens than the policy, fewer, or later ones.
    """
    reason = None
    if not is_causal(scorer.model):
        reason = "reads both ways: the value of a prefix would see the rest of the reply"
    elif scorer.renderer.template_hash != renderer.template_hash:
        reason = "has another tokenizer than the policy"
    elif (context := input_limit(scorer.model)) < longest:
        reason = (
            f"reads at most {context:,} tokens, and a prompt with its reply has up to {longest:,}"
        )
    if reason:
        raise ConfigError(
            f"ppo.critic = 'reward_model', but {str(folder)!r} {reason}; set ppo.critic to policy"
        )
