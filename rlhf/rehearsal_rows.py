"""Rows that a rehearsal trains on: the user's first ones that fit, and short ones."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from rlhf.config.lengths import TokenLimits
from rlhf.data.rendering import Renderer
from rlhf.data.rows import (
    DEMONSTRATIONS,
    PAIRS_EVAL,
    PAIRS_TRAIN,
    PROMPTS_EVAL,
    PROMPTS_TRAIN,
    Demonstration,
    Pair,
    PromptRow,
    iterate_rows,
    write_rows,
)
from rlhf.errors import PromptUnusable

#: Rows of each kind, and how many of the user's are looked at to find as many that fit.
ROWS, LOOKED_AT = 4, 200
#: Prompt, good and bad reply of rows in place of those that do not fit; of several lengths.
_SHORT_ROWS = (
    ("Hi", "Hello", "No"),
    ("Two plus two?", "Four", "Tea"),
    ("Name a colour", "Red or blue", "I can't"),
    ("Why is the sky blue?", "Light scatters", "It is"),
)


@dataclass(frozen=True)
class Sample:
    """A few rows of each kind, as a dataset holds them."""

    demonstrations: Sequence[Demonstration]
    pairs: Sequence[Pair]
    prompts: Sequence[PromptRow]

    @classmethod
    def of(cls, data: Path) -> Sample:
        """Return the first rows of a dataset's folder."""
        return cls(
            [*islice(iterate_rows(data / DEMONSTRATIONS, Demonstration), LOOKED_AT)],
            [*islice(iterate_rows(data / PAIRS_TRAIN, Pair), LOOKED_AT)],
            [*islice(iterate_rows(data / PROMPTS_TRAIN, PromptRow), LOOKED_AT)],
        )

    def write(self, folder: Path, renderer: Renderer, limits: TokenLimits, margins: bool) -> bool:
        """Write a dataset of `ROWS` rows of each kind that fit.

        Args:
            folder: The dataset's folder; it is made.
            renderer: Makes the tokens whose number must fit.
            limits: Most tokens of a rehearsal's prompts and replies.
            margins: Give every pair a margin.

        Returns:
            False, and nothing is written, if not even a prompt of two words fits.
        """

        def fits(prompt: Any, *texts: str) -> bool:
            try:
                room = limits.reply_after(len(renderer.encode_prompt(prompt, limits.prompt)))
            except PromptUnusable:
                return False
            return all(0 < len(renderer.encode_reply(text)) <= room for text in texts)

        demonstrations = [d for d in self.demonstrations if fits(d.prompt, d.response)][:ROWS]
        pairs = [p for p in self.pairs if fits(p.prompt, p.chosen, p.rejected)][:ROWS]
        prompts = [p for p in self.prompts if fits(p.prompt)][:ROWS]
        for question, good, bad in _SHORT_ROWS:
            if fits(question, good, bad):
                demonstrations.append(Demonstration(question, good))
                pairs.append(Pair(question, good, bad))
                prompts.append(PromptRow(question))
        if not prompts:
            return False
        # Members of a reward model are fitted to resamples of the prompts.
        other = next((pair for pair in pairs if pair.prompt != pairs[0].prompt), pairs[0])
        if other not in pairs[:ROWS]:
            pairs[ROWS - 1] = other
        if margins:
            pairs = [Pair(p.prompt, p.chosen, p.rejected, margin=p.margin or 1.0) for p in pairs]
        folder.mkdir()
        write_rows(folder / DEMONSTRATIONS, demonstrations[:ROWS])
        for name in (PAIRS_TRAIN, PAIRS_EVAL):
            write_rows(folder / name, pairs[:ROWS])
        for name in (PROMPTS_TRAIN, PROMPTS_EVAL):
            write_rows(folder / name, prompts[:ROWS])
        return True
