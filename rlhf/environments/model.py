"""Rewards by models: the reward model, and a pair model that compares two replies."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from rlhf.config.training import FrozenDtype
from rlhf.data.rendering import Renderer
from rlhf.data.rows import Prompt
from rlhf.environments.contract import Reply, Scored, single_component
from rlhf.errors import ConfigError, PromptUnusable
from rlhf.modeling.base import UNBOUNDED
from rlhf.modeling.precision import Precision
from rlhf.modeling.reward import Scorer, reward_meta


class ModelReward:
    """Rewards replies by the score of a reward model."""

    def __init__(self, scorer: Scorer) -> None:
        self.scorer = scorer

    def values(self, batch: Sequence[Reply]) -> list[float]:
        """Return the score of every reply to its prompt."""
        return self.scorer([r.prompt for r in batch], [r.response for r in batch]).tolist()

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply to its prompt."""
        return single_component("reward_model", self.values(batch), batch)


class PairModel:
    """A classifier with one label that compares two replies to a prompt.

    Its input is the rendered prompt, the first reply, the end-of-reply token, the second reply and
    that token again. A positive logit means that the first is better.
    """

    def __init__(
        self, folder: Path, device: torch.device, context: int, precision: Precision = "fp32",
        frozen_dtype: FrozenDtype = "float32",
    ) -> None:  # fmt: skip
        self.scorer = Scorer(
            folder, device, context, precision=precision, frozen_dtype=frozen_dtype
        )

    def advantages(self, triples: Sequence[tuple[Prompt, str, str]]) -> list[float]:
        """Return how much better the first reply is, for (prompt, first, second).

        In logits, averaged over both orders: d(a, b) = (f(a, b) − f(b, a)) / 2. This removes a
        position bias, and d(b, a) = −d(a, b).
        """
        rows = [self._ids(p, a, b) for p, a, b in triples]
        rows += [self._ids(p, b, a) for p, a, b in triples]
        forward, reverse = self.scorer.score_ids(rows).double().chunk(2)
        return ((forward - reverse) / 2).tolist()

    def _ids(self, prompt: Prompt, first: str, second: str) -> list[int]:
        """Return the input; the prompt gets half of the context, the replies the rest."""
        room, renderer = self.scorer.limits.max_length, self.scorer.renderer
        a, b = (renderer.encode_reply(reply) for reply in (first, second))
        try:
            start = renderer.encode_prompt(prompt, room // 2)
        except PromptUnusable:  # the context may be shorter than the policy's: it keeps its end
            start = renderer.encode_prompt(prompt, UNBOUNDED)[-(room // 2) :]
        share = (room - len(start)) // 2
        return [*start, *a[:share], *b[:share]]


def check_rendering(policy: Renderer, reward_model: Path, scorer: Scorer) -> None:
    """Check that a reward model reads text rendered as in its training.

    Raises:
        ConfigError: Its tokenizer or template changed since training, or it shares the policy's
            vocabulary but not its template.
    """
    trained_with = reward_meta(reward_model).get("template_hash")
    current = scorer.renderer.template_hash
    same_vocabulary = scorer.renderer.tokenizer.get_vocab() == policy.tokenizer.get_vocab()
    if trained_with not in (None, current):
        reason = "its tokenizer or chat template changed since it was trained"
    elif same_vocabulary and policy.template_hash != current:
        reason = "it has the policy's vocabulary but another chat template or end of replies"
    else:
        return
    cure = "train it again from this SFT policy"
    if trained_with is None:  # a ready one
        cure = "start from the base that it was made from, or train one from this SFT policy"
    raise ConfigError(f"reward model {str(reward_model)!r}: {reason}; {cure}")
