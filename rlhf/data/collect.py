"""Comparisons of all rows become pairs: votes are counted, scores are ranked, rows accounted for.

Rows that say the same are votes for one pair. Every row ends as used or as left out with a reason.
Texts go to the spill of the ledger as they come, and digests decide which of them are equal.
"""

from __future__ import annotations

import itertools
import math
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from rlhf.config import DataConfig
from rlhf.data.ledger import Ledger, Origin
from rlhf.data.pairs import Ints, Pairs, merged_ids
from rlhf.data.records import Comparison, Converted, LeftOutError
from rlhf.data.rows import Demonstration, Pair, Prompt, SourceRow, joined, messages_of
from rlhf.data.spill import DIGEST_BYTES, digest, number_digests, runs

#: Most pairs from the scored replies to one prompt: a hundred replies would give 4,950.
MAX_RANKED_PAIRS = 64
_BEYOND = LeftOutError(f"beyond {MAX_RANKED_PAIRS} pairs of one row")

#: Splits of the rows of `data.sft_source` and `data.prompts_source`.
OWN_SPLITS = ("sft", "prompts")
#: Pairs of scored replies stand behind a prompt's other pairs.
_LAST = 2**62


@dataclass
class Totals:
    """Counts of a collection."""

    merged: int = 0
    """Rows that repeat another row's pair."""
    repeated: int = 0
    """Pairs with more than one vote."""
    votes: int = 0
    """Votes for those pairs."""
    agreeing: int = 0
    """Those of them that agree with the majority."""
    pairwise: float = 0.0
    """Sum over those pairs of the share of two votes drawn at random that agree."""

    @property
    def agreement(self) -> float | None:
        """Share of the votes that agree with their pair's majority; None without repeats."""
        return self.agreeing / self.votes if self.votes else None


