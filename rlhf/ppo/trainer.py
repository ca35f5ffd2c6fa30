"""One PPO update: sample, score, estimate advantages, optimise."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from accelerate import Accelerator
from jaxtyping import Float
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PromptRow
from rlhf.environments import Environment, Reply, Scored
from rlhf.errors import ConfigError, TrainingError
from rlhf.modeling.critic import Critic
from rlhf.ppo.losses import gae, masked_mean, policy_loss, shaped_rewards, value_loss, whiten
from rlhf.ppo.rollout import Replies, Sampling, generate, log_probs_and_entropy, reply_values


def mix(seed: int, number: int) -> int:
    """A seed of its own for each (seed, number), even, so that `+ 1` gives an unrelated one."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:7], "big") * 2


@dataclass(frozen=True)
class Buffer:
    """One chunk of rollouts with all that optimising needs; (batch, reply) unless noted."""

    replies: Replies
    log_probs: Float[Tensor, "batch reply"]
    values: Float[Tensor, "batch reply"]
    advantages: Float[Tensor, "batch reply"]
    returns: Float[Tensor, "batch reply"]


class PPOTrainer:
    """Models and optimiser of one PPO run; `update` is the algorithm."""

    def __init__(
        self, config: PPOConfig, policy: Any, reference: Any, critic: Critic,
        environment: Environment, renderer: Renderer, accelerator: Accelerator, seed: int,
    ) -> None:  # fmt: skip
        self.config, self.environment = config, environment
        self.renderer, self.seed = renderer, seed
        for model in (policy, critic):
            model.eval()  # no dropout: the old and the new policy must be the same function
        parameters = [
            {"params": [p for p in policy.parameters() if p.requires_grad]},
            {"params": [p for p in critic.parameters() if p.requires_grad]},
        ]
        betas = (0.9, config.adam_beta2)
        optimizer = torch.optim.AdamW(parameters, lr=0.0, betas=betas, weight_decay=0.0)
        self.policy, self.critic, self.optimizer = accelerator.prepare(policy, critic, optimizer)
        self.reference = reference
        self.accelerator = accelerator
        context = policy.config.max_position_embeddings
        self.max_prompt = context - config.max_new_tokens
        if self.max_prompt < 1:
            raise ConfigError(
                f"ppo.max_new_tokens = {config.max_new_tokens} leaves no room for a prompt in the "
                f"policy's context of {context} tokens; lower it"
            )

    def update(self, number: int, rows: list[PromptRow]) -> dict[str, float]:
        """One PPO update on one chunk of prompts; returns what to log."""
        rows = [row for row in rows for _ in range(self.environment.replies_per_prompt)]
        fraction = number / self.config.updates
        self._set_learning_rates(1 - (1 - self.config.lr_final_fraction) * fraction)
        replies = self._sample(rows, seed=mix(self.seed, number))
        texts = [self.environment.text(ids) for ids in replies.rows()]
        rivals = self._reference_replies(rows, seed=mix(self.seed, -1 - number))
        scored = self._score(rows, texts, replies, rivals)
        buffer, metrics = self._evaluate(replies, scored)
        metrics |= self._optimise(buffer, seed=mix(self.seed, number) + 1)
        return metrics | scored.metrics()

    def _set_learning_rates(self, scale: float) -> None:
        peaks = (
            self.config.learning_rate,
            self.config.critic_learning_rate or self.config.learning_rate,
        )
        for group, peak in zip(self.optimizer.param_groups, peaks, strict=True):
            group["lr"] = peak * scale

    def _sample(self, rows: list[PromptRow], seed: int, policy: Any = None) -> Replies:
        config = self.config
        prompts = [self.renderer.encode_prompt(row.prompt, self.max_prompt) for row in rows]
        sampling = Sampling(config.max_new_tokens, config.temperature, config.top_k, config.top_p)
        policy = policy or self.accelerator.unwrap_model(self.policy)
        stop = self.environment.stop
        return generate(policy, prompts, self.renderer.tokenizer, sampling, seed, stop)

    def _reference_replies(self, rows: list[PromptRow], seed: int) -> list[str | None]:
        """The reference policy's reply to each prompt, where the environment asks for it."""
        if not self.environment.needs_reference_reply:
            return [None] * len(rows)
        policy = self.accelerator.unwrap_model(self.policy)
        adapters_off = policy.disable_adapter() if self.reference is None else nullcontext()
        with adapters_off:
            replies = self._sample(rows, seed, policy=self.reference or policy)
        return [self.environment.text(ids) for ids in replies.rows()]

    def _score(
        self, rows: list[PromptRow], texts: list[str], replies: Replies, rivals: list[str | None]
    ) -> Scored:
        columns = (rows, texts, replies.mask.sum(1).tolist(), replies.finished.tolist(), rivals)
        per_prompt = self.environment.replies_per_prompt
        batch = [
            Reply(
                row.prompt, text, length, finished, row.reference, row.metadata, i // per_prompt,
                rival,
            )
            for i, (row, text, length, finished, rival) in enumerate(zip(*columns, strict=True))
        ]  # fmt: skip
        return self._less_missing_eos(self.environment(batch), replies)

    def _less_missing_eos(self, scored: Scored, replies: Replies) -> Scored:
        """A reply that does not end pays."""
        unfinished = (~replies.finished).cpu().to(scored.totals)
        part = {"missing_eos": -(self.config.missing_eos_penalty or 0.0) * unfinished}
        return Scored(
            scored.totals + part["missing_eos"],
            scored.components | part,
            scored.weighted | part,
        )

    @torch.no_grad()
    def _evaluate(self, replies: Replies, scored: Scored) -> tuple[Buffer, dict[str, float]]:
        """Log-probs, values and advantages of a chunk, under the policy that sampled it."""
        config, mask = self.config, replies.mask
        shape = mask.shape
        log_probs, reference, values, entropy = (torch.zeros(shape) for _ in range(4))
        for index in torch.arange(shape[0]).split(config.micro_batch_size):
            part = replies.take(index)
            width = part.mask.shape[1]
            log_probs[index, :width], entropy[index, :width] = (
                t.cpu() for t in log_probs_and_entropy(self.policy, part, config.temperature)
            )
            reference[index, :width] = self._reference_log_probs(part).cpu()
            values[index, :width] = reply_values(self.critic, part).cpu()
        mask = mask.cpu()
        scores = scored.totals
        if config.whiten_rewards and len(scores) > 1:  # of one score it is NaN
            scores = scores / (scores.std() + 1e-8)
        rewards = shaped_rewards(scores, log_probs, reference, mask, config.kl_coef)
        values = values * mask
        advantages, returns = gae(rewards, values, mask, config.gamma, config.gae_lambda)
        residual = masked_mean((returns - values) ** 2, mask)
        spread = masked_mean((returns - masked_mean(returns, mask)) ** 2, mask)
        metrics = {
            "reward": float(scored.totals.mean()),
            "kl": float(((log_probs - reference) * mask).sum(1).mean()),
            "entropy": float(masked_mean(entropy, mask)),
            "tokens": float(mask.sum(1).float().mean()),
            "eos_rate": float(replies.finished.float().mean()),
            "explained_variance": float(1 - residual / spread.clamp(min=1e-8)),
        }
        return Buffer(replies, log_probs, values, whiten(advantages, mask), returns), metrics

    def _reference_log_probs(self, replies: Replies) -> Tensor:
        if self.reference is not None:
            return log_probs_and_entropy(self.reference, replies, self.config.temperature)[0]
        with self.accelerator.unwrap_model(self.policy).disable_adapter():
            return log_probs_and_entropy(self.policy, replies, self.config.temperature)[0]

    def _optimise(self, buffer: Buffer, seed: int) -> dict[str, float]:
        config = self.config
        generator = torch.Generator().manual_seed(seed)
        rows = len(buffer.values)
        sums: dict[str, float] = {}
        steps = 0
        for _ in range(config.num_ppo_epochs):
            order = torch.randperm(rows, generator=generator)
            for batch in order.split(config.mini_batch_size):
                for name, value in self._step(buffer, batch).items():
                    sums[name] = sums.get(name, 0.0) + value
                steps += 1
        learning_rate = self.optimizer.param_groups[0]["lr"]
        return {**{k: v / steps for k, v in sums.items()}, "learning_rate": learning_rate}

    def _step(self, buffer: Buffer, batch: Tensor) -> dict[str, float]:
        """One optimiser step; the loss is a mean over all of its tokens, however it is cut."""
        config = self.config
        device = self.accelerator.device
        n_tokens = float(buffer.replies.mask[batch].sum())
        names = ("policy_loss", "value_loss", "clip_fraction", "approx_kl")
        totals: dict[str, float] = dict.fromkeys(names, 0.0)
        for index in batch.split(config.micro_batch_size):
            part = buffer.replies.take(index)
            cut = (index, slice(part.mask.shape[1]))
            old, advantages, old_values, returns = (
                t[cut].to(device)
                for t in (buffer.log_probs, buffer.advantages, buffer.values, buffer.returns)
            )
            log_probs, _ = log_probs_and_entropy(self.policy, part, config.temperature)
            loss_p, parts = policy_loss(
                log_probs, old, advantages, part.mask, config.clip_range, n_tokens
            )
            values = reply_values(self.critic, part)
            loss_v = value_loss(
                values, old_values, returns, part.mask, config.value_clip_range, n_tokens
            )
            self.accelerator.backward(loss_p + config.value_loss_coef * loss_v)
            totals["policy_loss"] += loss_p.item()
            totals["value_loss"] += loss_v.item()
            for name, value in parts.items():
                totals[name] += value.item() / n_tokens
        self._apply(totals)
        return totals

    def _apply(self, totals: Mapping[str, float]) -> None:
        """Clip and step; what is not finite stops before it can reach the weights."""
        numbers = dict(totals)
        for name, model in (("policy", self.policy), ("critic", self.critic)):
            parameters = [p for p in model.parameters() if p.requires_grad]
            norm = self.accelerator.clip_grad_norm_(parameters, self.config.max_grad_norm)
            numbers[f"{name}_grad_norm"] = float(norm)  # pyright: ignore[reportArgumentType]
        if not all(math.isfinite(v) for v in numbers.values()):
            raise TrainingError(
                f"PPO's loss or gradient is not finite ({numbers}); lower ppo.learning_rate or "
                "ppo.max_grad_norm; the last checkpoint is intact"
            )
        self.optimizer.step()
        self.optimizer.zero_grad()
