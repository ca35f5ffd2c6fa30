"""PPO's formulas in the order of an update: rewards, KL, advantages, losses.

Tensors are (batch, time) and masks are true on valid tokens. Every formula computes in the
precision of its arguments. Values on invalid tokens are ignored, unless a docstring says otherwise.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rlhf.config.ppo import KLSection
from rlhf.statistics import RunningMoments

Tokens = Float[Tensor, "batch time"]
Mask = Bool[Tensor, "batch time"]
Scalar = Float[Tensor, ""]
Scores = Float[Tensor, " batch"]
Logits = Float[Tensor, "tokens vocabulary"]


def missing_eos(
    scores: Scores,
    finished: Bool[Tensor, " batch"],
    rule: Literal["subtract", "replace", "none"],
    penalty: float | None,
) -> Scores:
    """Apply the missing-EOS rule to the scores of replies that did not finish.

    `subtract` subtracts `penalty`, `replace` replaces the score by −`penalty` (as the published
    code of Ziegler et al. 2019), `none` or a penalty of None changes nothing.
    """
    if rule == "none" or penalty is None:
        return scores
    penalised = scores - penalty if rule == "subtract" else torch.full_like(scores, -penalty)
    return torch.where(finished, scores, penalised)


class RunningScale(RunningMoments):
    """Divides scores by the unbiased standard deviation (n − 1) of all scores so far."""

    def update(self, scores: Scores) -> None:
        """Add a chunk of scores."""
        if len(scores) > 0:
            chunk = scores.detach().double()
            mean = float(chunk.mean())
            self.merge(len(scores), mean, float(((chunk - mean) ** 2).sum()))

    @property
    def deviation(self) -> float:
        """The divisor of `apply`; 1 while all scores are equal."""
        deviation = math.sqrt(self.squares / (self.count - 1)) if self.count > 1 else 0.0
        return deviation if deviation > 1e-8 else 1.0

    def apply(self, scores: Scores) -> Scores:
        """Divide scores by the deviation; no shift of the mean, so signs do not change."""
        return scores / self.deviation


def clip_scores(scores: Scores, bound: float | None) -> Scores:
    """Clamp scores to ± `bound`; None does not bound them."""
    return scores if bound is None else scores.clamp(-bound, bound)


def kl_estimate(
    log_probs: Tokens,
    reference_log_probs: Tokens,
    estimator: Literal["k1", "k2", "k3"],
    clamp: float | None = None,
) -> Tokens:
    """Estimate of KL(π‖π_ref) from each sampled token, with d = log π − log π_ref.

    k1 = d is unbiased, k2 = d²/2 varies less, k3 = e^(−d) − 1 + d is unbiased and never negative.
    Source: Schulman 2020, "Approximating KL divergence".

    Args:
        log_probs: Log-probability of each token under the policy.
        reference_log_probs: Log-probability of each token under the frozen reference.
        estimator: k1, k2 or k3.
        clamp: Bounds the estimate (not d) to ± this, as OpenRLHF does; None does not bound it.

    Returns:
        Nats per token, also on invalid tokens, where they mean nothing.
    """
    difference = log_probs - reference_log_probs
    if estimator == "k1":
        estimate = difference
    elif estimator == "k2":
        estimate = difference**2 / 2
    else:
        # expm1 keeps the digits that e^(−d) − 1 loses near d = 0, and with them the sign.
        estimate = torch.expm1(-difference) + difference
    return estimate if clamp is None else estimate.clamp(-clamp, clamp)


def exact_kl(logits: Logits, reference_logits: Logits) -> Float[Tensor, " tokens"]:
    """Exact KL(π‖π_ref) = Σ π·(log π − log π_ref) over the whole vocabulary, in nats.

    Source: Kullback and Leibler 1951, section 2; Schulman's estimators estimate this. Logits are
    already divided by the sampling temperature. A token of probability 0 under π adds 0: if logits
    outside of a set are −∞, it is the KL within the set.
    """
    log_probs = logits.log_softmax(-1)
    reference = reference_logits.log_softmax(-1)
    probs = log_probs.exp()
    # 0·(−∞) is NaN in floating point and 0 in this sum.
    return (probs * (log_probs - reference)).masked_fill(probs == 0, 0).sum(-1)


def kept_mass(
    logits: Logits, excluded: Bool[Tensor, "tokens vocabulary"]
) -> Float[Tensor, " tokens"]:
    """Probability that softmax(logits) gives to the tokens that are not excluded."""
    return logits.softmax(-1).masked_fill(excluded, 0).sum(-1)


class KLController:
    """KL penalty coefficient `value`, constant here; subclasses adapt it in `update`."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, kl: float, n: int) -> None:
        """Adapt to the mean KL per reply of `n` replies (nats, summed over tokens)."""

    def state_dict(self) -> dict[str, float]:
        """State as JSON values, without loss of digits."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Restore what `state_dict` returned."""
        self.value = float(state["value"])


