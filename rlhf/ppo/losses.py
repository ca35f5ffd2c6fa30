"""PPO's formulas. All tensors are (batch, time); masks are 1 on a reply's valid tokens."""

from __future__ import annotations

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

Tokens = Float[Tensor, "batch time"]
Mask = Bool[Tensor, "batch time"]


def masked_mean(values: Tokens, mask: Mask) -> Float[Tensor, ""]:
    """Mean over valid tokens; 0 when there is none."""
    return (values * mask).sum() / mask.sum().clamp(min=1)


def whiten(values: Tokens, mask: Mask) -> Tokens:
    """Shift and scale to mean 0 and (biased) variance 1 over valid tokens; 0 elsewhere."""
    mean = masked_mean(values, mask)
    variance = masked_mean((values - mean) ** 2, mask)
    return (values - mean) * torch.rsqrt(variance + 1e-8) * mask


def shaped_rewards(
    scores: Float[Tensor, " batch"],
    log_probs: Tokens,
    reference_log_probs: Tokens,
    mask: Mask,
    kl_coef: float,
) -> Tokens:
    """Per-token reward: −kl_coef·(log π − log π_ref), plus the score on the last valid token.

    Source: Ziegler et al. 2019, eq. 2 and section 2.2; the KL estimator is k1.
    """
    rewards = -kl_coef * (log_probs - reference_log_probs) * mask
    rows = torch.arange(len(scores), device=scores.device)
    rewards[rows, last_valid(mask)] += scores
    return rewards


def last_valid(mask: Mask) -> Int[Tensor, " batch"]:
    """Index of each row's last valid token."""
    positions = torch.arange(mask.shape[1], device=mask.device)
    return (positions * mask).argmax(1)


def gae(
    rewards: Tokens, values: Tokens, mask: Mask, gamma: float, gae_lambda: float
) -> tuple[Tokens, Tokens]:
    """Advantages and returns by generalised advantage estimation.

    δ_t = r_t + γ·V_{t+1} − V_t and A_t = δ_t + γλ·A_{t+1}, with V = 0 past the last valid token.
    Source: Schulman et al. 2015, eqs. 11, 12 and 16.

    Returns:
        Advantages (not whitened) and returns A + V, both 0 on invalid tokens.
    """
    advantages = torch.zeros_like(values)
    running = torch.zeros_like(values[:, 0])
    next_value = torch.zeros_like(running)
    for t in reversed(range(values.shape[1])):
        delta = rewards[:, t] + gamma * next_value - values[:, t]
        running = (delta + gamma * gae_lambda * running) * mask[:, t]
        next_value = values[:, t] * mask[:, t]
        advantages[:, t] = running
    return advantages, (advantages + values) * mask


def policy_loss(
    log_probs: Tokens,
    old_log_probs: Tokens,
    advantages: Tokens,
    mask: Mask,
    clip_range: float,
    n_tokens: float,
) -> tuple[Float[Tensor, ""], dict[str, Tensor]]:
    """Clipped surrogate: −Σ min(r·A, clip(r, 1±ε)·A) / n_tokens.

    Source: Schulman et al. 2017, eq. 7. `n_tokens` counts the valid tokens of the whole optimiser
    step, so that the sum over micro-batches does not depend on how they were cut.

    Returns:
        The loss and detached sums over valid tokens (`clipped`, `approx_kl`) for logging.
    """
    log_ratio = (log_probs - old_log_probs) * mask
    ratio = log_ratio.exp()
    unclipped = ratio * advantages
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range) * advantages
    loss = -(torch.min(unclipped, clipped) * mask).sum() / n_tokens
    with torch.no_grad():
        sums = {
            "clip_fraction": ((clipped < unclipped) & mask).sum(),
            # k3 of Schulman's "Approximating KL divergence": unbiased and never negative.
            "approx_kl": (((-log_ratio).exp() - 1 + log_ratio) * mask).sum(),
        }
    return loss, sums


def value_loss(
    values: Tokens,
    old_values: Tokens,
    returns: Tokens,
    mask: Mask,
    value_clip_range: float | None,
    n_tokens: float,
) -> Float[Tensor, ""]:
    """½·Σ max((V − R)², (clip(V, V_old ± ε) − R)²) / n_tokens; without clip just the first term."""
    losses = (values - returns) ** 2
    if value_clip_range is not None:
        clipped = old_values + (values - old_values).clamp(-value_clip_range, value_clip_range)
        losses = torch.max(losses, (clipped - returns) ** 2)
    return 0.5 * (losses * mask).sum() / n_tokens
