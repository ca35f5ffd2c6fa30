"""Division of pairs among training, held-out and judge parts, and the leak check on the outcome."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from rlhf.config import DataConfig
from rlhf.data.collect import Ledger, Resolved
from rlhf.data.duplicates import near_duplicates
from rlhf.data.records import LeftOutError
from rlhf.data.recurrence import Recurrence
from rlhf.data.rows import Pair
from rlhf.data.split import (
    MIN_PROMPTS,
    Clusters,
    find_clusters,
    held_out_clusters,
    loose_key,
    position,
)
from rlhf.errors import DataError

#: Share of the prompts above which one cluster is reported.
LARGE_CLUSTER = 0.1
#: Fewer prompts in a cluster are not reported.
_SMALL_CLUSTER = 10
#: The leak check's signatures differ from those of the clusters.
_CHECK_SEED = 1


@dataclass
class Partition:
    """Pairs by the part of the dataset that they belong to; no part has another's prompts."""

    train: list[Pair] = field(default_factory=list)
    held_out: list[Pair] = field(default_factory=list)
    judge: list[Pair] = field(default_factory=list)
    """Pairs to train an independent judge on."""
    clusters: int = 0
    """Clusters of prompts that were divided."""
    contradictions: int = 0
    """Pairs whose preference a near duplicate of theirs contradicts."""
    leaks: int = 0
    """Pairs left out by the leak check."""
    weights: dict[int, float] = field(default_factory=dict)
    """Weights of pairs that a near duplicate contradicts, by the id of the pair."""


def partition(
    pairs: list[Resolved],
    own_held_out: list[Resolved],
    config: DataConfig,
    seed: int,
    ledger: Ledger,
    note: Callable[[str], None],
) -> Partition:
    """Divide pairs by the clusters of their prompts; the ledger receives all that is left out.

    Args:
        pairs: Pairs of the source.
        own_held_out: Those of the source's own test part; without any, a share is held out.
        config: Shares, thresholds, largest number of pairs.
        seed: Of the choice of clusters.
        ledger: Receives the rows that are used and left out.
        note: Receives sentences for the user.
    """
    clusters = find_clusters(
        (item.pair.prompt for item in (*pairs, *own_held_out)), config.near_duplicates
    )
    _report_clusters(clusters, note)
    recurrence = Recurrence(config, clusters, ledger, note)
    kept = recurrence.filter([*pairs, *own_held_out])
    if own_held_out:
        own = set(map(id, own_held_out))
        pairs = [item for item in kept if id(item) not in own]
        held_out = [item for item in kept if id(item) in own]
        names = {clusters.of(item.pair.prompt) for item in held_out}
        _lose([i for i in pairs if clusters.of(i.pair.prompt) in names], _leak(), ledger)
        pairs = [i for i in pairs if clusters.of(i.pair.prompt) not in names]
        train = _sample(pairs, config, seed, ledger)
    else:
        pairs = _sample(kept, config, seed, ledger)
        train, held_out = _divide(pairs, clusters, config.eval_fraction, seed)
    judge: list[Resolved] = []
    if config.judge_fraction:
        # Of what is not held out, so that both are shares of all prompts.
        share = config.judge_fraction / (1 if own_held_out else 1 - config.eval_fraction)
        train, judge = _divide(train, clusters, share, seed, salt="judge\0")
    before = len(train) + len(judge)
    judge = _without_leaks(judge, held_out, clusters, config, ledger)
    train = _without_leaks(train, [*held_out, *judge], clusters, config, ledger)
    for item in (*train, *held_out, *judge):
        ledger.use(item.origins)
    return Partition(
        [item.pair for item in train],
        [item.pair for item in held_out],
        [item.pair for item in judge],
        clusters=len(set(clusters.names.values())),
        contradictions=recurrence.contradictions,
        leaks=before - len(train) - len(judge),
        weights=recurrence.weights,
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
    sides = [parts.train, parts.held_out, *([parts.judge] if config.judge_fraction else [])]
    counts = [len({loose_key(pair.prompt) for pair in side}) for side in sides]
    if min(counts) >= MIN_PROMPTS:
        return
    total = f"{sum(counts)} different prompts with usable pairs"
    if is_own:
        total = f"{counts[0]} different prompts to train on and {counts[1]} held out"
    judge = f", and give a judge {MIN_PROMPTS}" if config.judge_fraction else ""
    cure = main_cure or "give more rows"
    if sum(counts) >= MIN_PROMPTS * len(sides) and not is_own:
        total += f" in {parts.clusters} groups of near duplicates or turns of one conversation"
        cure = "give more different prompts, or set data.near_duplicates=none"
    raise DataError(
        f"data.source = {config.source!r}: {total} are too few to train on {MIN_PROMPTS} and hold "
        f"out {MIN_PROMPTS}{judge}; {cure} (left out: {left_out or 'none'})"
    )


def _report_clusters(clusters: Clusters, note: Callable[[str], None]) -> None:
    total = len(clusters.names)
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


def _divide(
    items: list[Resolved], clusters: Clusters, share: float, seed: int, salt: str = ""
) -> tuple[list[Resolved], list[Resolved]]:
    """Return the pairs that stay, and those of a share of the clusters."""
    names = [clusters.of(item.pair.prompt) for item in items]
    openings = {name: clusters.openings[name] for name in names}
    chosen = held_out_clusters(openings, share, seed, salt)
    return (
        [item for item, name in zip(items, names, strict=True) if name not in chosen],
        [item for item, name in zip(items, names, strict=True) if name in chosen],
    )


def _without_leaks(
    items: list[Resolved],
    others: list[Resolved],
    clusters: Clusters,
    config: DataConfig,
    ledger: Ledger,
) -> list[Resolved]:
    """Return the pairs whose prompts are in no way near those of another part.

    Independent of the clusters: what they overlooked, or a fault of theirs, is found here.
    """
    if not items:
        return items
    texts = {id(item): clusters.text_of(item.pair.prompt) for item in (*items, *others)}
    groups = {text: text for text in texts.values()}
    if config.near_duplicates is not None:
        groups = near_duplicates(groups, config.near_duplicates, _CHECK_SEED)
    taken = {groups[texts[id(item)]] for item in others}
    leaked = [item for item in items if groups[texts[id(item)]] in taken]
    _lose(leaked, _leak(), ledger)
    return [item for item in items if groups[texts[id(item)]] not in taken]


def _sample(pairs: list[Resolved], config: DataConfig, seed: int, ledger: Ledger) -> list[Resolved]:
    """Return at most `max_pairs` of the pairs, chosen independently of their order."""
    if config.max_pairs is None or len(pairs) <= config.max_pairs:
        return pairs
    order = sorted(range(len(pairs)), key=lambda i: (position(seed, repr(pairs[i].pair)), i))
    sample = set(order[: config.max_pairs])
    reason = LeftOutError("not in the sample of data.max_pairs", is_choice=True)
    _lose([item for i, item in enumerate(pairs) if i not in sample], reason, ledger)
    return [item for i, item in enumerate(pairs) if i in sample]


def _leak() -> LeftOutError:
    return LeftOutError(
        "prompt is held out",
        "it, a near duplicate, or a turn of its conversation is in another part of the data",
        is_choice=True,
    )


def _lose(items: Sequence[Resolved], reason: LeftOutError, ledger: Ledger) -> None:
    for pair, origins in items:
        ledger.lose(origins, reason, pair.prompt, pair.chosen, pair.rejected)
