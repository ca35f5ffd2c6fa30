"""Comparisons of all rows become pairs: votes are counted, scores are ranked, rows accounted for.

Rows that say the same are votes for one pair. Every row ends as used or as left out with a reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

from rlhf.config import DataConfig
from rlhf.data.records import Comparison, Converted, LeftOutError
from rlhf.data.rows import Demonstration, Pair, Prompt, SourceRow, messages_of

#: Most pairs from the scored replies to one prompt: a hundred replies would give 4,950.
MAX_RANKED_PAIRS = 64


#: Splits of the rows of `data.sft_source` and `data.prompts_source`.
OWN_SPLITS = ("sft", "prompts")


class Origin(NamedTuple):
    """Position of a row: its file's name in the source, and its line; its id.

    `part` is the number of its file in the reading: files of `data.source` and `data.eval_source`
    may have one name.
    """

    file: str
    line: int
    id: str = ""
    part: int = 0


#: Receives each row that is left out: its position, the reason, and its pair.
OnLeftOut = Callable[[Origin, LeftOutError, dict[str, Any]], None]


class Resolved(NamedTuple):
    """A pair, and the rows that it comes from."""

    pair: Pair
    origins: tuple[Origin, ...]

    def with_ids(self) -> Resolved:
        """Return the pair with the ids of its rows, each once."""
        ids = merged_ids([origin.id] for origin in self.origins)
        return Resolved(replace(self.pair, row_ids=ids), self.origins)


class Ledger:
    """Fate of every row whose comparisons were collected: used, or left out for a reason."""

    def __init__(self) -> None:
        self._used: dict[Origin, bool] = {}
        self._reasons: dict[Origin, tuple[LeftOutError, dict[str, Any]]] = {}

    def register(self, origin: Origin) -> None:
        """Add a row; rows are reported in the order of this."""
        self._used.setdefault(origin, False)

    def use(self, origins: Iterable[Origin]) -> None:
        """Count these rows as used, whatever else becomes of their comparisons."""
        self._used |= dict.fromkeys(origins, True)

    def lose(
        self, origins: Iterable[Origin], reason: LeftOutError, prompt: Prompt, *replies: str
    ) -> None:
        """Note why a comparison of these rows is not used; the first reason counts."""
        row: dict[str, Any] = {"prompt": prompt}
        row |= zip(("chosen", "rejected"), replies, strict=False)
        for origin in origins:
            self.register(origin)
            self._reasons.setdefault(origin, (reason, row))

    def reason(self, origin: Origin) -> LeftOutError | None:
        """Return the reason noted for a row, and forget the row."""
        self._used.pop(origin, None)
        return self._reasons.pop(origin, (None, {}))[0]

    def close(self, on_left_out: OnLeftOut) -> int:
        """Report each row of which nothing is used; return the number of those used."""
        for origin, used in self._used.items():
            if not used:
                on_left_out(origin, *self._reasons[origin])
        return sum(self._used.values())


@dataclass
class _Votes:
    """Rows that compare the same two replies: for `a` against `b`, and the other way."""

    for_a: list[Origin] = field(default_factory=list)
    for_b: list[Origin] = field(default_factory=list)
    margins: dict[Origin, float] = field(default_factory=dict)
    """By how much a row prefers its reply, where it says so."""

    def margin(self, origins: Sequence[Origin], others: Sequence[Origin] = ()) -> float | None:
        """Return the mean margin of rows that prefer a reply and of others that prefer the other.

        The others' count negative; None if no row has a margin.
        """
        values = [self.margins[o] for o in origins if o in self.margins]
        values += [-self.margins[o] for o in others if o in self.margins]
        return max(sum(values) / len(values), 0.0) if values else None


@dataclass
class _Replies:
    """Votes and scores of the replies to one prompt."""

    prompt: Prompt
    pairs: dict[tuple[str, str], _Votes] = field(default_factory=dict)
    """By the two replies, sorted."""
    scores: dict[str, list[tuple[float, Origin]]] = field(default_factory=dict)


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
    surplus: int = 0
    """Pairs of scored replies beyond MAX_RANKED_PAIRS of their prompt."""

    @property
    def agreement(self) -> float | None:
        """Share of the votes that agree with their pair's majority; None without repeats."""
        return self.agreeing / self.votes if self.votes else None


