"""Policies that answer prompts outside of a run, and the prompts that they can be given."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from rlhf.config.lengths import TokenLimits
from rlhf.data.fitting import Fitting
from rlhf.data.rendering import Renderer
from rlhf.data.rows import Pair, PromptRow
from rlhf.environments.stop import StopSequences
from rlhf.errors import DataError, PromptUnusable
from rlhf.evaluation.answers import Answers, answer_prompts
from rlhf.modeling.base import context_length, load_policy
from rlhf.modeling.critic import freeze
from rlhf.modeling.sampling import Sampling
from rlhf.modeling.tokenizer import load_tokenizer_and_ends

RowT = TypeVar("RowT", PromptRow, Pair)
#: Largest share of prompts that a model may be unable to read.
MAX_BAD_FRACTION = 0.1


@dataclass(frozen=True)
class SamplingPlan:
    """Settings of sampling, the same for all policies of a comparison."""

    samples: int = 1
    """Replies to each prompt."""
    max_new_tokens: int = 128
    temperature: float = 1.0
    stop_sequences: tuple[str, ...] = ()
    seed: int = 0
    batch_size: int = 128


class Policy:
    """A frozen policy with its renderer.

    Args:
        folder: A causal language model with its tokenizer.
        device: Device of the model.
        plan: How it replies.
        limits: Those of its training; None fills its context.

    Raises:
        ConfigError: The model or its tokenizer can't be loaded.
    """

    def __init__(
        self, folder: Path, device: torch.device, plan: SamplingPlan,
        limits: TokenLimits | None = None,
    ) -> None:  # fmt: skip
        self.model = freeze(load_policy(folder)).to(device)
        # A folder may be a model that no stage has completed.
        self.renderer = Renderer(*load_tokenizer_and_ends(folder))
        self.plan = plan
        context = context_length(self.model)
        limits = (limits or TokenLimits(max_length=context)).within(context)
        self.limits = limits.model_copy(update={"max_new_tokens": plan.max_new_tokens})
        self.ending = StopSequences(self.renderer, plan.stop_sequences)

    @property
    def fitting(self) -> Fitting:
        """The check of prompts that the policy can be given."""
        return Fitting(self.renderer, self.limits)

    def answer(
        self, rows: Sequence[PromptRow], seed: int, reference: Policy | None = None
    ) -> Answers:
        """Sample the plan's replies to each prompt.

        Args:
            rows: Prompts that fit.
            seed: Of the sampling.
            reference: Measures the KL from a policy with the same tokens.
        """
        plan = self.plan
        return answer_prompts(
            self.model, reference and reference.model, rows, self.renderer, self.ending,
            Sampling(plan.max_new_tokens, plan.temperature), seed, max_prompt=self.limits.prompt,
            batch_size=plan.batch_size, replies=plan.samples,
        )  # fmt: skip


def fitting_rows(
    rows: Sequence[RowT], fittings: Sequence[Fitting]
) -> tuple[list[RowT], dict[str, int]]:
    """Return the rows whose prompts every model can be given, and counts of the others by reason.

    Raises:
        DataError: None is left, or more than a tenth can't be used.
    """
    kept: list[RowT] = []
    reasons: Counter[str] = Counter()
    example: PromptUnusable | None = None
    for row in rows:
        try:
            for fitting in fittings:
                fitting.check(row.prompt)
        except PromptUnusable as error:
            reasons[error.reason] += 1
            example = example or error
        else:
            kept.append(row)
    if not kept or reasons.total() > MAX_BAD_FRACTION * len(rows):
        shown = f"{example.reason}: {example.detail}" if example else "there are none"
        raise DataError(
            f"{reasons.total():,} of {len(rows):,} prompts can't be given to the models ({shown}); "
            "leave such prompts out, or lower --max-new-tokens"
        )
    return kept, dict(reasons)
