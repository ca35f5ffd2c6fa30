"""Sample replies as cards, grouped by the reasons that they were chosen for."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import ConfigDict, TypeAdapter

from rlhf.report import replies
from rlhf.report.model import Sample
from rlhf.report.text import number_of, text_of
from rlhf.saved import read_saved

#: Reasons for which samples are chosen, in their order on the page.
KINDS = ("disagree", "lost", "changed")
#: Scorers of replies, as they are labelled.
_SCORERS = ("reward", "judge", "gold")
#: Orders of the list of all replies, as they are labelled; the first one is that at its opening.
LIST_ORDERS = {
    "lost": "worst first", "disagree": "judge and reward model disagree most",
    "members": "members disagree most", "champion": "worst against the champion",
    "longest": "longest first",
}  # fmt: skip
#: Replies on the page: the worst, and as many of each other order as `_OF_EACH`, of texts cut to so
#: many characters.
MAX_LISTED, _OF_EACH, LONGEST_LISTED = 200, 30, 2000


class _FurtherSample(Sample):
    """Further samples to a prompt, which stands in the row of the first one."""

    model_config = ConfigDict(extra="ignore")

    prompt: Any = None


class SavedSample(Sample):
    """A sample as an evaluation writes it: the prompt may be a chat."""

    model_config = ConfigDict(extra="ignore")

    prompt: Any
    more: tuple[_FurtherSample, ...] = ()


_SAVED = TypeAdapter(list[SavedSample])


class SampleWords(NamedTuple):
    """Headings of replies and of reasons; the defaults are those of a run."""

    before: str = "Before · SFT"
    after: str = "After · PPO"
    champion: str = "Champion"
    disagree: str = "Where the reward model and the judge disagree most"
    lost: str = "Where the policy lost most"
    changed: str = "Where it changed most"
    rest: str = "The first held-out prompts"


class Reply(NamedTuple):
    """One reply with its scores."""

    label: str
    text: str
    scores: tuple[tuple[str, float], ...]
    is_marked: bool = False
    """Whether it is the one that the card is about."""


class Card(NamedTuple):
    """A prompt with replies side by side."""

    prompt: str
    group: str | None
    replies: tuple[Reply, ...]


class SampleGroup(NamedTuple):
    """Cards that were chosen for one reason."""

    heading: str
    cards: tuple[Card, ...]


class SortedCards(NamedTuple):
    """Replies that a reader may sort: in each order a card has a rank."""

    orders: tuple[tuple[str, str], ...]
    """Name and label."""
    cards: tuple[tuple[Card, str], ...]
    """Each with its ranks as properties of a style, `--lost:0`."""
    of: int
    """Replies that the evaluation has."""


def sample_groups(samples: Sequence[Sample], words: SampleWords | None = None) -> list[SampleGroup]:
    """Group the samples by the reasons they were chosen for; a sample may have several."""
    used = words or SampleWords()
    chosen = [(getattr(used, kind), [s for s in samples if kind in s.kinds]) for kind in KINDS]
    groups = [(heading, own) for heading, own in chosen if own]
    if rest := [s for s in samples if not {*KINDS} & {*s.kinds}]:
        groups.append((used.rest if groups else "", rest))
    return [SampleGroup(heading, tuple(_card(s, used) for s in own)) for heading, own in groups]


def pair_cards(rows: Sequence[Mapping[str, Any]]) -> tuple[Card, ...]:
    """Return pairs with the margins of two reward models, as `rlhf compare` lists them."""
    return tuple(
        Card(
            text_of(row.get("prompt")),
            row.get("group"),
            (
                Reply("Preferred", str(row.get("chosen")), _margins(row), is_marked=True),
                Reply("Rejected", str(row.get("rejected")), ()),
            ),
        )
        for row in rows
    )


def read_samples(path: Path) -> list[dict[str, Any]]:
    """Read the sample replies of a policy's evaluation.

    Raises:
        DataError: They are damaged.
    """
    return read_saved(path, _SAVED)


def shown_samples(samples: Sequence[dict[str, Any]], count: int) -> list[Sample]:
    """Return the samples to show: the first ones, and as many of each kind."""
    shown: list[Sample] = []
    counts: Counter[str] = Counter()
    for row in samples:
        # A row without a kind is one of the first prompts, which are a kind of their own.
        kinds = row.get("kinds") or [""]
        if any(counts[kind] < count for kind in kinds):
            counts.update(kinds)
            known = {name: value for name, value in row.items() if name in Sample.model_fields}
            shown.append(Sample(**{**known, "prompt": text_of(row["prompt"])}))
    return shown


def listed_samples(rows: Sequence[dict[str, Any]]) -> list[Sample]:
    """Return the replies for the page's list, the worst first, with long texts cut."""
    every = replies.all_replies(rows)
    orders = [(name, replies.ordered(every, name)) for name in _measured(every)]
    chosen: dict[int, replies.Reply] = {}
    for name, own in orders:
        if name != "lost":
            chosen |= {id(reply): reply for reply in own[:_OF_EACH]}
    worst = next((own for name, own in orders if name == "lost"), every)
    for reply in worst:
        if len(chosen) >= MAX_LISTED:
            break
        chosen[id(reply)] = reply
    return [_sample(reply.row) for reply in worst if id(reply) in chosen]