class AdaptiveKLController(KLController):
    """Proportional controller that moves the coefficient towards a target KL.

    e = clip(KL/target − 1, ±0.2) and value ← value·(1 + e·n/horizon).
    Source: Ziegler et al. 2019, section 2.2 (e_t and β_{t+1}); K_β is n/horizon here, as in their
    published code.
    """

    def __init__(self, value: float, target: float, horizon: int) -> None:
        super().__init__(value)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, n: int) -> None:
        """Raise the coefficient if `kl` is above the target, lower it if it is below."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n / self.horizon


def kl_controller(config: KLSection) -> KLController:
    """Make the controller that `config.kl_controller` names, starting from `kl_coef`."""
    if config.kl_controller == "adaptive":
        return AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
    return KLController(config.kl_coef)


def value_mask(
    mask: Mask, width: int, score_position: Literal["last", "past_end"]
) -> Bool[Tensor, "batch time+1"]:
    """Mask of the states with a value and a reward; the score goes to the last one.

    `last`: the state before each valid token, so the score is the reward of a reply's last token.
    `past_end`: also the state after the last token if it is within `width`, the chunk's longest
    reply, so the longest replies have none (TRL 1.12, experimental/ppo/ppo_trainer.py,
    sequence_lengths_p1).
    """
    states = torch.nn.functional.pad(mask, (0, 1))
    if score_position == "past_end":
        end = last_valid(mask) + 1
        rows = torch.arange(len(mask), device=mask.device)
        states[rows, end] |= mask.any(1) & (end < width)
    return states


def shaped_rewards(
    scores: Scores,
    kl: Tokens,
    mask: Mask,
    states: Bool[Tensor, "batch time+1"],
    kl_coef: float,
) -> Float[Tensor, "batch time+1"]:
    """Rewards: −kl_coef·KL on each reply token, plus the score on the last state.

    Source: Ziegler et al. 2019, eq. 2 and section 2.2.

    Args:
        scores: One per reply.
        kl: KL per token (`kl_estimate`).
        mask: True on reply tokens.
        states: From `value_mask`.
        kl_coef: The KL controller's value.

    Returns:
        Rewards, 0 outside `states`; a reply without tokens has none.
    """
    rewards = torch.nn.functional.pad((-kl_coef * kl).masked_fill(~mask, 0), (0, 1))
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last_valid(states)] += scores * states.any(1)
    return rewards


def whiten(
    values: Tokens,
    mask: Mask,
    variance: Literal["biased", "unbiased"] = "biased",
    shift_mean: bool = True,
) -> Tokens:
    """Whiten valid tokens to mean 0 and variance 1: (x − μ)/√(σ² + 1e-8).

    Source: `whiten` in the published code of Ziegler et al. 2019, of advantages and (without the
    shift) of rewards. σ² is the sum of squares over n (biased) or n − 1 (unbiased: Bessel's
    correction).

    Returns:
        The whitened values, 0 on invalid tokens; without `shift_mean` their mean is unchanged. A
        single valid token has no deviation: it becomes 0, or is unchanged without `shift_mean`.
    """
    mean = masked_mean(values, mask)
    deviations = (values - mean).masked_fill(~mask, 0)
    count = mask.sum() - (1 if variance == "unbiased" else 0)
    scaled = deviations * torch.rsqrt((deviations**2).sum() / count.clamp(min=1) + 1e-8)
    return scaled if shift_mean else (scaled + mean).masked_fill(~mask, 0)


def gae(
    rewards: Tokens, values: Tokens, mask: Mask, gamma: float, gae_lambda: float
) -> tuple[Tokens, Tokens]:
    """Generalised advantage estimation (GAE): advantages and returns.

    δ_t = r_t + γ·V_{t+1} − V_t and A_t = δ_t + γλ·A_{t+1}, with V = 0 past the last valid token.
    Source: Schulman et al. 2015, eqs. 11, 12 and 16.

    Returns:
        Advantages (not whitened) and returns A + V, both 0 on invalid tokens.
    """
    rewards, values = (t.masked_fill(~mask, 0) for t in (rewards, values))
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(running)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * gae_lambda * running) * mask[:, t]
        next_value = values[:, t]
        advantages[:, t] = running
    return advantages, advantages + values


def policy_loss(
    log_probs: Tokens,
    old_log_probs: Tokens,
    advantages: Tokens,
    mask: Mask,
    clip_range: float,
    n_tokens: float,
    dual_clip: float | None = None,
) -> tuple[Scalar, dict[str, Tensor]]:
    """Clipped surrogate: −Σ min(r·A, clip(r, 1±ε)·A) / n_tokens.

    Source: Schulman et al. 2017, eq. 7. With `dual_clip` c > 1, a token with A < 0 costs no more
    than −c·A, whatever its ratio (Ye et al. 2020, eq. 5). `n_tokens` counts the valid tokens of
    the whole optimizer step, over all micro-batches and processes: the sum of their losses does
    not depend on how the step is divided.

    Returns:
        The loss, and detached sums over valid tokens for logging: `clip_fraction` (tokens whose
        loss is the clipped one), `approx_kl` (KL of the sampling policy from this one) and, with
        `dual_clip`, `dual_clip_fraction` (tokens that it bounds).
    """
    log_ratio = (log_probs - old_log_probs).masked_fill(~mask, 0)
    advantages = advantages.masked_fill(~mask, 0)
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    surrogate = torch.min(unclipped, clipped)
    with torch.no_grad():
        sums = {
            "clip_fraction": (clipped < unclipped).sum(),
            # The samples are of the old policy, so r − 1 − ln r (k3) is an unbiased estimate of
            # KL(old‖new) (Schulman 2020).
            "approx_kl": (torch.expm1(log_ratio) - log_ratio).sum(),
        }
    if dual_clip is not None:
        floor = dual_clip * advantages
        bounded = (advantages < 0) & (surrogate < floor)
        surrogate = torch.where(bounded, floor, surrogate)
        sums["dual_clip_fraction"] = bounded.sum()
    return -surrogate.sum() / n_tokens, sums


def value_loss(
    values: Tokens,
    old_values: Tokens,
    returns: Tokens,
    mask: Mask,
    value_clip_range: float | None,
    n_tokens: float,
) -> Scalar:
    """Clipped value loss: ½·Σ max((V − R)², (clip(V, V_old ± ε) − R)²) / n_tokens.

    Without `value_clip_range` the loss is the first term alone.
    Source: Schulman et al. 2017, eq. 9, for the squared error; the clip is that of OpenAI's
    published code (Engstrom et al. 2020, section 3). `n_tokens` as in `policy_loss`, but it counts
    the states that have a value.
    """
    values, old_values, returns = (t.masked_fill(~mask, 0) for t in (values, old_values, returns))
    losses = (values - returns) ** 2
    if value_clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        losses = torch.max(losses, (clipped - returns) ** 2)
    return 0.5 * losses.sum() / n_tokens


def entropy_bonus(entropy: Tokens, mask: Mask, n_tokens: float) -> Scalar:
    """Entropy bonus Σ H / n_tokens, which the loss subtracts times its coefficient.

    Source: Schulman et al. 2017, eq. 9 (the term c₂·S). `n_tokens` as in `policy_loss`.
    """
    return entropy.masked_fill(~mask, 0).sum() / n_tokens


def explained_variance(values: Tokens, returns: Tokens, states: Mask) -> float:
    """1 − mean squared error of the critic over the variance of the returns."""
    residual = masked_mean((returns - values) ** 2, states)
    variance = masked_mean((returns - masked_mean(returns, states)) ** 2, states)
    return float(1 - residual / variance.clamp(min=1e-8))


def masked_mean(values: Tokens, mask: Mask) -> Scalar:
    """Mean over all valid tokens with equal weight; 0 if none is valid."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


def last_valid(mask: Mask) -> Int[Tensor, " batch"]:
    """Index of each row's last valid token; 0 for a row without one."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (positions * mask).argmax(1)
