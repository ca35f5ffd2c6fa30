"""Optimisation of an update: epochs over a buffer of scored replies, in steps of mini-batches."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.errors import NotFinite
from rlhf.modeling.device import upload
from rlhf.modeling.generate import Replies
from rlhf.ppo.losses import (
    entropy_bonus,
    policy_loss,
    value_loss,
)
from rlhf.ppo.models import Models

Metrics = dict[str, float]


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


def optimise(buffer: Buffer, models: Models, seed: int, learn_policy: bool = True) -> Metrics:
    """Train on a buffer for `num_ppo_epochs`, or until the policy exceeds `target_kl`.

    Returns:
        Metrics, averaged over the optimizer steps, and the number of these.

    Raises:
        NotFinite: A loss or gradient is not finite.
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
            raise NotFinite(
                f"PPO's loss or gradient is not finite ({dict(self.metrics)}); lower "
                "ppo.learning_rate or ppo.max_grad_norm; the last checkpoint is intact"
            )
        self.models.optimizers[optimizer].step()
        self.models.optimizers[optimizer].zero_grad()
