"""Findings of an audit in words, and the thresholds above which they are warnings."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rlhf.data.audit import Annotators, Audit, Rate, Repeats
from rlhf.data.languages import UNDETERMINED

#: A rule that ignores content is a shortcut from this far off a coin, by the near end of its
#: interval. People agree with each other in 63 to 73 % of the pairs (Bai et al. 2022, "Training a
#: Helpful and Harmless Assistant", and Ouyang et al. 2022, InstructGPT): of the 13 to 23 points
#: that such labels are better than a coin, 5 are a fifth to two fifths.
SHORTCUT = 0.05
#: Least share of the pairs in which one reply alone has a format, for a warning: with fewer, even a
#: format that always wins moves accuracy by less than a point.
RARE = 0.02
#: Agreement of two votes whose interval lies below this is worse than that of the noisiest
#: well-known data, 63 % (Bai et al. 2022): e = 0.25.
LEAST_AGREEMENT = 0.63
#: Fewer pairs with several votes tell nothing: their interval is wider than 50 points.
LEAST_REPEATS = 10
#: One annotator with more than this share of the votes decides every majority.
MOST_VOTES = 0.5
#: Unless it is less than so many times an equal share: one of two has about a half anyway.
UNEQUAL = 1.5


@dataclass(frozen=True)
class Finding:
    """One sentence about the data."""

    level: Literal["warning", "note"]
    text: str


def find(audit: Audit) -> list[Finding]:
    """Return the findings of an audit, warnings first."""
    found = [
        *_length(audit),
        *_formats(audit),
        *_position(audit),
        *(_repeats(audit.repeats) if audit.repeats else ()),
        *(_annotators(audit.annotators) if audit.annotators else ()),
        *_languages(audit),
    ]
    return sorted(found, key=lambda finding: finding.level != "warning")


def percent_of(rate: Rate) -> str:
    """Return a share with its interval in whole per cent: `71 % (69–73)`."""
    low, high = f"{100 * rate.share_low:.0f}", f"{100 * rate.share_high:.0f}"
    return f"{100 * rate.share:.0f} % ({low if low == high else f'{low}–{high}'})"


def _is_shortcut(rate: Rate) -> bool:
    return rate.share_low > 0.5 + SHORTCUT or rate.share_high < 0.5 - SHORTCUT


def _length(audit: Audit) -> Iterator[Finding]:
    rate = audit.longer
    if rate is None:
        return
    if not _is_shortcut(rate):
        yield Finding("note", f"The longer reply is preferred in {percent_of(rate)} of the pairs.")
        return
    side, shown = ("longer", rate) if rate.share > 0.5 else ("shorter", _opposite(rate))
    yield Finding(
        "warning",
        f"The {side} reply is preferred in {percent_of(shown)} of the pairs: a reward model that "
        "counts characters would be right as often. Compare its accuracy with that.",
    )


def _formats(audit: Audit) -> Iterator[Finding]:
    for name, bias in audit.formats.items():
        if bias.wins is None or bias.wins.n < RARE * audit.formats_sample:
            continue
        if not _is_shortcut(bias.wins):
            continue
        wins = bias.wins.share > 0.5
        shown = bias.wins if wins else _opposite(bias.wins)
        text = (
            f"Of two replies of which one has {name}, the one {'with' if wins else 'without'} "
            f"is preferred in {percent_of(shown)} of {bias.wins.n:,} pairs"
        )
        if wins and bias.wins_not_longer:
            text += f"; where it is not the longer one, in {percent_of(bias.wins_not_longer)}"
        yield Finding("warning", f"{text}: a reward model can learn the format.")


def _position(audit: Audit) -> Iterator[Finding]:
    rate = audit.position
    if rate is None:
        return
    if not _is_shortcut(rate):
        yield Finding("note", f"The first of the two replies is preferred in {percent_of(rate)}.")
        return
    side, shown = ("first", rate) if rate.share > 0.5 else ("second", _opposite(rate))
    yield Finding(
        "warning",
        f"The {side} of the two replies is preferred in {percent_of(shown)} of the rows. If their "
        "order was drawn by lot, the judge prefers a position; if each column is one model, this "
        "is its lead; if neither, check the meaning of the labels.",
    )


def _repeats(repeats: Repeats) -> Iterator[Finding]:
    pairwise = repeats.pairwise
    if pairwise.n < LEAST_REPEATS:
        return
    if pairwise.share == 1:
        yield Finding(
            "note",
            f"All votes for the {pairwise.n:,} pairs with several agree: they may be copies of "
            "rows rather than votes, which say nothing of label noise.",
        )
        return
    level = "warning" if pairwise.share_high < LEAST_AGREEMENT else "note"
    yield Finding(
        level,
        f"Two votes for one pair agree in {percent_of(pairwise)} of {pairwise.n:,} pairs with "
        f"several: an estimated {100 * repeats.noise:.0f} % ({100 * repeats.noise_low:.0f}–"
        f"{100 * repeats.noise_high:.0f}) of single votes are wrong, and no reward model can agree "
        f"with more than {100 * (1 - repeats.noise):.0f} % of such votes.",
    )


def _annotators(annotators: Annotators) -> Iterator[Finding]:
    most = annotators.rows[0]
    share = most.votes / annotators.votes
    if annotators.count > 1 and share > MOST_VOTES and share >= UNEQUAL / annotators.count:
        yield Finding(
            "warning",
            f"One of {annotators.count:,} annotators, {most.name}, gave {100 * share:.0f} % of the "
            "votes: the reward model will learn one person's taste.",
        )
    else:
        yield Finding(
            "note",
            f"{annotators.count:,} annotators (column {annotators.column}) gave "
            f"{annotators.votes:,} votes; their effective number is {annotators.effective:.1f}.",
        )
    for row in annotators.rows:
        if row.agreement and row.agreement.share_high < 0.5 + SHORTCUT:
            yield Finding(
                "warning",
                f"Annotator {row.name} agrees with the others in {percent_of(row.agreement)} of "
                f"{row.agreement.n:,} votes, no more than a coin: check these votes.",
            )


def _languages(audit: Audit) -> Iterator[Finding]:
    shown = [(c, r) for c, r in audit.languages.items() if c != UNDETERMINED and r.share >= 0.01]
    if shown:
        listed = ", ".join(f"{code} {percent_of(rate)}" for code, rate in shown[:5])
        yield Finding("note", f"Languages of the prompts: {listed}.")


def _opposite(rate: Rate) -> Rate:
    return Rate(1 - rate.share, 1 - rate.share_high, 1 - rate.share_low, rate.n)
