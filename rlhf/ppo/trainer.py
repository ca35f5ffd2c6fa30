"""One PPO update: sample, score, estimate advantages, optimise."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PromptRow
from rlhf.environments import Environment, Reply, Scored
from rlhf.errors import ConfigError
from rlhf.modeling.base import context_of
from rlhf.modeling.device import upload
from rlhf.ppo.kl import kl_controller, kl_estimate
from rlhf.ppo.losses import gae, masked_mean, whiten
from rlhf.ppo.memory import release
from rlhf.ppo.models import Models
from rlhf.ppo.optimise import Buffer, optimise
from rlhf.ppo.rollout import Replies, Sampling
from rlhf.ppo.shaping import RunningScale, clip_scores, missing_eos, shaped_rewards, value_mask

SAMPLES = 4


def mix(seed: int, number: int) -> int:
    """A seed of its own for each (seed, number), even, so that `+ 1` gives an unrelated one."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:7], "big") * 2


@dataclass(frozen=True)
class Updated:
    """What one update has to tell: numbers to log, and a few replies with their rewards."""

    metrics: dict[str, float]
    samples: list[dict[str, Any]]


@dataclass
class Rollouts:
    """A chunk's replies, on their way to a buffer."""

    rows: Sequence[PromptRow]
    replies: Replies
    texts: list[str]
    reference_texts: list[str] | None = None
    reference_finished: list[bool] | None = None
    scored: Scored | None = None
    scores: Float[Tensor, " batch"] = field(default_factory=lambda: torch.zeros(0))