class Collector:
    """Collects the comparisons of rows, and resolves them to pairs.

    Args:
        config: Longest texts, and what becomes of several votes.
        ledger: Receives the rows and, in its spill, their texts.
        totals: Receives counts.
    """

    def __init__(self, config: DataConfig, ledger: Ledger, totals: Totals) -> None:
        self.config = config
        self.ledger = ledger
        self.totals = totals
        # One entry for each comparison and rating, in the order of the rows. With 3 million of
        # them each byte of an entry is 3 MB.
        self._prompts, self._prompt_at = bytearray(), array("q")
        self._votes, self._ratings = _Votes(), _Ratings()
        self._are_thumbs = True
        """True as long as all scores are those of thumbs up and down."""

    def add(self, converted: Converted, origin: Origin) -> None:
        """Add what a row says.

        Raises:
            LeftOutError: None of it can be used.
        """
        row = self.ledger.register(origin)
        comparisons = []
        for item in converted.comparisons:
            if fault := _fault(item, self.config):
                self.ledger.lose([row], fault, item.prompt, item.chosen, item.rejected)
            else:
                comparisons.append(item)
        rated = []
        for one in converted.rated:
            if fault := too_long(one.prompt, [one.reply], self.config):
                self.ledger.lose([row], fault, one.prompt, one.reply)
            else:
                rated.append(one)
        if not comparisons and not rated:
            raise self.ledger.reason(row) or LeftOutError("the row compares nothing")
        self.ledger.skip_pairs(converted.skipped, _BEYOND, [row])
        places: dict[bytes | str, int] = {}  # a ranking repeats its prompt and its replies
        for item in comparisons:
            entry, key = self._enter(item.prompt, places)
            a, b = sorted((item.chosen, item.rejected))
            at = self._place(a, a, places), self._place(b, b, places)
            margin = math.nan if item.margin is None else item.margin
            self._votes.add(entry, digest(a, b, salt=key), at, item.chosen == a, margin, row)
        for one in rated:
            self._are_thumbs &= one.score in (-1.0, 0.0, 1.0)
            entry, _ = self._enter(one.prompt, places)
            at = self._place(one.reply, one.reply, places)
            self._ratings.add(entry, digest(one.reply), at, one.score, row)

    def resolve(self) -> Pairs:
        """Return the pairs, in the order of their first rows."""
        numbers, firsts = number_digests(self._prompts)
        prompt_at = np.array(self._prompt_at, dtype=np.int64)[firsts]
        found = _Columns()
        self._add_voted(found, numbers, prompt_at)
        self._add_ranked(found, numbers, prompt_at)
        return found.pairs(self.ledger, prompt_at)

    def _enter(self, prompt: Prompt, places: dict[bytes | str, int]) -> tuple[int, bytes]:
        key = digest(exact_key(prompt))
        self._prompts += key
        self._prompt_at.append(self._place(key, prompt, places))
        return len(self._prompt_at) - 1, key

    def _place(self, key: bytes | str, value: Prompt, places: dict[bytes | str, int]) -> int:
        at = places.get(key)
        if at is None:
            at = places[key] = self.ledger.spill.add(value)
        return at

    def _add_voted(self, found: _Columns, prompts: Ints, prompt_at: Ints) -> None:
        votes = self._votes
        groups, firsts = number_digests(votes.keys)
        entries = np.array(votes.entry, dtype=np.int64)
        counts = np.bincount(groups, minlength=len(firsts))
        found.extend(votes, prompts[entries], firsts[counts == 1])
        repeated = np.flatnonzero(counts[groups] > 1)
        repeated = repeated[np.argsort(groups[repeated], kind="stable")]
        starts, ends = runs(groups[repeated])
        first = repeated[starts]
        for run in np.lexsort((first, prompts[entries[first]])):
            same = repeated[starts[run] : ends[run]].tolist()
            number = int(prompts[entries[same[0]]])
            for one, other, margin, weight, rows in self._outcome(same, int(prompt_at[number])):
                found.add(number, same[0], one, other, margin, rows, weight)

    def _outcome(
        self, same: list[int], prompt_at: int
    ) -> Iterator[tuple[int, int, float, float, list[int]]]:
        """Yield the pairs of several votes for one: chosen, rejected, margin, weight, rows."""
        votes = self._votes
        a, b = votes.a_at[same[0]], votes.b_at[same[0]]
        for_a = [votes.row[i] for i in same if votes.for_a[i]]
        for_b = [votes.row[i] for i in same if not votes.for_a[i]]
        margins = {votes.row[i]: m for i in same if not math.isnan(m := votes.margin[i])}
        self.totals.repeated += 1
        self.totals.votes += len(same)
        self.totals.agreeing += max(len(for_a), len(for_b))
        alike = math.comb(len(for_a), 2) + math.comb(len(for_b), 2)
        self.totals.pairwise += alike / math.comb(len(same), 2)
        if self.config.votes == "keep":
            for one, other, rows in ((a, b, for_a), (b, a, for_b)):
                for row in rows:
                    yield one, other, _mean_margin(margins, [row]), math.nan, [row]
            return
        if len(for_a) == len(for_b):
            reason = LeftOutError(
                "votes for a pair are tied", f"{len(for_a)} to {len(for_b)}",
                "set data.votes=keep to train on both", is_choice=True,
            )  # fmt: skip
            self.ledger.lose_stored([*for_a, *for_b], reason, (prompt_at, a, b))
            return
        one, other, winners, losers = (
            (a, b, for_a, for_b) if len(for_a) > len(for_b) else (b, a, for_b, for_a)
        )
        if losers:
            reason = LeftOutError(
                "outvoted by other rows of the pair", f"{len(losers)} to {len(winners)}",
                "set data.votes=keep to train on every vote", is_choice=True,
            )  # fmt: skip
            self.ledger.lose_stored(losers, reason, (prompt_at, other, one))
        self.totals.merged += len(winners) - 1
        weight = math.nan
        if self.config.votes == "weight" and losers:
            weight = lead(len(winners), len(losers))
        yield one, other, _mean_margin(margins, winners, losers), weight, winners

    def _add_ranked(self, found: _Columns, prompts: Ints, prompt_at: Ints) -> None:
        numbers = prompts[np.array(self._ratings.entry, dtype=np.int64)]
        order = np.argsort(numbers, kind="stable")
        for start, end in zip(*runs(numbers[order]), strict=True):
            same = order[start:end].tolist()
            number = int(numbers[same[0]])
            for one, other, margin, rows in self._ranked(same, int(prompt_at[number])):
                # However many rows rate the two replies, their means say one thing.
                found.add(number, _LAST, one, other, margin, rows, votes=1)

    def _ranked(
        self, same: list[int], prompt_at: int
    ) -> Iterator[tuple[int, int, float, list[int]]]:
        """Yield the pairs of the scored replies to one prompt: chosen, rejected, margin, rows."""
        ratings = self._ratings
        replies: dict[bytes, list[int]] = {}
        for i in same:
            replies.setdefault(ratings.key(i), []).append(i)
        at = {key: ratings.at[items[0]] for key, items in replies.items()}
        rows = {key: [ratings.row[i] for i in items] for key, items in replies.items()}
        mean = {
            key: sum(ratings.score[i] for i in items) / len(items) for key, items in replies.items()
        }
        ranked = [
            (mean[one] - mean[other], one, other)
            for one, other in itertools.permutations(mean, 2)
            if mean[one] > mean[other]
        ]
        ranked.sort(key=lambda item: -item[0])
        self.ledger.skip_pairs(
            max(len(ranked) - MAX_RANKED_PAIRS, 0),
            LeftOutError(f"beyond {MAX_RANKED_PAIRS} pairs of the prompt's rated replies"),
            [ratings.row[i] for i in same],
        )
        for margin, one, other in ranked[:MAX_RANKED_PAIRS]:
            yield at[one], at[other], margin, [*rows[one], *rows[other]]
        cure = "give two replies to each prompt, one better than the other"
        if self._are_thumbs:
            cure += "; or train SFT on those rated up, with data.sft_source, beside pairs"
        reason = LeftOutError(
            "no other reply to this prompt has a different score", cure=cure, is_choice=True
        )
        for key, own in rows.items():
            self.ledger.lose_by_default(own, reason, (prompt_at, at[key]))


