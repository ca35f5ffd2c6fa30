"""Check of rows against the chat template and token limits of the model that will be trained."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from rlhf.config.lengths import TokenLimits
from rlhf.data.fitting import Fitting
from rlhf.data.pairs import Pairs
from rlhf.data.records import LeftOutError
from rlhf.data.rendering import Renderer
from rlhf.data.rows import Pair, Prompt
from rlhf.errors import PromptUnusable

#: Returns the reason for leaving a prompt out, if there is one.
CheckPrompt = Callable[[Prompt], LeftOutError | None]


class ModelCheck:
    """Finds rows that a pretrained model can't be trained on, before any training.

    Args:
        renderer: Renders with the model's tokenizer and template.
        limits: Most tokens of prompts and replies, within the model's context.
    """

    def __init__(self, renderer: Renderer, limits: TokenLimits) -> None:
        self._fitting, self._limits = Fitting(renderer, limits), limits
        self._renderer = renderer
        self.shortened = 0
        """Prompts of pairs that lose whole turns in every stage."""

    def prompt_fault(self, prompt: Prompt) -> LeftOutError | None:
        """Return the reason for leaving a prompt out, if there is one."""
        try:
            self._fitting.check(prompt)
        except PromptUnusable as error:
            return LeftOutError(error.reason, error.detail, error.cure)
        return None

    def usable(self, pairs: Pairs) -> Pairs:
        """Return the pairs that can be trained on; the ledger gets the reasons of the others."""
        kept = []
        for index in range(len(pairs)):
            fault = self._pair_fault(pairs.pair(index))
            if fault is None:
                kept.append(index)
            else:
                pairs.lose(fault, [index])
        return pairs.select(np.array(kept, np.int64))

    def facts(self) -> dict[str, int]:
        """Return entries of the summary: the prompts of pairs that lose whole turns."""
        return {"prompts_shortened": self.shortened} if self.shortened else {}

    def _pair_fault(self, pair: Pair) -> LeftOutError | None:
        try:
            self.shortened += self._fitting.check(pair.prompt) > 0
        except PromptUnusable as error:
            return LeftOutError(error.reason, error.detail, error.cure)
        least = self._limits.reply_after(self._limits.prompt)
        if not self._fitting.bound.may_be_equal(pair.chosen, pair.rejected, least):
            return None
        one, other = (
            self._renderer.encode(pair.prompt, reply, self._limits)
            for reply in (pair.chosen, pair.rejected)
        )
        if one.response != other.response:
            return None
        return LeftOutError(
            "replies are equal where the model's input is cut",
            f"the first {len(one.response):,} tokens of both are the same",
            "raise reward_model.max_length and sft.max_length, or data.max_reply if it is set",
        )