class PPOTrainer:
    """The state of one PPO run; `update` is the algorithm."""

    def __init__(
        self, config: PPOConfig, models: Models, environment: Environment, renderer: Renderer,
        seed: int,
    ) -> None:  # fmt: skip
        self.config, self.models, self.environment = config, models, environment
        self.renderer, self.seed = renderer, seed
        self.kl = kl_controller(config)
        self.scale = RunningScale()
        self.device = models.device
        # The rollouts' place between the phases.
        self.parked = torch.device("cpu") if config.optimize_device_cache else self.device
        self.sampling = Sampling(
            config.max_new_tokens, config.temperature, config.top_k, config.top_p, config.sampler
        )
        context = context_of(models.policy)
        self.max_prompt = context - config.max_new_tokens
        if self.max_prompt < 1:
            raise ConfigError(
                f"ppo.max_new_tokens = {config.max_new_tokens} leaves no room for a prompt in the "
                f"policy's context of {context} tokens; lower it"
            )

    def update(self, number: int, rows: Sequence[PromptRow]) -> Updated:
        """One PPO update on the replies to one chunk of prompts."""
        rates = self.models.set_learning_rates(number)
        rollouts = self.sample(rows, seed=mix(self.seed, number))
        self.free()
        self.score(rollouts)
        buffer, metrics, samples = self.evaluate(rollouts)
        self.free()
        learn_policy = number >= self.config.critic_warmup_updates
        metrics |= optimise(buffer, self.models, mix(self.seed, number) + 1, learn_policy)
        self.free()
        self.kl.update(metrics["kl"], len(rollouts.texts))
        return Updated({**metrics, **rates}, [{"update": number + 1, **s} for s in samples])

    def free(self) -> None:
        """Give memory back that a phase needed and the next does not, if that is wanted."""
        if self.config.optimize_device_cache:
            release(self.device)

    def sample(self, rows: Sequence[PromptRow], seed: int) -> Rollouts:
        """Replies of the policy, `replies_per_prompt` to each prompt, which stand together."""
        repeated = [row for row in rows for _ in range(self.environment.replies_per_prompt)]
        tokenizer, stop = self.renderer.tokenizer, self.environment.stop
        prompts = [self.renderer.encode_prompt(row.prompt, self.max_prompt) for row in repeated]
        replies = self.models.sample(prompts, tokenizer, self.sampling, seed, stop)
        rollouts = Rollouts(repeated, replies.to(self.parked), self._texts(replies))
        if self.environment.needs_reference_reply:
            rivals = self.models.sample_reference(prompts, tokenizer, self.sampling, seed + 1, stop)
            rollouts.reference_texts = self._texts(rivals)
            rollouts.reference_finished = rivals.finished.tolist()
        return rollouts

    def _texts(self, replies: Replies) -> list[str]:
        return [self.environment.text(ids) for ids in replies.rows()]

    def score(self, rollouts: Rollouts) -> None:
        """The environment's verdict on every reply, always with the reply's own prompt."""
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
    def evaluate(self, rollouts: Rollouts) -> tuple[Buffer, dict[str, float], list[dict[str, Any]]]:
        """Log-probs, values and advantages of a chunk, under the policy that sampled it."""
        config, replies = self.config, rollouts.replies
        log_probs, reference, entropy, values, audit = self._forward(replies)
        mask = replies.mask
        states = value_mask(mask, mask.shape[1], config.score_position)
        values = values * states
        kl = kl_estimate(log_probs, reference, config.kl_estimator, config.kl_clamp)
        scores = self._scaled(rollouts.scores).to(self.parked)
        rewards = shaped_rewards(scores, kl, mask, states, self.kl.value)
        if config.whiten_rewards:
            rewards = whiten(rewards, states, config.whiten_variance, shift_mean=False)
        advantages, returns = gae(rewards, values, states, config.gamma, config.gae_lambda)
        advantages = whiten(advantages[:, :-1] * mask, mask, config.whiten_variance)
        reply_kl = ((log_probs - reference) * mask).sum(1)
        metrics = {
            **_of_scores(rollouts),
            "kl": float(reply_kl.mean()),
            "kl_coef": self.kl.value,
            "entropy": float(masked_mean(entropy, mask)),
            "tokens": float(mask.sum(1).float().mean()),
            "eos_rate": float(replies.finished.float().mean()),
            "explained_variance": _explained(values, returns, states),
        }
        if config.kl_audit:
            metrics["kl_exact"] = audit / len(mask)
        buffer = Buffer(replies, states, log_probs, advantages, values, returns)
        return buffer, metrics, _samples(rollouts, reply_kl)

    def _forward(self, replies: Replies) -> tuple[Tensor, Tensor, Tensor, Tensor, float]:
        """Log-probs of policy and reference, entropies, values; and the exact KL, summed."""
        rows, width = replies.mask.shape
        log_probs, reference, entropy = (
            torch.zeros(rows, width, device=self.device) for _ in range(3)
        )
        values = torch.zeros(rows, width + 1, device=self.device)
        audits: list[Tensor] = []
        ranks = self.models.ranks
        own = torch.arange(rows)[ranks.share(rows)]
        for index in own.split(self.config.micro_batch_size):
            part = replies.take(index).to(self.device)
            there = upload(index, self.device)
            to = (there, slice(part.mask.shape[1]))
            log_probs[to], entropy[to] = self.models.log_probs(part)
            reference[to] = self.models.reference_log_probs(part)
            states = (there, slice(part.mask.shape[1] + 1))
            values[states] = self.models.values(part)
            if self.config.kl_audit:
                audits.append(self.models.exact_kl(part).sum())
        # All of it, as the other processes' rows are zero here.
        ranks.add_up(log_probs, reference, entropy, values)
        exact = sum(sum(t.tolist()) for t in ranks.gather(torch.stack(audits))) if audits else 0.0
        log_probs, reference, entropy, values = (
            t.to(self.parked) for t in (log_probs, reference, entropy, values)
        )
        return log_probs, reference, entropy, values, exact

    def _scaled(self, scores: Float[Tensor, " batch"]) -> Float[Tensor, " batch"]:
        """Scores, by their running deviation where the configuration says so, and clamped."""
        if self.config.reward_normalization == "running":
            self.scale.update(scores)
            scores = self.scale.apply(scores)
        return clip_scores(scores, self.config.reward_clip)

    def state_dict(self) -> dict[str, Any]:
        """What changes while training, beside weights and optimisers; it can be written as JSON."""
        return {
            "kl_controller": self.kl.state_dict(),
            "reward_scale": self.scale.state_dict(),
            "environment": self.environment.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from `state_dict`."""
        self.kl.load_state_dict(state["kl_controller"])
        self.scale.load_state_dict(state["reward_scale"])
        self.environment.load_state_dict(state["environment"])


def _of_scores(rollouts: Rollouts) -> dict[str, float]:
    scored = rollouts.scored
    assert scored is not None
    return {
        "reward": float(rollouts.scores.mean()),
        **scored.metrics(),
        "reward/missing_eos": float((rollouts.scores - scored.totals).mean()),
    }


def _explained(values: Tensor, returns: Tensor, states: Tensor) -> float:
    """Share of the returns' variance that the critic foresaw."""
    residual = masked_mean((returns - values) ** 2, states)
    spread = masked_mean((returns - masked_mean(returns, states)) ** 2, states)
    return float(1 - residual / spread.clamp(min=1e-8))


def _samples(rollouts: Rollouts, kl: Float[Tensor, " batch"]) -> list[dict[str, Any]]:
    """The chunk's first replies: prompts come in random order, so they are no choice of ours."""
    scored = rollouts.scored
    assert scored is not None
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
