"""One PPO update: sample replies, score them, estimate advantages, optimise."""

from __future__ import annotations

import hashlib
import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.config import PPOConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.rendering import Renderer
from rlhf.data.rows import PromptRow
from rlhf.environments import Environment, Reply, Scored
from rlhf.errors import ConfigError, TrainingError
from rlhf.modeling.base import context_length
from rlhf.modeling.device import empty_cache, upload
from rlhf.modeling.generate import Replies
from rlhf.modeling.sampling import Sampling
from rlhf.ppo.losses import (
    RunningScale,
    clip_scores,
    entropy_bonus,
    explained_variance,
    gae,
    kl_controller,
    kl_estimate,
    masked_mean,
    missing_eos,
    policy_loss,
    shaped_rewards,
    value_loss,
    value_mask,
    whiten,
)
from rlhf.ppo.models import Models, ppo_limits

#: Replies of an update that are shown as samples.
SAMPLES = 4

Metrics = dict[str, float]


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


@dataclass(frozen=True)
class Buffer:
    """One chunk of replies with the targets of optimisation.

    Tensors of reply tokens are (batch, reply); those of states have one more column. `states` is
    true where a state has a value.
    """

    replies: Replies
    states: Bool[Tensor, "batch states"]
    log_probs: Float[Tensor, "batch reply"]
    advantages: Float[Tensor, "batch reply"]
    values: Float[Tensor, "batch states"]
    returns: Float[Tensor, "batch states"]

    def to(self, device: torch.device) -> Buffer:
        """Copy to a device."""
        tensors = (self.states, self.log_probs, self.advantages, self.values, self.returns)
        return Buffer(self.replies.to(device), *(upload(t, device) for t in tensors))

    def take(self, index: Tensor) -> Buffer:
        """Select rows, cut to the longest reply among them; `index` is on the CPU."""
        replies = self.replies.take(index)
        width = replies.mask.shape[1]
        rows = upload(index, self.states.device)
        tokens, states = (rows, slice(width)), (rows, slice(width + 1))
        return Buffer(
            replies, self.states[states], self.log_probs[tokens], self.advantages[tokens],
            self.values[states], self.returns[states],
        )  # fmt: skip


def derive_seed(seed: int, number: int) -> int:
    """Derive an even seed from (seed, number); `seed + 1` is then unused by others."""
    digest = hashlib.sha256(f"{seed}/{number}".encode()).digest()
    return int.from_bytes(digest[:7], "big") * 2


def optimise(buffer: Buffer, models: Models, seed: int, learn_policy: bool = True) -> Metrics:
    """Train on a buffer for `num_ppo_epochs`, or until the policy exceeds `target_kl`.

    Returns:
        Metrics, averaged over the optimizer steps, and the number of these.

    Raises:
        TrainingError: A loss or gradient is not finite.
    """
    config = models.config
    generator = torch.Generator().manual_seed(seed)
    n = len(buffer.values)
    orders = [torch.randperm(n, generator=generator) for _ in range(config.num_ppo_epochs)]
    batches = [batch for order in orders for batch in order.split(config.mini_batch_size)]
    steps = 0
    sums: Metrics = defaultdict(float)
    counts = buffer.replies.valid.sum(1), buffer.states.sum(1).cpu()
    with models.recomputing():
        for batch in batches:
            n_tokens, n_states = (float(n[batch].sum()) for n in counts)
            step = _OptimizerStep(buffer, batch, models, n_tokens, n_states)
            if not step.run(learn_policy):
                break
            steps += 1
            for name, value in step.metrics.items():
                sums[name] += value
    means = {name: total / steps for name, total in sums.items()}
    return {**means, "optimiser_steps": float(steps)}


