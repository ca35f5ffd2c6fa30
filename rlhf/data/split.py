"""Clusters of prompts that stand on one side of the split, and the hash that holds clusters out.

Digests decide which texts are equal; the texts are in a spill.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from rlhf.data.chat import loose_key
from rlhf.data.duplicates import (
    MIN_COMMON,
    TEMPLATE_SHARE,
    DisjointSets,
    Numbers,
    bare_text,
    duplicate_groups,
)
from rlhf.data.rows import Prompt, messages_of
from rlhf.data.spill import Spill, StoredTexts, runs, short_digest

#: Least number of prompts on each side: a comparison needs two.
MIN_PROMPTS = 2
#: From this number of openings on, a cluster's chance to be held out no longer grows.
MAX_CHANCES = 3


@dataclass
class Clusters:
    """Prompts in clusters that must not be divided by the split.

    Prompts of one loose key are one here. In memory are 60 bytes a prompt.
    """

    numbers: Numbers
    """Cluster of each prompt that was given, of shape (prompts,)."""
    keys: NDArray[np.uint64]
    """Digests of the loose keys, ascending, of shape (loose keys,)."""
    key_clusters: Numbers
    """Cluster of each loose key."""
    openings: StoredTexts
    """First users' turns by loose key; they decide whether a cluster is held out."""
    opening_digests: NDArray[np.uint64]
    texts: StoredTexts
    """Text by which near duplicates of a prompt are searched, by loose key."""
    text_digests: NDArray[np.uint64]
    places: Numbers
    """Index among the loose keys of each prompt that was given, of shape (prompts,)."""
    common: dict[str, int]
    """Beginnings that too many prompts share to join them, and the number of those prompts."""

    def of(self, prompt: Prompt) -> int:
        """Return the cluster of a prompt that was given."""
        return int(self.key_clusters[np.searchsorted(self.keys, short_digest(loose_key(prompt)))])

    def largest(self) -> int:
        """Return the number of prompts in the largest cluster."""
        return int(np.bincount(self.key_clusters).max(initial=0))

    def held_out(
        self, clusters: Numbers, fraction: float, seed: int, salt: str = ""
    ) -> NDArray[np.bool_]:
        """Return which of all clusters to hold out, by `held_out_clusters`.

        Args:
            clusters: Those to choose from, of any shape.
            fraction: Chance of an opening, in (0, 1).
            seed: Another seed holds out others.
            salt: Another salt makes an independent choice.

        Returns:
            Array of shape (all clusters,).
        """
        eligible = np.zeros(int(self.key_clusters.max(initial=-1)) + 1, dtype=bool)
        eligible[clusters] = True
        pairs = np.empty(len(self.keys), dtype=[("cluster", "<i8"), ("opening", "<u8")])
        pairs["cluster"], pairs["opening"] = self.key_clusters, self.opening_digests
        order = np.lexsort((pairs["opening"], pairs["cluster"]))
        first = order[runs(pairs[order])[0]]  # each opening of a cluster once
        first = self.openings.in_sequence(first[eligible[self.key_clusters[first]]])
        positions = np.fromiter(
            (position(seed, salt + self.openings[i]) for i in first.tolist()),
            dtype=np.float64,
            count=len(first),
        )
        chosen = np.zeros_like(eligible)
        chosen[held_out_clusters(self.key_clusters[first], positions, fraction)] = True
        return chosen


def find_clusters(
    prompts: Sequence[Prompt], threshold: float | None = None, folder: Path | None = None
) -> Clusters:
    """Return the clusters of prompts.

    One cluster are, and whatever a chain of these joins: prompts whose users say the same, whatever
    the system turn is; turns of one conversation, which begin with the same users' turns; and, with
    a threshold, near duplicates. Beginnings that more than a third of the prompts share, such as a
    greeting or a template, join nothing.

    Args:
        prompts: The prompts, in any order; they are read twice.
        threshold: Least Jaccard similarity of near duplicates; None searches none.
        folder: For temporary files; None takes the system's.

    Raises:
        DataError: The disk is full.
    """
    beginnings = _Beginnings(prompts)
    keys, firsts, places = np.unique(beginnings.keys, return_index=True, return_inverse=True)
    common = beginnings.common(prompts, firsts)
    store = Spill(folder)
    opening_at, text_at = np.empty((2, len(keys)), dtype=np.int64)
    openings, texts = np.empty((2, len(keys)), dtype=np.uint64)
    for number in np.argsort(firsts).tolist():  # in the sequence of the prompts
        opening, text = _opening_and_text(prompts[int(firsts[number])], common)
        openings[number], texts[number] = short_digest(opening), short_digest(text)
        opening_at[number] = store.add(opening)
        text_at[number] = opening_at[number] if text == opening else store.add(text)
    stored = StoredTexts(store, text_at)
    sets = DisjointSets(len(keys))
    sets.join_equal(openings)
    if threshold is not None:
        sets.join_equal(group_texts(stored, texts, threshold, folder=folder))
    clusters = np.unique(sets.roots(), return_inverse=True)[1].astype(np.int64)
    return Clusters(
        clusters[places], keys, clusters, StoredTexts(store, opening_at), openings, stored, texts,
        places, common,
    )  # fmt: skip


