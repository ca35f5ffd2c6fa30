"""Clusters of prompts that stand on one side of the split, and the hash that holds clusters out."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from rlhf.data.chat import loose_text
from rlhf.data.collect import joined
from rlhf.data.duplicates import MIN_COMMON, TEMPLATE_SHARE, bare_text, near_duplicates
from rlhf.data.rows import Prompt, messages_of

#: Least number of prompts on each side: a comparison needs two.
MIN_PROMPTS = 2
#: From this number of openings on, a cluster's chance to be held out no longer grows.
MAX_CHANCES = 3


def loose_key(prompt: Prompt) -> str:
    """Return a key that ignores Unicode form, spacing and case.

    Only for keeping prompts on one side of the split, where a copy would raise the score: two
    prompts of one key may still differ, like 2² and 22.
    """
    return joined((m["role"], loose_text(m["content"])) for m in messages_of(prompt))


@dataclass
class Clusters:
    """Prompts in clusters that must not be divided by the split."""

    names: dict[str, str] = field(default_factory=dict)
    """Name of the cluster of each prompt, by its loose key."""
    openings: dict[str, set[str]] = field(default_factory=dict)
    """Openings of each cluster's prompts; they decide whether it is held out."""
    texts: dict[str, str] = field(default_factory=dict)
    """What near duplicates are searched by, by loose key."""
    common: dict[str, int] = field(default_factory=dict)
    """Beginnings that too many prompts share to join them, and the number of those prompts."""

    _keys: dict[int, tuple[Prompt, str]] = field(default_factory=dict)
    """Loose keys by the identity of prompts, which are kept so that it stays theirs."""

    def key(self, prompt: Prompt) -> str:
        """Return a prompt's loose key; that of an object is computed once."""
        if id(prompt) not in self._keys:
            self._keys[id(prompt)] = (prompt, loose_key(prompt))
        return self._keys[id(prompt)][1]

    def of(self, prompt: Prompt) -> str:
        """Return the name of a prompt's cluster."""
        return self.names[self.key(prompt)]

    def text_of(self, prompt: Prompt) -> str:
        """Return what near duplicates of a prompt are searched by."""
        return self.texts[self.key(prompt)]

    def largest(self) -> int:
        """Return the number of prompts in the largest cluster."""
        return max(Counter(self.names.values()).values(), default=0)


def find_clusters(prompts: Iterable[Prompt], threshold: float | None = None) -> Clusters:
    """Return the clusters of prompts.

    One cluster are, and whatever a chain of these joins: prompts whose users say the same, whatever
    the system turn is; turns of one conversation, which begin with the same users' turns; and, with
    a threshold, near duplicates. Beginnings that more than a third of the prompts share, such as a
    greeting or a template, join nothing.

    Args:
        prompts: The prompts, in any order.
        threshold: Least Jaccard similarity of near duplicates; None searches none.
    """
    clusters = Clusters()
    unique = {clusters.key(prompt): prompt for prompt in prompts}
    turns = {key: _user_turns(prompt) for key, prompt in unique.items()}
    counts = Counter(text for beginnings in turns.values() for text in beginnings)
    limit = max(MIN_COMMON, TEMPLATE_SHARE * len(unique))
    clusters.common = common = {text: n for text, n in counts.items() if n > limit}
    sets = _DisjointSets(len(unique))
    openings: list[str] = []
    first: dict[str, int] = {}
    for index, (key, beginnings) in enumerate(turns.items()):
        own = [text for text in beginnings if text not in common]
        if own:
            sets.join(index, first.setdefault(own[0], index))
        openings.append(own[0] if own else key)
        clusters.texts[key] = _distinctive(beginnings, common) or bare_text(
            " ".join(m["content"] for m in messages_of(unique[key]))
        )
    if threshold is not None:
        groups = near_duplicates(clusters.texts.values(), threshold)
        first = {}
        for index, text in enumerate(clusters.texts.values()):
            sets.join(index, first.setdefault(groups[text], index))
    keys = list(unique)
    names: dict[int, str] = {}
    for index, key in enumerate(keys):
        root = sets.find(index)
        names[root] = min(names.get(root, key), key)
    for index, key in enumerate(keys):
        name = clusters.names[key] = names[sets.find(index)]
        clusters.openings.setdefault(name, set()).add(openings[index])
    return clusters


def held_out_clusters(
    openings: Mapping[str, Iterable[str]], fraction: float, seed: int, salt: str = ""
) -> set[str]:
    """Return the clusters to hold out, a share of `fraction` if each has one opening.

    A cluster is held out if the hash of one of its openings is below `fraction`. So a prompt that
    is held out stays held out when the data grow, also when new prompts join its cluster or join it
    with others. That has a price: a cluster with two openings is held out twice as often. It ends
    at MAX_CHANCES openings, beyond which the limit falls as the cluster grows. Only where a side
    would have fewer than MIN_PROMPTS clusters, the nearest ones change sides.

    Args:
        openings: Openings by the name of their cluster.
        fraction: Chance of an opening, in (0, 1).
        seed: Another seed holds out others.
        salt: Another salt makes an independent choice.
    """
    scores = {
        name: _score([position(seed, salt + text) for text in texts], fraction)
        for name, texts in openings.items()
    }
    ordered = sorted(scores, key=lambda name: (scores[name], name))
    count = sum(score < fraction for score in scores.values())
    return set(ordered[: max(min(max(count, MIN_PROMPTS), len(ordered) - MIN_PROMPTS), 0)])


def position(seed: int, text: str) -> float:
    """Return a number in [0, 1) that depends on the seed and the text alone."""
    return int(hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest()[:13], 16) / 16**13


def _score(positions: Sequence[float], fraction: float) -> float:
    """Return the least position, scaled so that `fraction` is the limit for every cluster."""
    n = len(positions)
    if n <= MAX_CHANCES:
        return min(positions)
    # P(min of n uniform < limit) = 1 − (1 − limit)^n, which shall be that of MAX_CHANCES.
    limit = 1 - (1 - fraction) ** (MAX_CHANCES / n)
    return min(positions) * fraction / limit


def _user_turns(prompt: Prompt) -> list[str]:
    """Return what the users say up to each of their turns, as bare text."""
    beginnings: list[str] = []
    for message in messages_of(prompt):
        if message["role"] == "user":
            text = bare_text(message["content"])
            beginnings.append(f"{beginnings[-1]}\n{text}" if beginnings else text)
    return beginnings


def _distinctive(beginnings: list[str], common: Mapping[str, int]) -> str:
    """Return the users' turns without the beginnings that many prompts share."""
    start = max((len(text) for text in beginnings if text in common), default=0)
    return beginnings[-1][start:].strip() if beginnings else ""


class _DisjointSets:
    """Union-find of the numbers below `size`."""

    def __init__(self, size: int) -> None:
        self._parent = list(range(size))

    def find(self, node: int) -> int:
        parent = self._parent
        while parent[node] != node:
            parent[node] = parent[parent[node]]
            node = parent[node]
        return node

    def join(self, one: int, other: int) -> None:
        one, other = self.find(one), self.find(other)
        self._parent[max(one, other)] = min(one, other)
