"""Held-out prompts: chosen by a hash, and never near a prompt of the training side."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

from rlhf.data.chat import loose_text
from rlhf.data.collect import joined
from rlhf.data.rows import Prompt, messages_of

#: Least number of prompts on each side: a comparison needs two.
MIN_PROMPTS = 2
#: A first turn of fewer characters ("Hi") does not make two conversations one.
MIN_FIRST_TURN = 20


def loose_key(prompt: Prompt) -> str:
    """Return a key that ignores Unicode form, spacing and case.

    Only for keeping prompts on one side of the split, where a copy would raise the score: two
    prompts of one key may still differ, like 2² and 22.
    """
    return joined((m["role"], loose_text(m["content"])) for m in messages_of(prompt))


def clusters(prompts: Iterable[Prompt]) -> dict[str, str]:
    """Return the cluster of each prompt, by its loose key.

    Turns of one conversation are one cluster: prompts of which one begins with the other, or which
    begin with the same turns of a user and an assistant.
    """
    parent: dict[str, str] = {}

    def find(key: str) -> str:
        parent.setdefault(key, key)
        while parent[key] != key:
            parent[key] = parent[parent[key]]
            key = parent[key]
        return key

    keys: list[str] = []
    for prompt in prompts:
        key = loose_key(prompt)
        keys.append(key)
        for beginning in _beginnings(prompt):
            one, other = find(key), find(beginning)
            parent[max(one, other)] = min(one, other)
    return {key: find(key) for key in keys}


def held_out_clusters(names: Iterable[str], fraction: float, seed: int) -> set[str]:
    """Return the clusters to hold out: those whose hash is below `fraction`.

    The decision depends on the cluster and the seed alone, so that it stays when the data grow;
    only where a side would have fewer than MIN_PROMPTS, the nearest clusters change sides.
    """
    ordered = sorted(set(names), key=lambda name: position(seed, name))
    count = sum(position(seed, name) < fraction for name in ordered)
    return set(ordered[: max(min(max(count, MIN_PROMPTS), len(ordered) - MIN_PROMPTS), 0)])


def position(seed: int, text: str) -> float:
    """Return a number in [0, 1) that depends on the seed and the text alone."""
    return int(hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest()[:13], 16) / 16**13


def _beginnings(prompt: Prompt) -> list[str]:
    """Return the loose keys of the prompts that this one continues."""
    messages = messages_of(prompt)
    ends = [i for i in range(1, len(messages)) if messages[i]["role"] == "assistant"]
    found = []
    for end in ends:
        turns = messages[:end]
        if end > ends[0] or len(turns[-1]["content"]) >= MIN_FIRST_TURN:
            found.append(loose_key(turns))
        found.append(loose_key(messages[: end + 1]))
    return found
