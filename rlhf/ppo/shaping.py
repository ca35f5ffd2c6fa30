"""Reward shaping: from one score per reply to one reward per token.

Steps in order: missing-EOS rule, `RunningScale`, `clip_scores`, `shaped_rewards`, whitening.
Rewards, values and the mask `states` are (batch, time + 1): column t is the state before token t,
the last column the state after the last token. Advantages are used on reply tokens only, the first
`time` columns.
"""

from __future__ import annotations

import math
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rlhf.ppo.losses import Mask, Tokens, last_valid
from rlhf.statistics import RunningMoments

Scores = Float[Tensor, " batch"]


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
