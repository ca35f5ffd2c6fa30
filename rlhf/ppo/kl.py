"""KL divergence of the policy from the reference, and controllers of its penalty."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.config.ppo import KLSection
from rlhf.ppo.losses import Tokens

Logits = Float[Tensor, "tokens vocabulary"]


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
    already divided by the sampling temperature. A token of probability 0 under π adds 0.
    """
    log_probs = logits.log_softmax(-1)
    reference = reference_logits.log_softmax(-1)
    probs = log_probs.exp()
    # 0·(−∞) is NaN in floating point and 0 in this sum.
    return (probs * (log_probs - reference)).masked_fill(probs == 0, 0).sum(-1)


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
