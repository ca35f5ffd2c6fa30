"""Slices of held-out pairs: where a reward model is better or worse than on the whole."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.data.rows import Pair, messages_of
from rlhf.evaluation.common import groups_of
from rlhf.inference import share_of

#: Prompts that a slice needs to be called the worst one.
PROMPTS_OF_THE_WORST = 30
#: Replies whose lengths differ by at most this share of the longer one are of similar length.
SIMILAR = 0.1


def slices_of(pairs: Sequence[Pair]) -> dict[str, list[int]]:
    """Return the rows of each slice; one that holds no row, or every row, is left out.

    `group:<name>`; `short_prompt`, `medium_prompt` and `long_prompt`, thirds by characters;
    `chosen_longer`, `chosen_shorter` and `similar_length` of the replies; `one_turn` and
    `several_turns` of the prompt.
    """
    prompts = [messages_of(pair.prompt) for pair in pairs]
    lengths = [sum(len(message["content"]) for message in messages) for messages in prompts]
    first, second = (float(x) for x in np.quantile(lengths, [1 / 3, 2 / 3]))

    def third(length: int) -> str:
        name = "short" if length <= first else "medium" if length <= second else "long"
        return f"{name}_prompt"

    def compared(pair: Pair) -> str:
        chosen, rejected = len(pair.chosen), len(pair.rejected)
        if abs(chosen - rejected) <= SIMILAR * max(chosen, rejected):
            return "similar_length"
        return "chosen_longer" if chosen > rejected else "chosen_shorter"

    kinds: list[list[str | None]] = [
        [None if pair.group is None else f"group:{pair.group}" for pair in pairs],
        [third(length) for length in lengths],
        [compared(pair) for pair in pairs],
        ["one_turn" if _turns(messages) < 2 else "several_turns" for messages in prompts],
    ]
    found = {name: rows for kind in kinds for name, rows in groups_of(kind).items()}
    return {name: rows for name, rows in found.items() if len(rows) < len(pairs)}


def accuracy_by_slice(
    slices: Mapping[str, Sequence[int]], correct: Sequence[float], prompts: Sequence[str]
) -> dict[str, dict[str, Any]]:
    """Return the accuracy of each slice with its interval, its pairs `n` and its `prompts`."""
    result: dict[str, dict[str, Any]] = {}
    for name, rows in slices.items():
        share = share_of([correct[i] for i in rows], [prompts[i] for i in rows])
        counts = {"n": len(rows), "prompts": share.clusters}
        result[name] = {**share.metrics("accuracy"), **counts}
    return result


def worst_of(by_slice: Mapping[str, Mapping[str, Any]]) -> str | None:
    """Return the slice of the lowest accuracy among those of enough prompts; None without one."""
    large = {k: v for k, v in by_slice.items() if v["prompts"] >= PROMPTS_OF_THE_WORST}
    return min(large, key=lambda name: large[name]["accuracy"], default=None)


def _turns(messages: Sequence[Mapping[str, str]]) -> int:
    return sum(message["role"] == "user" for message in messages)
