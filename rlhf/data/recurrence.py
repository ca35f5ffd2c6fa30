"""Replies that recur under many prompts, and pairs that contradict a near duplicate of theirs.

Both are left out only if the configuration says so, and never count as faulty rows.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from rlhf.config import DataConfig
from rlhf.data.collect import Ledger, Resolved, lead
from rlhf.data.duplicates import Shingles, bare_text, near_duplicates, width
from rlhf.data.records import LeftOutError
from rlhf.data.rows import Pair, Prompt, messages_of
from rlhf.data.split import Clusters

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
        clusters: Clusters of the pairs' prompts: those of one cluster count as one prompt.
        ledger: Receives the rows that are left out.
        note: Receives sentences for the user.
    """

    config: DataConfig
    clusters: Clusters
    ledger: Ledger
    note: Callable[[str], None]
    contradictions: int = 0
    """Pairs whose preference a near duplicate of theirs contradicts."""
    weights: dict[int, float] = field(default_factory=dict)
    """Weights of pairs that a near duplicate contradicts, by the id of the pair."""

    def filter(self, pairs: list[Resolved]) -> list[Resolved]:
        """Return the pairs without those to leave out, in their order."""
        bare = {reply: bare_text(reply) for item in pairs for reply in _replies(item.pair)}
        threshold = self.config.near_duplicates
        if threshold is None:
            groups = {text: text for text in bare.values()}
        else:
            groups = near_duplicates(bare.values(), threshold)
        kept = self._without_canned(pairs, bare, groups)
        if threshold is None:
            return kept
        return self._without_contradictions(kept, bare, groups, threshold)

    def _without_canned(
        self, pairs: list[Resolved], bare: dict[str, str], groups: dict[str, str]
    ) -> list[Resolved]:
        share = self.config.max_reply_share
        if share is None:
            return pairs
        names = [self.clusters.of(item.pair.prompt) for item in pairs]
        total = len(set(names))
        limit = max(MIN_RECURRENCE, share * total)
        counts = Counter(groups[bare[reply]] for item in pairs for reply in _replies(item.pair))
        uses: dict[str, dict[str, set[str]]] = defaultdict(lambda: defaultdict(set))
        for item, name in zip(pairs, names, strict=True):
            for reply in _replies(item.pair):
                text = bare[reply]
                # Most groups have one use: sets for all of them would take gigabytes.
                if counts[groups[text]] > limit and width(text) >= MIN_REPLY:
                    uses[groups[text]][text].add(name)
        recurring: dict[str, int] = {}
        for texts in uses.values():
            recurring |= _recurring(texts, limit, self.config.near_duplicates)
        lost = [any(bare[r] in recurring for r in _replies(item.pair)) for item in pairs]
        kept_files = self._files_to_keep(pairs, lost)
        kept = []
        for item, is_lost in zip(pairs, lost, strict=True):
            if not is_lost or item.origins[0].file in kept_files:
                kept.append(item)
                continue
            reply = max(_replies(item.pair), key=lambda reply: recurring.get(bare[reply], 0))
            reason = LeftOutError(
                "reply recurs under many prompts",
                f"under {recurring[bare[reply]]:,} of {total:,}: {reply[:60]!r}",
                "raise data.max_reply_share to train on it, or set it to none", is_choice=True,
            )  # fmt: skip
            self.ledger.lose(item.origins, reason, *_fields(item.pair))
        return kept

    def _files_to_keep(self, pairs: list[Resolved], lost: list[bool]) -> set[str]:
        """Return the files that would lose most of their pairs, and tell of them."""
        totals = Counter(item.origins[0].file for item in pairs)
        counts = Counter(pairs[i].origins[0].file for i, is_lost in enumerate(lost) if is_lost)
        files = {name for name, n in counts.items() if n > MAX_FILE_SHARE * totals[name]}
        for name in sorted(files):
            self.note(
                f"{name}: {counts[name]:,} of {totals[name]:,} pairs have a reply that recurs "
                "under many prompts, as labels do; they are trained on"
            )
        return files

    def _without_contradictions(
        self,
        pairs: list[Resolved],
        bare: dict[str, str],
        groups: dict[str, str],
        threshold: float,
    ) -> list[Resolved]:
        directions: dict[tuple[str, str, str], tuple[list[int], list[int]]] = {}
        for index, (pair, _) in enumerate(pairs):
            one, other = (groups[bare[reply]] for reply in _replies(pair))
            if one != other:
                key = (self.clusters.of(pair.prompt), min(one, other), max(one, other))
                directions.setdefault(key, ([], []))[one > other].append(index)
        shingles = Shingles()

        def are_near(one: str, other: str) -> bool:
            return shingles.is_similar(bare_text(one), bare_text(other), threshold)

        def contradict(one: int, other: int) -> bool:
            a, b = pairs[one].pair, pairs[other].pair
            return (
                are_near(a.chosen, b.rejected)
                and are_near(a.rejected, b.chosen)
                and are_near(_whole(a.prompt), _whole(b.prompt))
            )

        lost: set[int] = set()
        for sides in directions.values():
            if not all(sides):
                continue
            found = [
                [i for i in side if any(contradict(i, j) for j in others[:_MAX_COMPARED])]
                for side, others in (sides, sides[::-1])
            ]
            self.contradictions += sum(map(len, found))
            if self.config.contradictions != "keep":
                votes = [sum(len(pairs[i].origins) for i in side) for side in found]
                for side, own, against in zip(found, votes, votes[::-1], strict=True):
                    if own <= against:
                        lost.update(side)
                    elif self.config.contradictions == "downweight":
                        share = lead(own, against)
                        self.weights |= dict.fromkeys((id(pairs[i].pair) for i in side), share)
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
        for index in sorted(lost):
            self.ledger.lose(pairs[index].origins, reason, *_fields(pairs[index].pair))
        return [item for index, item in enumerate(pairs) if index not in lost]


def _recurring(texts: dict[str, set[str]], limit: float, threshold: float | None) -> dict[str, int]:
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


def _union(sets: Iterable[set[str]]) -> set[str]:
    return set().union(*sets)


def _replies(pair: Pair) -> tuple[str, str]:
    return pair.chosen, pair.rejected


def _fields(pair: Pair) -> tuple[Prompt, str, str]:
    return pair.prompt, pair.chosen, pair.rejected


def _whole(prompt: Prompt) -> str:
    return "\n".join(message["content"] for message in messages_of(prompt))
