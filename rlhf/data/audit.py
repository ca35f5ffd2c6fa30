"""Audit of preference pairs: what a reward model could learn from them besides quality.

All intervals are 95 % Wilson intervals (rlhf/statistics.py).
"""

from __future__ import annotations

import math
import random
import re
from array import array
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

import numpy as np

from rlhf.data.collect import Origin, Totals, exact_key
from rlhf.data.languages import count_languages
from rlhf.data.records import LeftOutError
from rlhf.data.rows import Pair, messages_of
from rlhf.data.spill import digest, number_digests
from rlhf.data.tallies import LengthCounts, Tallies
from rlhf.statistics import wilson_interval

#: Pairs whose replies are searched for lists, markdown and code: an interval of ±0.7 points.
FORMAT_SAMPLE = 20_000
#: Prompts whose language is guessed: an interval of ±3 points.
LANGUAGE_SAMPLE = 1_000
#: Quantiles of lengths.
QUANTILES = {"p5": 0.05, "median": 0.5, "p95": 0.95, "longest": 1.0}

Item = TypeVar("Item")

_ITEMS = re.compile(r"^[ \t]{0,8}(?:[-*+•]|\d{1,3}[.)])[ \t]+\S", re.MULTILINE)
_HEADING = re.compile(r"^#{1,6}[ \t]+\S", re.MULTILINE)
_BOLD = re.compile(r"\*\*[^\s*](?:[^*\n]{0,200}[^\s*])?\*\*")
_FENCE = re.compile(r"^[ \t]{0,3}(?:```|~~~)", re.MULTILINE)


@dataclass(frozen=True)
class Rate:
    """A share of n observations with its interval."""

    share: float
    share_low: float
    share_high: float
    n: int


@dataclass(frozen=True)
class FormatBias:
    """Counts of replies with one kind of format, and of their wins against replies without it."""

    chosen: float
    """Share of the chosen replies that have it."""
    rejected: float
    wins: Rate | None
    """Of the pairs in which one reply has it, those where that one is chosen."""
    wins_not_longer: Rate | None
    """The same among pairs where the reply that has it is not the longer one."""


@dataclass(frozen=True)
class Annotator:
    """Votes of one annotator."""

    name: str
    votes: int
    agreement: Rate | None
    """Mean share of the others' votes for the same pairs that agree; n is votes compared."""


@dataclass(frozen=True)
class Annotators:
    """Votes by annotator, the most votes first."""

    column: str
    count: int
    votes: int
    effective: float
    """Number of annotators with equal votes that would be as diverse: 1 / Σ pᵢ².

    Source: Hill 1973, eq. 3 for order 2 (the inverse of Simpson's index).
    """
    agreement: Rate | None
    """Probability that two annotators agree on a pair; each pair counts once, n is pairs."""
    rows: tuple[Annotator, ...]


@dataclass(frozen=True)
class Repeats:
    """Agreement and label noise, from pairs with several votes."""

    votes: int
    majority: float
    """Share of the votes that agree with their pair's majority."""
    pairwise: Rate
    """Probability that two votes for a pair agree; each pair counts once, n is pairs."""
    noise: float
    """Probability that a single vote is wrong."""
    noise_low: float
    noise_high: float


@dataclass(frozen=True)
class Lengths:
    """Distribution of lengths in characters."""

    quantiles: dict[str, int]
    histogram: dict[int, int]
    """Number of texts by the power of two that their length is below: 256 for 128 to 255."""


@dataclass(frozen=True)
class LeftOut:
    """Rows left out for one reason."""

    reason: str
    rows: int
    example: str
    """Position and detail of the first one."""
    cure: str
    is_choice: bool
    """True if nothing is wrong with the rows."""


@dataclass
class Evidence:
    """Counts taken while the rows were read, which the pairs alone do not hold."""

    tallies: Tallies = field(default_factory=Tallies)
    totals: Totals = field(default_factory=Totals)
    rows: int = 0
    left_out: tuple[LeftOut, ...] = ()


@dataclass(frozen=True)
class Audit:
    """Figures about preference pairs; None where the source can't tell."""

    pairs: int
    rows: int
    longer: Rate | None
    """Accuracy of choosing the longer reply, by characters; ties of length count a half."""
    same_length: int
    formats_sample: int
    """Pairs that `formats` is measured on."""
    formats: dict[str, FormatBias]
    position: Rate | None
    """How often the reply in the first of two columns is preferred."""
    annotators: Annotators | None
    repeats: Repeats | None
    slices: dict[str, dict[str, Rate]]
    """By column and value: accuracy of choosing the longer reply."""
    languages: dict[str, Rate]
    """Share of the prompts by ISO 639-1 code, on a sample."""
    lengths: dict[str, Lengths]
    left_out: tuple[LeftOut, ...]


