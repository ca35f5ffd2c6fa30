"""Division of pairs among training, held-out and judge parts, and the leak check on the outcome."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from rlhf.config import DataConfig
from rlhf.data.duplicates import Numbers
from rlhf.data.pairs import Pairs, StoredPrompts, WrittenPairs, joined_pairs
from rlhf.data.records import LeftOutError
from rlhf.data.recurrence import Recurrence
from rlhf.data.split import MIN_PROMPTS, Clusters, find_clusters, group_texts, position
from rlhf.errors import DataError

#: Share of the prompts above which one cluster is reported.
LARGE_CLUSTER = 0.1
#: Fewer prompts in a cluster are not reported.
_SMALL_CLUSTER = 10
#: Share of the prompts for a judge, unless the configuration gives one, and the fewest clusters of
#: prompts for it: 100 pairs teach a judge little, and a tenth fewer cost small data most.
JUDGE_SHARE, JUDGE_MIN_PROMPTS = 0.1, 1000
#: The leak check's signatures differ from those of the clusters.
_CHECK_SEED = 1


@dataclass
class Partition:
    """Pairs by the part of the dataset that they belong to; no part has another's prompts."""

    pairs: Pairs
    """All pairs, also those that are left out."""
    in_train: Numbers
    """Indices of the pairs to train on, ascending."""
    in_held_out: Numbers
    in_judge: Numbers
    """Indices of the pairs to train an independent judge on."""
    prompts: tuple[int, int, int]
    """Number of different prompts of each part, where spacing and case make no difference."""
    has_judge: bool = False
    """Whether a share of the prompts was to go to the judge."""
    judge_note: str | None = None
    """What was decided about that where the configuration decides nothing."""
    clusters: int = 0
    """Clusters of prompts that were divided."""
    contradictions: int = 0
    """Pairs whose preference a near duplicate of theirs contradicts."""
    leaks: int = 0
    """Pairs left out by the leak check."""

    @property
    def train(self) -> Pairs:
        """Pairs to train on."""
        return self.pairs.select(self.in_train)

    @property
    def held_out(self) -> Pairs:
        """Pairs for the gates."""
        return self.pairs.select(self.in_held_out).once()

    @property
    def judge(self) -> Pairs:
        """Pairs to train an independent judge on."""
        return self.pairs.select(self.in_judge).once()

    def used(self) -> Pairs:
        """Return the pairs of all parts, in the order of the source."""
        parts = (self.in_train, self.in_held_out, self.in_judge)
        return self.pairs.select(np.sort(np.concatenate(parts)))

    def written(self) -> WrittenPairs:
        """Return the pairs to train on, as often as their `times` say, and those held out."""
        train = np.repeat(self.in_train, self.pairs.times[self.in_train])
        return WrittenPairs(self.pairs, np.append(train, self.in_held_out))


def partition(
    pairs: Pairs,
    own_held_out: Pairs,
    config: DataConfig,
    seed: int,
    note: Callable[[str], None],
) -> Partition:
    """Divide pairs by the clusters of their prompts; their ledger receives all that is left out.

    Args:
        pairs: Pairs of the source.
        own_held_out: Those of the source's own test part; without any, a share is held out.
        config: Shares, thresholds, largest number of pairs.
        seed: Of the choice of clusters.
        note: Receives sentences for the user.

    Raises:
        DataError: The disk is full.
    """
    division = _Division(joined_pairs(pairs, own_held_out), config, seed)
    clusters = division.clusters
    _report_clusters(clusters, note)
    recurrence = Recurrence(config, division.pairs, division.names, note)
    kept = recurrence.filter()
    if len(own_held_out):
        held_out = kept[kept >= len(pairs)]
        kept = kept[kept < len(pairs)]
        is_held_out = np.isin(division.names[kept], division.names[held_out])
        division.pairs.lose(_leak(), kept[is_held_out].tolist())
        train = division.sample(kept[~is_held_out])
        (judge_share, judge_note), rest = division.judge_share(train), 1.0
    else:
        kept = division.sample(kept)
        (judge_share, judge_note), rest = division.judge_share(kept), 1 - config.eval_fraction
        train, held_out = division.divide(kept, config.eval_fraction)
    judge = train[:0]
    if judge_share:
        # Of what is not held out, so that both are shares of all prompts.
        train, judge = division.divide(train, judge_share / rest, salt="judge\0")
    before = len(train) + len(judge)
    judge = division.without_leaks(judge, held_out)
    train = division.without_leaks(train, np.append(held_out, judge))
    sides = train, held_out, judge
    for side in sides:
        division.pairs.select(side).use()
    counts = [len(np.unique(division.places[side])) for side in sides]
    return Partition(
        division.pairs,
        *sides,
        prompts=(counts[0], counts[1], counts[2]),
        has_judge=judge_share > 0,
        judge_note=judge_note,
        clusters=len(np.unique(clusters.key_clusters)),
        contradictions=recurrence.contradictions,
        leaks=before - len(train) - len(judge),
    )