class _Votes:
    """Columns of comparisons, each of two replies a and b that are sorted."""

    def __init__(self) -> None:
        self.keys = bytearray()
        """Digests of prompt and replies."""
        self.entry, self.a_at, self.b_at = array("i"), array("q"), array("q")
        self.for_a, self.margin, self.row = bytearray(), array("d"), array("i")

    def add(
        self, entry: int, key: bytes, at: tuple[int, int], for_a: bool, margin: float, row: int
    ) -> None:
        self.keys += key
        self.entry.append(entry)
        self.a_at.append(at[0])
        self.b_at.append(at[1])
        self.for_a.append(for_a)
        self.margin.append(margin)
        self.row.append(row)


class _Ratings:
    """Columns of scored replies."""

    def __init__(self) -> None:
        self._keys = bytearray()
        self.entry, self.at, self.score, self.row = array("i"), array("q"), array("d"), array("i")

    def add(self, entry: int, key: bytes, at: int, score: float, row: int) -> None:
        self._keys += key
        self.entry.append(entry)
        self.at.append(at)
        self.score.append(score)
        self.row.append(row)

    def key(self, index: int) -> bytes:
        """Return the digest of a reply."""
        return bytes(self._keys[index * DIGEST_BYTES : (index + 1) * DIGEST_BYTES])


class _Columns:
    """Columns of pairs, in any order until they are done."""

    def __init__(self) -> None:
        self._prompt, self._order = array("i"), array("q")
        self._chosen, self._rejected = array("q"), array("q")
        self._margin, self._weight = array("d"), array("d")
        self._votes, self._counts, self._rows = array("i"), array("i"), array("i")

    def add(
        self, prompt: int, order: int, chosen: int, rejected: int, margin: float, rows: list[int],
        weight: float = math.nan, votes: int | None = None,
    ) -> None:  # fmt: skip
        """Add a pair; those of a prompt are sorted by `order`. Without `votes` each row is one."""
        self._prompt.append(prompt)
        self._order.append(order)
        self._chosen.append(chosen)
        self._rejected.append(rejected)
        self._margin.append(margin)
        self._weight.append(weight)
        self._votes.append(len(rows) if votes is None else votes)
        self._counts.append(len(rows))
        self._rows.extend(rows)

    def extend(self, votes: _Votes, prompts: Ints, which: Ints) -> None:
        """Add pairs of one vote each.

        Args:
            votes: The votes.
            prompts: Number of the prompt of each vote.
            which: Indices of the votes to add.
        """
        a, b = np.array(votes.a_at, dtype=np.int64)[which], np.array(votes.b_at, np.int64)[which]
        for_a = np.frombuffer(votes.for_a, dtype=np.bool_)[which]
        margin = np.maximum(np.array(votes.margin, dtype=np.float64)[which], 0.0)
        for column, values in (
            (self._prompt, prompts[which]),
            (self._order, which),
            (self._chosen, np.where(for_a, a, b)),
            (self._rejected, np.where(for_a, b, a)),
            (self._margin, margin),
            (self._weight, np.full(len(which), math.nan)),
            (self._votes, np.ones(len(which))),
            (self._counts, np.ones(len(which))),
            (self._rows, np.array(votes.row, dtype=np.int32)[which]),
        ):
            column.frombytes(values.astype(column.typecode).tobytes())

    def pairs(self, ledger: Ledger, prompt_at: Ints) -> Pairs:
        """Return the pairs, those of a prompt together, prompts in the order of their numbers."""
        prompt = np.array(self._prompt, dtype=np.int32)
        counts = np.array(self._counts, dtype=np.int32)
        found = Pairs(
            ledger,
            prompt=prompt,
            prompt_at=prompt_at[prompt],
            chosen_at=np.array(self._chosen, dtype=np.int64),
            rejected_at=np.array(self._rejected, dtype=np.int64),
            margin=np.array(self._margin, dtype=np.float64),
            weight=np.array(self._weight, dtype=np.float64),
            votes=np.array(self._votes, dtype=np.int32),
            starts=np.cumsum(counts, dtype=np.int64) - counts,
            counts=counts,
            times=np.ones(len(prompt), dtype=np.int32),
            rows=np.array(self._rows, dtype=np.int32),
        )
        return found.select(np.lexsort((np.array(self._order, dtype=np.int64), prompt)))