class Collector:
    """Collects the comparisons of rows, and resolves them to pairs."""

    def __init__(self, config: DataConfig, ledger: Ledger, totals: Totals) -> None:
        self.config = config
        self.ledger = ledger
        self.totals = totals
        self._replies: dict[str, _Replies] = {}
        self._are_thumbs = True
        """True as long as all scores are those of thumbs up and down."""

    def add(self, converted: Converted, origin: Origin) -> None:
        """Add what a row says.

        Raises:
            LeftOutError: None of it can be used.
        """
        self.ledger.register(origin)
        comparisons = []
        for item in converted.comparisons:
            if fault := _fault(item, self.config):
                self.ledger.lose([origin], fault, item.prompt, item.chosen, item.rejected)
            else:
                comparisons.append(item)
        rated = []
        for one in converted.rated:
            if fault := too_long(one.prompt, [one.reply], self.config):
                self.ledger.lose([origin], fault, one.prompt, one.reply)
            else:
                rated.append(one)
        if not comparisons and not rated:
            raise self.ledger.reason(origin) or LeftOutError("the row compares nothing")
        for item in comparisons:
            self._vote(item, origin)
        for one in rated:
            self._are_thumbs &= one.score in (-1.0, 0.0, 1.0)
            scores = self._of(one.prompt).scores.setdefault(one.reply, [])
            scores.append((one.score, origin))

    def resolve(self) -> list[Resolved]:
        """Return the pairs, in the order of their first rows."""
        pairs: list[Resolved] = []
        for replies in self._replies.values():
            pairs += self._voted(replies)
            if replies.scores:
                pairs += self._ranked(replies)
        return pairs

    def _of(self, prompt: Prompt) -> _Replies:
        return self._replies.setdefault(exact_key(prompt), _Replies(prompt))

    def _vote(self, comparison: Comparison, origin: Origin) -> None:
        a, b = sorted((comparison.chosen, comparison.rejected))
        votes = self._of(comparison.prompt).pairs.setdefault((a, b), _Votes())
        (votes.for_a if comparison.chosen == a else votes.for_b).append(origin)
        if comparison.margin is not None:
            votes.margins[origin] = comparison.margin

    def _voted(self, replies: _Replies) -> Iterator[Resolved]:
        for (a, b), votes in replies.pairs.items():
            counts = len(votes.for_a), len(votes.for_b)
            if sum(counts) > 1:
                self.totals.repeated += 1
                self.totals.votes += sum(counts)
                self.totals.agreeing += max(counts)
                alike = math.comb(counts[0], 2) + math.comb(counts[1], 2)
                self.totals.pairwise += alike / math.comb(sum(counts), 2)
            if self.config.votes == "keep":
                for one, other, origins in ((a, b, votes.for_a), (b, a, votes.for_b)):
                    for origin in origins:
                        margin = votes.margin([origin])
                        pair = Pair(replies.prompt, one, other, margin=margin)
                        yield Resolved(pair, (origin,))
            elif counts[0] == counts[1]:
                self.ledger.lose(
                    [*votes.for_a, *votes.for_b],
                    LeftOutError(
                        "votes for a pair are tied", f"{counts[0]} to {counts[1]}",
                        "set data.votes=keep to train on both", is_choice=True,
                    ),
                    replies.prompt, a, b,
                )  # fmt: skip
            elif counts[0] > counts[1]:
                margin = votes.margin(votes.for_a, votes.for_b)
                pair = Pair(replies.prompt, a, b, margin=margin, weight=self._weight(*counts))
                yield self._elected(pair, votes.for_a, votes.for_b)
            else:
                margin = votes.margin(votes.for_b, votes.for_a)
                pair = Pair(replies.prompt, b, a, margin=margin, weight=self._weight(*counts))
                yield self._elected(pair, votes.for_b, votes.for_a)

    def _weight(self, one: int, other: int) -> float | None:
        """Return the weight of a pair by the votes for either reply; None for 1."""
        if self.config.votes != "weight" or not one or not other:
            return None
        return lead(one, other)

    def _elected(self, pair: Pair, winners: list[Origin], losers: list[Origin]) -> Resolved:
        if losers:
            reason = LeftOutError(
                "outvoted by other rows of the pair", f"{len(losers)} to {len(winners)}",
                "set data.votes=keep to train on every vote", is_choice=True,
            )  # fmt: skip
            self.ledger.lose(losers, reason, pair.prompt, pair.rejected, pair.chosen)
        self.totals.merged += len(winners) - 1
        return Resolved(pair, tuple(winners))

    def _ranked(self, replies: _Replies) -> Iterator[Resolved]:
        origins = {reply: [o for _, o in scores] for reply, scores in replies.scores.items()}
        mean = {
            reply: sum(score for score, _ in scores) / len(scores)
            for reply, scores in replies.scores.items()
        }
        ranked = [
            (mean[one] - mean[other], one, other)
            for one, other in itertools.permutations(mean, 2)
            if mean[one] > mean[other]
        ]
        ranked.sort(key=lambda item: -item[0])
        self.totals.surplus += max(len(ranked) - MAX_RANKED_PAIRS, 0)
        for margin, one, other in ranked[:MAX_RANKED_PAIRS]:
            pair = Pair(replies.prompt, one, other, margin=margin)
            yield Resolved(pair, (*origins[one], *origins[other]))
        cure = "give two replies to each prompt, one better than the other"
        if self._are_thumbs:
            cure += "; or train SFT on those rated up, with data.sft_source, beside pairs"
        reason = LeftOutError(
            "no other reply to this prompt has a different score", cure=cure, is_choice=True
        )
        for reply, rows in origins.items():
            self.ledger.lose(rows, reason, replies.prompt, reply)


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


def merged_ids(ids: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Return ids of rows, each once, in their order."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(ids)))


def exact_key(prompt: Prompt) -> str:
    """Return a key that two prompts share only if they are equal; text equals a user's turn."""
    if isinstance(prompt, str):
        return f"user {len(prompt)} {prompt}"
    return joined((m["role"], m["content"]) for m in messages_of(prompt))


def joined(turns: Iterable[tuple[str, str]]) -> str:
    """Return one text for roles and contents that no other turns give."""
    return "".join(f"{role} {len(content)} {content}" for role, content in turns)


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
