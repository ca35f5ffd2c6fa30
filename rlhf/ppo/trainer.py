"""One PPO update: sample replies, score them, estimate advantages, optimise."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PromptRow
from rlhf.environments import Environment, Reply, Scored
from rlhf.errors import ConfigError
from rlhf.modeling.base import context_length
from rlhf.modeling.device import empty_cache, upload
from rlhf.modeling.generate import Replies
from rlhf.modeling.sampling import Sampling, derive_seed
from rlhf.ppo.losses import (
    RunningScale,
    clip_scores,
    explained_variance,
    gae,
    kl_controller,
    kl_estimate,
    masked_mean,
    missing_eos,
    shaped_rewards,
    value_mask,
    whiten,
)
from rlhf.ppo.models import Models, ppo_limits
from rlhf.ppo.optimisation import Buffer, optimise

#: Replies of an update that are shown as samples.
SAMPLES = 4


class PPOTrainer:
    """The PPO algorithm and its state, except the models'; see `update`.

    Random draws of an update are seeded by (seed, update number), so `state_dict` and the models'
    checkpoint are all that a resumed run needs.
    """

    def __init__(
        self, config: PPOConfig, models: Models, environment: Environment, renderer: Renderer,
        seed: int, limits: TokenLimits | None = None,
    ) -> None:  # fmt: skip
        self.config, self.models, self.environment = config, models, environment
        self.renderer, self.seed = renderer, seed
        self.kl_controller = kl_controller(config)
        self.scale = RunningScale()
        self.device = models.device
        #: Device of the rollouts between the phases of an update.
        self.storage_device = torch.device("cpu") if config.optimize_device_cache else self.device
        self.sampling = Sampling(
            config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.sampler,
            record_kept=config.truncation == "replay",
        )  # fmt: skip
        context = context_length(models.policy)
        self.limits = ppo_limits(config, context, limits)
        self.max_prompt = self.limits.prompt
        if self.max_prompt < 1:
            raise ConfigError(
                f"ppo.max_new_tokens = {config.max_new_tokens} leaves no room for a prompt in the "
                f"policy's context of {context} tokens; lower it"
            )

    def update(self, number: int, rows: Sequence[PromptRow]) -> UpdateResult:
        """Perform one PPO update on sampled replies to a chunk of prompts."""
        rates = self.models.set_learning_rates(number)
        seed = derive_seed(self.seed, number)
        rollouts = self.sample(rows, seed=seed)
        self.free()
        self.score(rollouts)
        buffer, metrics, samples = self.prepare_buffer(rollouts)
        self.free()
        learn_policy = number >= self.config.critic_warmup_updates
        metrics |= optimise(buffer, self.models, seed + 1, learn_policy)
        self.free()
        if learn_policy:  # otherwise a KL of 0 would lower the coefficient
            self.kl_controller.update(metrics["kl"], len(rollouts.texts))
        return UpdateResult({**metrics, **rates}, [{"update": number + 1, **s} for s in samples])

    def free(self) -> None:
        """Return the last phase's cached memory to the device, if `optimize_device_cache`."""
        if self.config.optimize_device_cache:
            empty_cache(self.device)

    def sample(self, rows: Sequence[PromptRow], seed: int) -> Rollouts:
        """Sample `replies_per_prompt` adjacent replies to each prompt."""
        repeated = [row for row in rows for _ in range(self.environment.replies_per_prompt)]
        tokenizer, ends = self.renderer.tokenizer, self.renderer.end_ids
        stop = self.environment.stop
        prompts = [self.renderer.encode_prompt(row.prompt, self.max_prompt) for row in repeated]
        replies = self.models.sample(prompts, tokenizer, self.sampling, seed, stop, ends=ends)
        rollouts = Rollouts(repeated, replies.to(self.storage_device), self._decode(replies))
        if self.environment.needs_reference_reply:
            sampling = replace(self.sampling, record_kept=False)
            rivals = self.models.sample(
                prompts, tokenizer, sampling, seed + 1, stop, ends=ends, reference=True
            )
            rollouts.reference_texts = self._decode(rivals)
            rollouts.reference_finished = rivals.finished.tolist()
        return rollouts

    def _decode(self, replies: Replies) -> list[str]:
        return [self.environment.text(ids) for ids in replies.rows()]

    def score(self, rollouts: Rollouts) -> None:
        """Score every reply with the environment and apply the missing-EOS rule."""
        config, replies = self.config, rollouts.replies
        lengths, finished = replies.valid.sum(1).tolist(), replies.finished.cpu()
        k = self.environment.replies_per_prompt
        batch = [
            Reply(
                prompt=row.prompt,
                response=rollouts.texts[i],
                n_tokens=lengths[i],
                finished=bool(finished[i]),
                reference=row.reference,
                metadata=row.metadata,
                group=i // k,
                reference_reply=rollouts.reference_texts[i] if rollouts.reference_texts else None,
                reference_finished=(
                    rollouts.reference_finished[i] if rollouts.reference_finished else None
                ),
            )
            for i, row in enumerate(rollouts.rows)
        ]
        rollouts.scored = self.environment(batch)
        rollouts.scores = missing_eos(
            rollouts.scored.totals, finished, config.missing_eos, config.missing_eos_penalty
        )

    @torch.no_grad()
    def prepare_buffer(
        self, rollouts: Rollouts
    ) -> tuple[Buffer, dict[str, float], list[dict[str, Any]]]:
        """Compute rewards, advantages and returns under the sampling policy.

        Returns:
            The buffer to optimise on, the chunk's metrics, and its samples.
        """
        config, replies, scored = self.config, rollouts.replies, rollouts.scored
        assert scored is not None
        log_probs, reference, entropy, values, audit = self._forward(replies)
        mask = replies.mask
        states = value_mask(mask, mask.shape[1], config.score_position)
        values = values * states
        kl = kl_estimate(log_probs, reference, config.kl_estimator, config.kl_clamp)
        scores = rollouts.scores
        if config.reward_normalization == "running":
            self.scale.update(scores)
            scores = self.scale.apply(scores)
        elif self.models.reward_scale:
            mean, deviation = self.models.reward_scale
            scores = (scores - mean) / deviation
        scores = clip_scores(scores, config.reward_clip).to(self.storage_device)
        rewards = shaped_rewards(scores, kl, mask, states, self.kl_controller.value)
        if config.whiten_rewards:
            rewards = whiten(rewards, states, config.whiten_variance, shift_mean=False)
        advantages, returns = gae(rewards, values, states, config.gamma, config.gae_lambda)
        advantages = whiten(advantages[:, :-1] * mask, mask, config.whiten_variance)
        reply_kl = ((log_probs - reference) * mask).sum(1)
        metrics = {
            "reward": float(rollouts.scores.mean()),
            **scored.metrics(),
            "reward/missing_eos": float((rollouts.scores - scored.totals).mean()),
            "kl": float(reply_kl.mean()),
            "kl_coef": self.kl_controller.value,
            "entropy": float(masked_mean(entropy, mask)),
            "tokens": float(mask.sum(1).float().mean()),
            "eos_rate": float(replies.finished.float().mean()),
            "explained_variance": explained_variance(values, returns, states),
        }
        for name, total in audit.items():
            metrics[name] = total / (len(mask) if name == "kl_exact" else float(mask.sum()))
        buffer = Buffer(replies, states, log_probs, advantages, values, returns)
        return buffer, metrics, _samples(rollouts, scored, reply_kl)

    def _forward(self, replies: Replies) -> tuple[Tensor, Tensor, Tensor, Tensor, dict[str, float]]:
        """Run all models on the replies, in micro-batches shared among the processes.

        Returns:
            Log-probs of policy and reference, entropies, values, and the results of
            `Models.audit` summed over all tokens (none without `kl_audit`).
        """
        rows, width = shape = replies.mask.shape
        log_probs, reference, entropy = (torch.zeros(shape, device=self.device) for _ in range(3))
        values = torch.zeros(rows, width + 1, device=self.device)
        audits: list[dict[str, Tensor]] = []
        ranks = self.models.ranks
        own = torch.arange(rows)[ranks.share(rows)]
        for index in own.split(self.config.micro_batch_size):
            part = replies.take(index).to(self.device)
            part_rows, part_width = upload(index, self.device), part.mask.shape[1]
            tokens, states = (part_rows, slice(part_width)), (part_rows, slice(part_width + 1))
            log_probs[tokens], entropy[tokens] = self.models.log_probs(part)
            reference[tokens] = self.models.reference_log_probs(part)
            values[states] = self.models.values(part)
            if self.config.kl_audit:
                audits.append({k: t.sum() for k, t in self.models.audit(part).items()})
        # A sum gathers the rows: those of other processes are zero here.
        ranks.all_reduce(log_probs, reference, entropy, values)
        names = audits[0] if audits else ()
        sums = [ranks.gather(torch.stack([audit[name] for audit in audits])) for name in names]
        audit = {
            name: float(sum(sum(t.tolist()) for t in parts))
            for name, parts in zip(names, sums, strict=True)
        }
        log_probs, reference, entropy, values = (
            t.to(self.storage_device) for t in (log_probs, reference, entropy, values)
        )
        return log_probs, reference, entropy, values, audit

    def state_dict(self) -> dict[str, Any]:
        """State other than weights and optimizers, as JSON values."""
        return {
            "kl_controller": self.kl_controller.state_dict(),
            "reward_scale": self.scale.state_dict(),
            "environment": self.environment.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.kl_controller.load_state_dict(state["kl_controller"])
        self.scale.load_state_dict(state["reward_scale"])
        self.environment.load_state_dict(state["environment"])


@dataclass(frozen=True)
class UpdateResult:
    """Metrics of one update, and a few of its replies with their rewards."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass
class Rollouts:
    """One chunk of sampled replies; `PPOTrainer.score` adds the scores."""

    rows: Sequence[PromptRow]
    replies: Replies
    texts: list[str]
    reference_texts: list[str] | None = None
    reference_finished: list[bool] | None = None
    scored: Scored | None = None
    scores: Float[Tensor, " batch"] = field(default_factory=lambda: torch.zeros(0))


def _samples(
    rollouts: Rollouts, scored: Scored, kl: Float[Tensor, " batch"]
) -> list[dict[str, Any]]:
    """Return the chunk's first replies, a random selection as prompts are shuffled."""
    return [
        {
            "prompt": rollouts.rows[i].prompt,
            "response": rollouts.texts[i],
            **parts,
            "reward": float(rollouts.scores[i]),
            "kl": float(kl[i]),
            "finished": bool(rollouts.replies.finished[i]),
        }
        for i, parts in enumerate(scored.rows()[:SAMPLES])
    ]