def _mean_margin(
    margins: dict[int, float], rows: Sequence[int], others: Sequence[int] = ()
) -> float:
    """Return the mean margin of rows that prefer a reply and of others that prefer the other.

    The others' count negative; NaN if no row has a margin.
    """
    values = [margins[row] for row in rows if row in margins]
    values += [-margins[row] for row in others if row in margins]
    return max(sum(values) / len(values), 0.0) if values else math.nan


def demonstrations(pairs: list[Pair]) -> list[Demonstration]:
    """Return each prompt's best reply, once: one that won, and lost to no other reply."""
    won: dict[str, dict[str, int]] = {}
    lost: dict[str, set[str]] = {}
    prompts: dict[str, Prompt] = {}
    for pair in pairs:
        key = exact_key(pair.prompt)
        prompts.setdefault(key, pair.prompt)
        wins = won.setdefault(key, {})
        wins[pair.chosen] = wins.get(pair.chosen, 0) + 1
        lost.setdefault(key, set()).add(pair.rejected)
    ids: dict[tuple[str, str], list[tuple[str, ...]]] = {}
    for pair in pairs:
        ids.setdefault((exact_key(pair.prompt), pair.chosen), []).append(pair.row_ids)
    found = []
    for key, prompt in prompts.items():
        unbeaten = [reply for reply in won[key] if reply not in lost[key]]
        if unbeaten:
            best = max(unbeaten, key=won[key].__getitem__)
            found.append(Demonstration(prompt, best, merged_ids(ids[key, best])))
    return found


def lead(one: int, other: int) -> float:
    """Return the lead of the majority as a share of the votes, |a − b| / (a + b).

    A loss with this weight has, where both replies have the same reward, the gradient of the
    cross-entropy with the shares of the votes as soft label: w · (σ(0) − 1) = σ(0) − a / (a + b)
    (Christiano et al. 2017, section 2.2.3, takes these shares as label).
    """
    return abs(one - other) / (one + other)


def source_rows(**splits: Iterable[Origin]) -> list[SourceRow]:
    """Return the rows that are used in each split, in the order of the source."""
    found = {
        (split in OWN_SPLITS, origin.part, origin.line, split): origin
        for split, origins in splits.items()
        for origin in origins
    }
    return [
        # A file's name may hold bytes that are no UTF-8.
        SourceRow(o.id, o.file.encode("utf-8", "backslashreplace").decode(), o.line, key[-1])
        for key, o in sorted(found.items())
    ]


def exact_key(prompt: Prompt) -> str:
    """Return a key that two prompts share only if they are equal; text equals a user's turn."""
    if isinstance(prompt, str):
        return f"user {len(prompt)} {prompt}"
    return joined((m["role"], m["content"]) for m in messages_of(prompt))


def too_long(prompt: Prompt, replies: list[str], config: DataConfig) -> LeftOutError | None:
    """Return the reason for leaving out a prompt or reply that is too long, if one is."""
    length = sum(len(m["content"]) for m in messages_of(prompt))
    if length > config.max_prompt_chars:
        return LeftOutError(
            "prompt too long", f"{length:,} characters", "raise data.max_prompt_chars"
        )
    longest = max(map(len, replies))
    if longest > config.max_reply_chars:
        return LeftOutError(
            "reply too long", f"{longest:,} characters", "raise data.max_reply_chars"
        )
    return None


def _fault(comparison: Comparison, config: DataConfig) -> LeftOutError | None:
    if comparison.chosen.strip() == comparison.rejected.strip():
        return LeftOutError("both replies are the same", cure="remove the row", is_choice=True)
    return too_long(comparison.prompt, [comparison.chosen, comparison.rejected], config)