def audit_pairs(
    pairs: Sequence[Pair], evidence: Evidence | None = None, *, with_languages: bool = True
) -> Audit:
    """Measure shortcuts, agreement, slices and lengths.

    Formats and languages are measured on a seeded sample; equal pairs give equal figures.

    Args:
        pairs: All pairs that are used, in any order.
        evidence: Counts over the rows that they were read from.
        with_languages: False saves 1 s.
    """
    evidence = evidence or Evidence()
    measured = _Measured(pairs)
    sample = _sample(pairs, FORMAT_SAMPLE)
    asked = _sample(measured.firsts, LANGUAGE_SAMPLE) if with_languages else []
    languages = count_languages([pairs[i].prompt for i in asked]) if asked else Counter[str]()
    return Audit(
        pairs=len(pairs),
        rows=evidence.rows,
        longer=_rate(measured.totals.longer, measured.totals.comparisons),
        same_length=measured.same_length,
        formats_sample=len(sample),
        formats={name: _format_bias(sample, has) for name, has in FORMATS.items()},
        position=_rate(evidence.tallies.positions["first"], evidence.tallies.positions.total()),
        annotators=_annotators(evidence.tallies),
        repeats=_repeats(evidence.totals),
        slices=_slices(measured.groups, evidence.tallies),
        languages={
            code: rate
            for code, count in sorted(languages.items(), key=lambda item: (-item[1], item[0]))
            if (rate := _rate(count, len(asked)))
        },
        lengths={name: _distribution(own) for name, own in measured.lengths.items() if len(own)},
        left_out=evidence.left_out,
    )


def label_noise(agreement: float) -> float:
    """Return the probability that a vote is wrong, from that with which two votes agree.

    Two votes for a pair agree if both are right or both are wrong: p = (1 − e)² + e², so
    e = (1 − √(2p − 1)) / 2. The model is Dawid and Skene 1979 with one error rate for all
    annotators and pairs ("one-coin"). Agreement below a half is no better than a coin: e = 0.5.
    """
    return (1 - math.sqrt(max(2 * agreement - 1, 0.0))) / 2


def left_out_reasons(
    counts: Sequence[tuple[str, int]], examples: Mapping[str, tuple[Origin, LeftOutError]]
) -> tuple[LeftOut, ...]:
    """Return the reasons for leaving rows out with an example and a cure each."""
    found = []
    for reason, rows in counts:
        origin, error = examples[reason]
        example = f"{origin.file}:{origin.line} {error.detail}".strip()
        found.append(LeftOut(reason, rows, example, error.shown_cure, error.is_choice))
    return tuple(found)


def has_list(text: str) -> bool:
    """Return whether a reply has two or more list items, bulleted or numbered."""
    first = _ITEMS.search(text)
    return first is not None and _ITEMS.search(text, first.end()) is not None


def has_markdown(text: str) -> bool:
    """Return whether a reply has a markdown heading or bold text."""
    return ("**" in text and _BOLD.search(text) is not None) or (
        "#" in text and _HEADING.search(text) is not None
    )


def has_code(text: str) -> bool:
    """Return whether a reply has a fenced code block."""
    return ("```" in text or "~~~" in text) and _FENCE.search(text) is not None


#: Formats that replies are searched for.
FORMATS: Mapping[str, Callable[[str], bool]] = {
    "lists": has_list,
    "headings or bold text": has_markdown,
    "code blocks": has_code,
}


def _rate(successes: float, n: int) -> Rate | None:
    """Return a share with its interval; None without observations."""
    return Rate(successes / n, *wilson_interval(successes, n), n) if n else None


