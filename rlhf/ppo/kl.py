"""How far the policy has moved from the reference, and what that costs."""

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
        reference_log_probs: The same under the frozen reference.
        estimator: Which of the three.
        clamp: Bounds the estimate (not d) to ± this, as OpenRLHF does; none leaves it alone.

    Returns:
        Nats per token; on invalid tokens whatever the formula makes of what lies there.
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
    """KL(π‖π_ref) = Σ π·(log π − log π_ref) over the whole vocabulary, in nats.

    Source: Kullback and Leibler 1951, section 2; it is what Schulman's estimators estimate. Logits
    are divided by the sampling temperature already; a token that the policy never draws adds 0.
    """
    log_probs = logits.log_softmax(-1)
    reference = reference_logits.log_softmax(-1)
    probs = log_probs.exp()
    # 0·(−∞) is 0 here: without the fill a forbidden token would make the sum NaN.
    return (probs * (log_probs - reference)).masked_fill(probs == 0, 0).sum(-1)


class KLController:
    """The KL penalty's weight in the reward: `value`, which `update` may move."""

    def __init__(self, value: float) -> None:
        self.value = value

    def update(self, kl: float, n: int) -> None:
        """Take note of the mean KL per reply (nats, summed over its tokens) of `n` replies."""

    def state_dict(self) -> dict[str, float]:
        """All that changes; JSON keeps it exactly."""
        return {"value": self.value}

    def load_state_dict(self, state: Mapping[str, float]) -> None:
        """Go on from what `state_dict` returned."""
        self.value = float(state["value"])


class AdaptiveKLController(KLController):
    """Moves the weight, in proportion, until replies have the wanted KL.

    e = clip(KL/target − 1, ±0.2) and value ← value·(1 + e·n/horizon).
    Source: Ziegler et al. 2019, section 2.2 (e_t and β_{t+1}); their K_β is n/horizon here, as in
    their published code.
    """

    def __init__(self, value: float, target: float, horizon: int) -> None:
        super().__init__(value)
        self.target, self.horizon = target, horizon

    def update(self, kl: float, n: int) -> None:
        """Raise the weight if `kl` is above the target, lower it if it is below."""
        error = min(max(kl / self.target - 1, -0.2), 0.2)
        self.value *= 1 + error * n / self.horizon


def kl_controller(config: KLSection) -> KLController:
    """The controller that `kl_controller` names, starting from `kl_coef`."""
    if config.kl_controller == "adaptive":
        return AdaptiveKLController(config.kl_coef, config.kl_target, config.kl_horizon)
    return KLController(config.kl_coef)