def group_texts(
    texts: StoredTexts,
    digests: NDArray[np.uint64],
    threshold: float,
    seed: int = 0,
    folder: Path | None = None,
) -> Numbers:
    """Return groups of near duplicates among texts that may be equal.

    Args:
        texts: Bare texts, of shape (texts,).
        digests: Their digests, which tell equal ones.
        threshold: Least Jaccard similarity.
        seed: Of the signatures.
        folder: For temporary files.

    Returns:
        Number of the group of each text, below the number of texts.
    """
    _, firsts, places = np.unique(digests, return_index=True, return_inverse=True)
    in_sequence = np.argsort(firsts)
    # The order of the digests is one that the texts decide: `firsts` is sorted by them.
    order = np.empty_like(in_sequence)
    order[in_sequence] = np.arange(len(in_sequence))
    groups = duplicate_groups(
        texts.select(firsts[in_sequence]), order, threshold, seed=seed, folder=folder
    )
    return groups[order][places]


def held_out_clusters(
    clusters: Numbers, positions: NDArray[np.float64], fraction: float
) -> Numbers:
    """Return the clusters to hold out, a share of `fraction` if each has one opening.

    A cluster is held out if the hash of one of its openings is below `fraction`. So a prompt that
    is held out stays held out when the data grow, also when new prompts join its cluster or join it
    with others. That has a price: a cluster with two openings is held out twice as often. It ends
    at MAX_CHANCES openings, beyond which the limit falls as the cluster grows. Only where a side
    would have fewer than MIN_PROMPTS clusters, the nearest ones change sides.

    Args:
        clusters: Cluster of each opening, of shape (openings,).
        positions: Hash of each opening, in [0, 1).
        fraction: Chance of an opening, in (0, 1).
    """
    order = np.lexsort((positions, clusters))
    starts, ends = runs(clusters[order])
    names, scores = clusters[order][starts], positions[order][starts]
    for count in np.unique(ends - starts).tolist():
        if count > MAX_CHANCES:
            # P(min of n uniform < limit) = 1 − (1 − limit)^n, which shall be that of MAX_CHANCES.
            limit = 1 - (1 - fraction) ** (MAX_CHANCES / count)
            scores[ends - starts == count] *= fraction / limit
    held_out = int((scores < fraction).sum())
    held_out = max(min(max(held_out, MIN_PROMPTS), len(names) - MIN_PROMPTS), 0)
    return names[np.lexsort((names, scores))[:held_out]]


def position(seed: int, text: str) -> float:
    """Return a number in [0, 1) that depends on the seed and the text alone."""
    return int(hashlib.sha256(f"{seed}\0{text}".encode()).hexdigest()[:13], 16) / 16**13


class _Beginnings:
    """Digests of the users' turns up to each, and of the loose key, of all prompts."""

    def __init__(self, prompts: Sequence[Prompt]) -> None:
        keys, self._digests, self._owners = array("Q"), array("Q"), array("i")
        for index, prompt in enumerate(prompts):
            keys.append(short_digest(loose_key(prompt)))
            digests = [short_digest(text) for text in _user_turns(prompt)]
            self._digests.extend(digests)
            self._owners.extend([index] * len(digests))
        self.keys = np.array(keys, dtype=np.uint64)

    def common(self, prompts: Sequence[Prompt], which: Numbers) -> dict[str, int]:
        """Return the beginnings that too many of some prompts share, with their number."""
        are_counted = np.zeros(len(self.keys), dtype=bool)
        are_counted[which] = True
        owners = np.array(self._owners, dtype=np.int64)
        mask = are_counted[owners]
        values, where, counts = np.unique(
            np.array(self._digests, dtype=np.uint64)[mask], return_index=True, return_counts=True
        )
        found = {}
        for i in np.flatnonzero(counts > max(MIN_COMMON, TEMPLATE_SHARE * len(which))).tolist():
            turns = _user_turns(prompts[int(owners[mask][where[i]])])
            text = next(text for text in turns if short_digest(text) == values[i])
            found[text] = int(counts[i])
        return found


def _opening_and_text(prompt: Prompt, common: Mapping[str, int]) -> tuple[str, str]:
    """Return a prompt's first beginning of its own, and what near duplicates are searched by."""
    turns = _user_turns(prompt)
    opening = next((text for text in turns if text not in common), None)
    text = _distinctive(turns, common) or bare_text(
        " ".join(m["content"] for m in messages_of(prompt))
    )
    return loose_key(prompt) if opening is None else opening, text


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
