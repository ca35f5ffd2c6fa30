"""Replies that recur under many prompts, and pairs that contradict a near duplicate of theirs.

Both are left out only if the configuration says so, and never count as faulty rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from rlhf.config import DataConfig
from rlhf.data.collect import lead
from rlhf.data.duplicates import Numbers, Shingles, bare_text, width
from rlhf.data.pairs import Pairs
from rlhf.data.records import LeftOutError
from rlhf.data.rows import Prompt, messages_of
from rlhf.data.spill import Spill, StoredTexts, runs, short_digest
from rlhf.data.split import group_texts

#: Shorter replies may recur: "Yes", "4", a classifier's labels. In characters (`width`).
MIN_REPLY = 20
#: Under so many prompts every reply may stand, however few prompts there are.
MIN_RECURRENCE = 10
#: A file of which more than this share would be left out holds replies like labels; it is kept.
MAX_FILE_SHARE = 0.5
#: Pairs of the other direction that a pair is compared with.
_MAX_COMPARED = 64


@dataclass
class Recurrence:
    """Finds recurring replies and contradictions among the pairs of a source.

    Args:
        config: Thresholds, and what becomes of the pairs found.
        pairs: The pairs, whose ledger receives the rows that are left out.
        clusters: Cluster of each pair's prompt, of shape (pairs,): those of one cluster count as
            one prompt.
        note: Receives sentences for the user.
    """

    config: DataConfig
    pairs: Pairs
    clusters: Numbers
    note: Callable[[str], None]
    contradictions: int = 0
    """Pairs whose preference a near duplicate of theirs contradicts."""

    def filter(self) -> Numbers:
        """Return the indices of the pairs without those to leave out, ascending.

        Raises:
            DataError: The disk is full.
        """
        kept = np.arange(len(self.pairs))
        threshold = self.config.near_duplicates
        digests = np.empty((len(kept), 2), dtype=np.uint64)
        places = np.empty((len(kept), 2), dtype=np.int64)
        store = Spill(self.pairs.spill.folder)
        for index in range(len(kept)):
            for side, reply in enumerate(self.pairs.replies(index)):
                text = bare_text(reply)
                digests[index, side] = short_digest(text)
                if threshold is not None:
                    places[index, side] = store.add(text)
        if threshold is None:
            groups = np.unique(digests.ravel(), return_inverse=True)[1]
        else:
            texts = StoredTexts(store, places.ravel())
            groups = group_texts(texts, digests.ravel(), threshold, folder=store.folder)
        groups = groups.reshape(-1, 2)
        if self.config.max_reply_share is not None:
            kept = self._without_canned(digests, groups, self.config.max_reply_share)
        return self._without_contradictions(kept, groups, threshold)

    def _without_canned(
        self, digests: NDArray[np.uint64], groups: Numbers, share: float
    ) -> Numbers:
        total = len(np.unique(self.clusters))
        recurring = self._find_recurring(digests, groups, max(MIN_RECURRENCE, share * total))
        counts = np.array(list(recurring), dtype=np.uint64)
        lost = np.isin(digests, counts)
        are_lost = lost[:, 0] | lost[:, 1]
        files = self._files_to_keep(are_lost)
        are_lost &= ~np.isin(self._files(), files)
        for index in np.flatnonzero(are_lost).tolist():
            own = [recurring.get(value, 0) for value in digests[index].tolist()]
            side = int(own[1] > own[0])
            reason = LeftOutError(
                "reply recurs under many prompts",
                f"under {own[side]:,} of {total:,}: {self.pairs.replies(index)[side][:60]!r}",
                "raise data.max_reply_share to train on it, or set it to none", is_choice=True,
            )  # fmt: skip
            self.pairs.lose(reason, [index])
        return np.flatnonzero(~are_lost)

    def _find_recurring(
        self, digests: NDArray[np.uint64], groups: Numbers, limit: float
    ) -> dict[int, int]:
        """Return the number of prompts of each bare reply that recurs, by its digest."""
        counts = np.bincount(groups.ravel())
        texts: dict[int, str] = {}
        uses: dict[int, dict[str, set[int]]] = {}
        # Most groups have one use: sets for all of them would take gigabytes.
        for place in np.flatnonzero(counts[groups.ravel()] > limit).tolist():
            index, side = divmod(place, 2)
            value = int(digests[index, side])
            if value not in texts:
                texts[value] = bare_text(self.pairs.replies(index)[side])
            text = texts[value]
            if width(text) >= MIN_REPLY:
                group = uses.setdefault(int(groups[index, side]), {})
                group.setdefault(text, set()).add(int(self.clusters[index]))
        recurring: dict[str, int] = {}
        for group in uses.values():
            recurring |= _recurring(group, limit, self.config.near_duplicates)
        return {value: recurring[text] for value, text in texts.items() if text in recurring}

    def _files(self) -> Numbers:
        """Return the number of the file of each pair's first row."""
        return self.pairs.ledger.files(self.pairs.rows[self.pairs.starts]).astype(np.int64)

    def _files_to_keep(self, are_lost: NDArray[np.bool_]) -> list[int]:
        """Return the files that would lose most of their pairs, and tell of them."""
        files = self._files()
        totals = np.bincount(files)
        counts = np.bincount(files[are_lost], minlength=len(totals))
        found = np.flatnonzero(counts > MAX_FILE_SHARE * totals).tolist()
        for name, file in sorted((self.pairs.ledger.file_name(file), file) for file in found):
            self.note(
                f"{name}: {counts[file]:,} of {totals[file]:,} pairs have a reply that recurs "
                "under many prompts, as labels do; they are trained on"
            )
        return found

    def _without_contradictions(
        self, kept: Numbers, groups: Numbers, threshold: float | None
    ) -> Numbers:
        lost: set[int] = set()
        for sides in self._opposed(kept, groups):
            found = self._contradicting(sides, threshold)
            self.contradictions += sum(map(len, found))
            if self.config.contradictions != "keep":
                votes = [int(self.pairs.votes[side].sum()) for side in found]
                for side, own, against in zip(found, votes, votes[::-1], strict=True):
                    if own <= against:
                        lost.update(side)
                    elif self.config.contradictions == "downweight":
                        # A pair of contested votes has a weight already; NaN is 1.
                        weights = np.nan_to_num(self.pairs.weight[side], nan=1.0)
                        self.pairs.weight[side] = weights * lead(own, against)
        if self.contradictions and not lost:
            self.note(
                f"{self.contradictions:,} pairs have a near duplicate that prefers the other reply "
                "(data.contradictions=majority leaves out the fewer ones, and downweight lets the "
                "others count less)"
            )
        reason = LeftOutError(
            "a near duplicate prefers the other reply",
            cure="set data.contradictions=keep to train on both", is_choice=True,
        )  # fmt: skip
        self.pairs.lose(reason, sorted(lost))
        return kept[~np.isin(kept, np.array(sorted(lost), dtype=np.int64))]

    def _opposed(self, kept: Numbers, groups: Numbers) -> Iterator[tuple[list[int], list[int]]]:
        """Yield pairs of one cluster and of two groups of replies, by the group preferred."""
        one, other = groups[kept].T
        kept, one, other = (values[one != other] for values in (kept, one, other))
        keys = self.clusters[kept], np.minimum(one, other), np.maximum(one, other)
        order = np.lexsort((kept, *keys))
        starts, ends = runs(np.rec.fromarrays([key[order] for key in keys]))
        is_greater = (one > other)[order]
        totals = np.append(0, np.cumsum(is_greater))
        greater = totals[ends] - totals[starts]
        for run in np.flatnonzero((greater > 0) & (greater < ends - starts)).tolist():
            part = slice(starts[run], ends[run])
            members = kept[order[part]]
            yield members[~is_greater[part]].tolist(), members[is_greater[part]].tolist()

    def _contradicting(
        self, sides: tuple[list[int], list[int]], threshold: float | None
    ) -> list[list[int]]:
        """Return the pairs of each side that are near duplicates of one of the other side.

        Without a threshold their letters and numbers must be equal.
        """
        shingles = Shingles()
        pairs = {index: self.pairs.pair(index) for side in sides for index in side[:_MAX_COMPARED]}

        def are_near(one: str, other: str) -> bool:
            one, other = bare_text(one), bare_text(other)
            return one == other or (
                threshold is not None and shingles.is_similar(one, other, threshold)
            )

        def contradict(one: int, other: int) -> bool:
            a, b = pairs.get(one) or self.pairs.pair(one), pairs[other]
            return (
                are_near(a.chosen, b.rejected)
                and are_near(a.rejected, b.chosen)
                and are_near(_whole(a.prompt), _whole(b.prompt))
            )

        return [
            [i for i in side if any(contradict(i, j) for j in others[:_MAX_COMPARED])]
            for side, others in (sides, sides[::-1])
        ]


def _recurring(texts: dict[str, set[int]], limit: float, threshold: float | None) -> dict[str, int]:
    """Return the number of prompts of each text of a group that recurs too often.

    A chain of similar texts may end far from where it began, so only texts that are similar to the
    commonest one count as its repeats.
    """
    rest = dict(sorted(texts.items(), key=lambda item: (-len(item[1]), item[0])))
    shingles = Shingles()
    recurring: dict[str, int] = {}
    while len(_union(rest.values())) > limit:
        first = next(iter(rest))
        alike = [
            text
            for text in rest
            if text == first or (threshold and shingles.is_similar(first, text, threshold))
        ]
        prompts = len(_union(rest[text] for text in alike))
        if prompts > limit:
            recurring |= dict.fromkeys(alike, prompts)
        for text in alike:
            del rest[text]
    return recurring


def _union(sets: Iterable[set[int]]) -> set[int]:
    return set().union(*sets)


def _whole(prompt: Prompt) -> str:
    return "\n".join(message["content"] for message in messages_of(prompt))