def sorted_cards(samples: Sequence[Sample], of: int) -> SortedCards | None:
    """Lay out the list of replies; None if there are none.

    Args:
        samples: As `listed_samples` returns them.
        of: Replies that the evaluation has.
    """
    if not samples:
        return None
    every = replies.all_replies([sample.model_dump() for sample in samples])
    orders = [*_measured(every)]
    ranks: list[list[str]] = [[] for _ in every]
    places = {id(reply): place for place, reply in enumerate(every)}
    for name in orders:
        for rank, reply in enumerate(replies.ordered(every, name)):
            ranks[places[id(reply)]].append(f"--{name}:{rank}")
    words = SampleWords()
    return SortedCards(
        tuple((name, LIST_ORDERS[name]) for name in orders),
        tuple((_card(s, words), ";".join(own)) for s, own in zip(samples, ranks, strict=True)),
        max(of, len(samples)),
    )


def _measured(every: Sequence[replies.Reply]) -> list[str]:
    """Return the orders of `LIST_ORDERS` by which replies have figures."""
    return [name for name in LIST_ORDERS if replies.is_known(every, name)]


def _sample(row: Mapping[str, Any]) -> Sample:
    known = {name: value for name, value in row.items() if name in Sample.model_fields}
    texts = {name: _cut(row[name]) for name in replies.SIDES if row.get(name) is not None}
    # Cut texts are equally long, and would have no order by length.
    whole = len(row["after"]) if len(row["after"]) > LONGEST_LISTED else None
    more = {"prompt": _cut(text_of(row["prompt"])), "characters": whole, "kinds": ()}
    return Sample(**{**known, **texts, **more})


def _cut(text: str) -> str:
    more = len(text) - LONGEST_LISTED
    return text if more <= 0 else f"{text[:LONGEST_LISTED]}… ({more:,} more characters)"


def _card(sample: Sample, words: SampleWords) -> Card:
    texts = {"before": sample.before, "champion": sample.champion, "after": sample.after}
    return Card(
        sample.prompt,
        sample.group,
        tuple(
            Reply(getattr(words, side), text, _scores(sample, side), is_marked=side == "after")
            for side, text in texts.items()
            if text is not None
        ),
    )


def _scores(sample: Sample, side: str) -> tuple[tuple[str, float], ...]:
    scores = [(name, getattr(sample, f"{name}_{side}")) for name in _SCORERS]
    if side == "after":
        scores.append(("members differ", sample.disagreement))
    return tuple((name, score) for name, score in scores if score is not None)


def _margins(row: Mapping[str, Any]) -> tuple[tuple[str, float], ...]:
    margins = (("margin of a", row.get("margin_before")), ("of b", row.get("margin_after")))
    return tuple((name, x) for name, value in margins if (x := number_of(value)) is not None)
