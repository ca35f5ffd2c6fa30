"""Rewards from models: the reward model, and one that compares two replies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf.data.rendering import Renderer
from rlhf.data.rows import Prompt
from rlhf.environments.contract import Reply, Scored, single
from rlhf.errors import ConfigError
from rlhf.modeling.precision import Precision
from rlhf.modeling.reward import Scorer, reward_meta


class ModelReward:
    """A reward model's score."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def values(self, batch: Sequence[Reply]) -> list[float]:
        """The score of every reply, with its own prompt."""
        return self.scorer([r.prompt for r in batch], [r.response for r in batch]).tolist()

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply with its own prompt."""
        return single("reward_model", self.values(batch), batch)


class PairModel:
    """A classifier with one label that reads a prompt and two replies.

    Its input is the rendered prompt, the first reply, the end-of-reply token, the second reply and
    that token again. A positive logit says that the first is better.
    """

    def __init__(
        self, folder: Path, device: torch.device, context: int, precision: Precision = "fp32"
    ) -> None:
        self.scorer = Scorer(folder, device, context, precision=precision)

    def advantages(self, asked: Sequence[tuple[Prompt, str, str]]) -> list[float]:
        """How much better the first reply is than the second, in logits.

        Both orders are asked and averaged, d(a, b) = (f(a, b) − f(b, a)) / 2, so that a liking for
        the first place cancels and d(b, a) = −d(a, b).
        """
        rows = [self._ids(p, a, b) for p, a, b in asked] + [self._ids(p, b, a) for p, a, b in asked]
        there, back = self.scorer.score_ids(rows).double().chunk(2)
        return ((there - back) / 2).tolist()

    def _ids(self, prompt: Prompt, first: str, second: str) -> list[int]:
        room = self.scorer.max_length
        one, two = (self.scorer.renderer.encode(prompt, r, 2 * room) for r in (first, second))
        start = one.prompt[-(room // 2) :]
        share = (room - len(start)) // 2
        return [*start, *one.response[:share], *two.response[:share]]


def check_rendering(policy: Renderer, reward_model: Path, scorer: Scorer) -> None:
    """Refuse a reward model that would see other text than it was trained on.

    Raises:
        ConfigError: Its tokenizer or template changed since training, or it shares the policy's
            vocabulary but not its template.
    """
    trained_with = reward_meta(reward_model).get("template_hash")
    now = scorer.renderer.template_hash
    same_vocabulary = scorer.renderer.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    if trained_with not in (None, now):
        reason = "its tokenizer or chat template changed since it was trained"
    elif same_vocabulary and policy.template_hash != now:
        reason = "it has the policy's vocabulary but another chat template"
    else:
        return
    raise ConfigError(
        f"reward model {str(reward_model)!r}: {reason}; train it again from this SFT policy"
    )