def check_sizes(
    parts: Partition, is_own: bool, left_out: str, config: DataConfig, main_cure: str = ""
) -> None:
    """Refuse data with too few prompts in a part.

    Args:
        parts: The pairs by part.
        is_own: Whether the held-out part is the source's own.
        left_out: Commonest reasons of rows that were left out, or "".
        config: Source and split.
        main_cure: Cure for the reason that leaves out most rows, or "".

    Raises:
        DataError: A part has fewer than MIN_PROMPTS different prompts.
    """
    counts = parts.prompts if parts.has_judge else parts.prompts[:2]
    if min(counts) >= MIN_PROMPTS:
        return
    total = f"{sum(counts)} different prompts with usable pairs"
    if is_own:
        total = f"{counts[0]} different prompts to train on and {counts[1]} held out"
    judge = f", and give a judge {MIN_PROMPTS}" if parts.has_judge else ""
    cure = main_cure or "give more rows"
    if sum(counts) >= MIN_PROMPTS * len(counts) and not is_own:
        total += f" in {parts.clusters} groups of near duplicates or turns of one conversation"
        cure = "give more different prompts, or set data.near_duplicates=none"
    raise DataError(
        f"data.source = {config.source!r}: {total} are too few to train on {MIN_PROMPTS} and hold "
        f"out {MIN_PROMPTS}{judge}; {cure} (left out: {left_out or 'none'})"
    )


def _report_clusters(clusters: Clusters, note: Callable[[str], None]) -> None:
    total = len(clusters.keys)
    for text, count in sorted(clusters.common.items(), key=lambda item: (-item[1], item[0]))[:3]:
        note(
            f"{count:,} of {total:,} prompts begin with {text[:40]!r}; they are not kept on one "
            "side of the split for that"
        )
    largest = clusters.largest()
    if largest > max(_SMALL_CLUSTER, LARGE_CLUSTER * total):
        note(
            f"{largest:,} of {total:,} prompts are near duplicates or turns of one conversation "
            "and stand on one side of the split"
        )


class _Division:
    """Pairs with the clusters of their prompts; parts of them are arrays of indices."""

    def __init__(self, pairs: Pairs, config: DataConfig, seed: int) -> None:
        self.pairs, self.config, self.seed = pairs, config, seed
        _, firsts, numbers = np.unique(pairs.prompt, return_index=True, return_inverse=True)
        self.clusters = find_clusters(
            StoredPrompts(pairs.spill, pairs.prompt_at[firsts]),
            config.near_duplicates,
            pairs.spill.folder,
        )
        self.names = self.clusters.numbers[numbers]
        """Cluster of each pair."""
        self.places = self.clusters.places[numbers]
        """Number of the loose key of each pair's prompt."""

    def divide(self, items: Numbers, share: float, salt: str = "") -> tuple[Numbers, Numbers]:
        """Return the pairs that stay, and those of a share of the clusters."""
        rotation = self.config.rotation
        salt = f"rotation {rotation}\0{salt}" if rotation else salt
        names = self.names[items]
        is_chosen = self.clusters.held_out(names, share, self.seed, salt)[names]
        return items[~is_chosen], items[is_chosen]

    def judge_share(self, items: Numbers) -> tuple[float, str | None]:
        """Return the share of the prompts for a judge, and a sentence if it is automatic."""
        share, prompts = self.config.judge_fraction, len(np.unique(self.names[items]))
        if share is not None:
            return share, None
        if prompts < JUDGE_MIN_PROMPTS:
            return 0.0, (
                f"no pairs for a judge of the policy: {prompts:,} different prompts are fewer than "
                f"{JUDGE_MIN_PROMPTS:,}; set data.judge_fraction to take a share of them all the "
                "same, or to 0"
            )
        if JUDGE_SHARE + self.config.eval_fraction >= 1:
            return 0.0, (
                "no pairs for a judge of the policy: data.eval_fraction = "
                f"{self.config.eval_fraction:g} leaves too few prompts; lower it"
            )
        return JUDGE_SHARE, (
            f"{JUDGE_SHARE:.0%} of the {prompts:,} different prompts are for the judge of the "
            "policy, and no other model is trained on them; set data.judge_fraction to take more "
            "or fewer"
        )

    def without_leaks(self, items: Numbers, others: Numbers) -> Numbers:
        """Return the pairs whose prompts are in no way near those of another part.

        Independent of the clusters: what they overlooked, or a fault of theirs, is found here.
        """
        if not len(items):
            return items
        used = np.unique(self.places[np.append(items, others)])
        digests = self.clusters.text_digests
        groups = np.zeros(len(digests), dtype=np.int64)
        if self.config.near_duplicates is None:
            groups[used] = np.unique(digests[used], return_inverse=True)[1]
        else:
            groups[used] = group_texts(
                self.clusters.texts.select(used), digests[used], self.config.near_duplicates,
                _CHECK_SEED, self.pairs.spill.folder,
            )  # fmt: skip
        are_leaked = np.isin(groups[self.places[items]], groups[self.places[others]])
        self.pairs.lose(_leak(), items[are_leaked].tolist())
        return items[~are_leaked]

    def sample(self, items: Numbers) -> Numbers:
        """Return at most `max_pairs` of the pairs, chosen independently of their order."""
        size = self.config.max_pairs
        if size is None or len(items) <= size:
            return items
        places = [position(self.seed, repr(self.pairs.pair(i))) for i in items.tolist()]
        is_chosen = np.zeros(len(items), dtype=bool)
        is_chosen[np.argsort(np.array(places), kind="stable")[:size]] = True
        reason = LeftOutError("not in the sample of data.max_pairs", is_choice=True)
        self.pairs.lose(reason, items[~is_chosen].tolist())
        return items[is_chosen]


def _leak() -> LeftOutError:
    return LeftOutError(
        "prompt is held out",
        "it, a near duplicate, or a turn of its conversation is in another part of the data",
        is_choice=True,
    )
