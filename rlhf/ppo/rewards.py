"""The reward of a reply: named components, summed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor

from rlhf.data.rendering import Renderer
from rlhf.data.rows import Prompt
from rlhf.errors import ConfigError
from rlhf.modeling.reward import Scorer, reward_meta


@dataclass(frozen=True)
class Reply:
    """One reply to be scored, always with its own prompt."""

    prompt: Prompt
    response: str
    n_tokens: int
    finished: bool
    reference: str | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    group: int = 0
    reference_reply: str | None = None


@dataclass(frozen=True)
class Scored:
    """Totals and the named parts that add up to them, one value per reply."""

    totals: Float[Tensor, " batch"]
    components: dict[str, Float[Tensor, " batch"]]


@runtime_checkable
class Reward(Protocol):
    """Anything that scores a batch of replies."""

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply; raises TrainingError if a score is not finite."""
        ...


class ModelReward:
    """A reward model's score, less a penalty for replies that do not end."""

    def __init__(self, scorer: Scorer, missing_eos_penalty: float | None) -> None:
        self.scorer = scorer
        self.missing_eos_penalty = missing_eos_penalty or 0.0

    def __call__(self, batch: Sequence[Reply]) -> Scored:
        """Score every reply with its own prompt."""
        scores = self.scorer([r.prompt for r in batch], [r.response for r in batch])
        unfinished = torch.tensor([not r.finished for r in batch], dtype=scores.dtype)
        components = {"reward_model": scores, "missing_eos": -self.missing_eos_penalty * unfinished}
        return Scored(torch.stack(list(components.values())).sum(0), components)


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