class _OptimizerStep:
    """One optimizer step on a mini-batch, in micro-batches shared among the processes.

    Losses are means over the tokens of the whole step, so that neither micro-batches nor processes
    change them. Gradients and metrics are summed over the processes before any decision, so that
    all processes decide alike. Metrics stay on the device until a decision needs them: reading one
    makes the host wait for everything launched.
    """

    def __init__(
        self, buffer: Buffer, batch: Tensor, models: Models, n_tokens: float, n_states: float
    ) -> None:
        self.models, self.config = models, models.config
        own = batch[models.ranks.share(len(batch))]
        indices = own.split(self.config.micro_batch_size)
        self.micro_batches = [buffer.take(index).to(models.device) for index in indices]
        self.n_tokens, self.n_states = n_tokens, n_states
        self.metrics: Metrics = {}
        self._unread: list[tuple[str, Tensor, float]] = []

    def run(self, learn_policy: bool) -> bool:
        """Update the weights; return False, without an update, if `target_kl` is exceeded.

        Policy and critic go one after the other, so that only one's gradients exist at a time.
        """
        if self.models.joint:
            loss = self._joint_loss if learn_policy else self._critic_loss
            self._backward(loss, "policy", "critic")
        elif learn_policy:
            self._backward(self._actor_loss, "policy")
        limit = self.config.target_kl
        if limit is not None and learn_policy:
            self._read_metrics()
            if self.metrics["approx_kl"] > limit:
                self.models.optimizers["policy"].zero_grad()
                return False
        if self.models.joint:
            if not learn_policy:  # AdamW skips parameters without a gradient
                for p in self.models.parameters["policy"].values():
                    p.grad = None
            self._apply("policy", ("policy", "critic") if learn_policy else ("critic",))
            return True
        if learn_policy:
            self._apply("policy", ("policy",))
        with self.models.critic.active():
            self._backward(self._critic_loss, "critic")
            self._apply("critic", ("critic",))
        return True

    def _backward(self, loss_of: Callable[[Buffer], Tensor], *names: str) -> None:
        """Accumulate gradients over the micro-batches and sum them over the processes."""
        for part in self.micro_batches:
            self.models.accelerator.backward(loss_of(part))
        if self.models.ranks.count > 1:
            self.models.ranks.all_reduce(*(g for name in names for g in self._gradients(name)))

    def _gradients(self, name: str) -> list[Tensor]:
        return [p.grad for p in self.models.parameters[name].values() if p.grad is not None]

    def _joint_loss(self, part: Buffer) -> Tensor:
        entropy_matters = self.config.entropy_coef > 0
        log_probs, entropy, values = self.models.log_probs_and_values(part.replies, entropy_matters)
        return self._policy_loss(part, log_probs, entropy) + self._value_loss(part, values)

    def _actor_loss(self, part: Buffer) -> Tensor:
        log_probs, entropy = self.models.log_probs(part.replies, self.config.entropy_coef > 0)
        return self._policy_loss(part, log_probs, entropy)

    def _critic_loss(self, part: Buffer) -> Tensor:
        return self._value_loss(part, self.models.values(part.replies))

    def _policy_loss(self, part: Buffer, log_probs: Tensor, entropy: Tensor) -> Tensor:
        config, mask = self.config, part.replies.mask
        loss, sums = policy_loss(
            log_probs, part.log_probs, part.advantages, mask, config.clip_range, self.n_tokens,
            config.dual_clip,
        )  # fmt: skip
        self._record("policy_loss", loss)
        for name, value in sums.items():
            self._record(name, value, self.n_tokens)
        if config.entropy_coef == 0:
            return loss
        return loss - config.entropy_coef * entropy_bonus(entropy, mask, self.n_tokens)

    def _value_loss(self, part: Buffer, values: Tensor) -> Tensor:
        loss = value_loss(
            values, part.values, part.returns, part.states, self.config.value_clip_range,
            self.n_states,
        )  # fmt: skip
        self._record("value_loss", loss)
        return self.config.value_loss_coef * loss

    def _record(self, name: str, value: Tensor, count: float = 1.0) -> None:
        """Add `value` / `count` of a micro-batch to a metric, without reading it yet."""
        self._unread.append((name, value.detach(), count))

    def _read_metrics(self, *more: Tensor) -> list[float]:
        """Move recorded values of all processes into `metrics`; return `more` as numbers.

        All values are read in one copy to the host.
        """
        pending = [value for _, value, _ in self._unread] + list(more)
        values = torch.cat([t.reshape(1) for t in pending]).tolist() if pending else []
        sums: Metrics = defaultdict(float)
        for (name, _, count), value in zip(self._unread, values, strict=False):
            sums[name] += value / count
        if self.models.ranks.count > 1:
            totals = torch.tensor(list(sums.values()), dtype=torch.float64)
            self.models.ranks.all_reduce(totals)
            sums = dict(zip(sums, totals.tolist(), strict=True))
        self.metrics.update(sums)
        self._unread = []
        return values[len(values) - len(more) :]

    def _apply(self, optimizer: str, names: Sequence[str]) -> None:
        """Clip gradients and step; raises before a non-finite value can reach the weights."""
        limit = self.config.max_grad_norm
        norms = [torch.nn.utils.get_total_norm(self._gradients(name)) for name in names]
        for name, norm, value in zip(names, norms, self._read_metrics(*norms), strict=True):
            self.metrics[f"{name}_grad_norm"] = value
            if limit is not None and value > limit:
                parameters = self.models.parameters[name].values()
                torch.nn.utils.clip_grads_with_norm_(parameters, limit, norm)
        if not all(math.isfinite(v) for v in self.metrics.values()):
            raise TrainingError(
                f"PPO's loss or gradient is not finite ({dict(self.metrics)}); lower "
                "ppo.learning_rate or ppo.max_grad_norm; the last checkpoint is intact"
            )
        self.models.optimizers[optimizer].step()
        self.models.optimizers[optimizer].zero_grad()


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
