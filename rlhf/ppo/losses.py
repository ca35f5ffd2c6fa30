"""PPO's formulas: KL penalty, rewards per token, whitening, advantages and losses.

Tensors are (batch, time) and masks are true on valid tokens. Every formula computes in the
precision of its arguments. Values on invalid tokens are ignored, unless a docstring says otherwise.
"""

from __future__ import annotations

from typing import Literal

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Float[Tensor, "batch time"]
Mask = Bool[Tensor, "batch time"]
Scalar = Float[Tensor, ""]


def masked_mean(values: Tokens, mask: Mask) -> Scalar:
    """Mean over all valid tokens with equal weight; 0 if none is valid."""
    return values.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


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


def last_valid(mask: Mask) -> Int[Tensor, " batch"]:
    """Index of each row's last valid token; 0 for a row without one."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (positions * mask).argmax(1)


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