class _Measured:
    """Lengths of all pairs and prompts; each pair is read once, as pairs may stand in a file."""

    def __init__(self, pairs: Sequence[Pair]) -> None:
        self.totals = LengthCounts()
        self.same_length = 0
        self.groups: dict[str, LengthCounts] = {}
        self.lengths = {name: array("q") for name in ("prompt", "chosen", "rejected")}
        prompts, all_lengths = bytearray(), array("q")
        for pair in pairs:
            self.totals.add(pair.chosen, pair.rejected)
            self.same_length += len(pair.chosen) == len(pair.rejected)
            if pair.group is not None:
                own = self.groups.setdefault(pair.group, LengthCounts())
                own.add(pair.chosen, pair.rejected)
            self.lengths["chosen"].append(len(pair.chosen))
            self.lengths["rejected"].append(len(pair.rejected))
            prompts += digest(exact_key(pair.prompt))
            all_lengths.append(sum(len(m["content"]) for m in messages_of(pair.prompt)))
        self.firsts: list[int] = number_digests(prompts)[1].tolist()
        """Index of the first pair of each prompt."""
        self.lengths["prompt"].extend(all_lengths[index] for index in self.firsts)


def _sample(items: Sequence[Item], size: int) -> Sequence[Item]:
    if len(items) <= size:
        return [*items]
    # Not every n-th: sources often hold a fixed number of pairs for each prompt.
    return [items[i] for i in sorted(random.Random(0).sample(range(len(items)), size))]


def _format_bias(pairs: Sequence[Pair], has: Callable[[str], bool]) -> FormatBias:
    counts: Counter[tuple[bool, bool]] = Counter()
    wins, compared = 0, 0
    for pair in pairs:
        chosen, rejected = has(pair.chosen), has(pair.rejected)
        counts[chosen, rejected] += 1
        if chosen != rejected:
            lead = len(pair.chosen) - len(pair.rejected)
            if (lead if chosen else -lead) <= 0:
                compared += 1
                wins += chosen
    won, lost = counts[True, False], counts[False, True]
    both, total = counts[True, True], max(len(pairs), 1)
    return FormatBias(
        (won + both) / total, (lost + both) / total, _rate(won, won + lost), _rate(wins, compared)
    )


def _repeats(totals: Totals) -> Repeats | None:
    pairwise = _rate(totals.pairwise, totals.repeated)
    if pairwise is None:
        return None
    # Agreement falls with noise: the ends of the interval change places.
    noise, high, low = map(label_noise, (pairwise.share, pairwise.share_low, pairwise.share_high))
    return Repeats(totals.votes, totals.agreeing / totals.votes, pairwise, noise, low, high)


def _annotators(tallies: Tallies) -> Annotators | None:
    votes = tallies.annotators.total()
    count = len(tallies.annotators)
    # A name for every row identifies rows, not people.
    if tallies.annotator_column is None or not 0 < count <= max(votes / 2, 1):
        return None
    compared: Counter[str] = Counter()
    shares: dict[str, float] = {}
    of_pairs: list[float] = []
    for ballot in tallies.ballots.values():
        if len({name for name, _ in ballot}) < 2:
            continue
        of_votes: list[float] = []
        for name, vote in ballot:
            others = [other == vote for someone, other in ballot if someone != name]
            of_votes.append(sum(others) / len(others))
            compared[name] += 1
            shares[name] = shares.get(name, 0.0) + of_votes[-1]
        of_pairs.append(sum(of_votes) / len(of_votes))
    ordered = sorted(tallies.annotators.items(), key=lambda item: (-item[1], item[0]))
    rows = tuple(
        Annotator(name, n, _rate(shares.get(name, 0.0), compared[name])) for name, n in ordered
    )
    return Annotators(
        column=tallies.annotator_column,
        count=count,
        votes=votes,
        effective=1 / sum((n / votes) ** 2 for n in tallies.annotators.values()),
        agreement=_rate(sum(of_pairs), len(of_pairs)),
        rows=rows,
    )


def _slices(groups: Mapping[str, LengthCounts], tallies: Tallies) -> dict[str, dict[str, Rate]]:
    columns = tallies.usable_slices()
    if groups:
        columns = {**columns, "group": groups}
    return {
        column: {
            name: rate
            for name, counts in sorted(values.items(), key=lambda i: (-i[1].comparisons, i[0]))
            if (rate := _rate(counts.longer, counts.comparisons))
        }
        for column, values in columns.items()
    }


def _distribution(lengths: Sequence[int]) -> Lengths:
    ordered = np.sort(np.array(lengths, dtype=np.int64))
    last = len(ordered) - 1
    # Of whole numbers below 2^53 the exponent is their number of bits.
    bits, counts = np.unique(np.frexp(ordered.astype(np.float64))[1], return_counts=True)
    return Lengths(
        {name: int(ordered[round(q * last)]) for name, q in QUANTILES.items()},
        {2 ** int(n): int(count) for n, count in zip(bits, counts, strict=True)},
    )
