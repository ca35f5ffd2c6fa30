"""Negatives: preferred replies made worse, which a reward model learns to reject.

Preferences hold few replies that nobody would write, and PPO finds those that a model of them
scores too high: sentences said again, sentences that belong elsewhere. Two models trained on such
preferences share the error, so that a judge would follow the reward model into it. Pairs of a
preferred reply and a worse version of it say what is missing in the data (Liu et al. 2024, "RRM:
Robust reward model training mitigates reward hacking", with the replies to other prompts).

Some versions are longer than the reply, some shorter and some neither, so that no length is always
that of the worse one. More are longer (about 55 of 100): repetition is what PPO finds first.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from rlhf.data.chat import loose_key
from rlhf.data.rows import Pair

#: Between two sentences; scripts without blanks have none between theirs.
SENTENCE_GAP = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")
#: Most sentences that are added to a reply.
MOST_ADDED = 4
_Keyed = tuple[str, Pair]
#: Draws of a version before a pair is given up.
_TRIES = 8


def make_negatives(pairs: Sequence[Pair], share: float, seed: int) -> list[Pair]:
    """Return pairs whose rejected reply is a worse version of the chosen one.

    Args:
        pairs: Preferences.
        share: Negatives as a multiple of the pairs; those of a pair differ from each other.
        seed: Seeds which pairs, and what becomes of them.

    Returns:
        At most `share` times as many as there are pairs: fewer where the replies can't be made
        worse, as all are empty or one and the same. Groups and weights are those of the pairs, and
        a margin is 0, as nobody knows by how much a version is worse.
    """
    rng = Random(f"negatives/{seed}")
    # Prompts that differ in spacing and case alone are one: their replies fit each other.
    keyed = [(loose_key(pair.prompt), pair) for pair in pairs]
    good: dict[str, set[str]] = {}
    for key, pair in keyed:
        good.setdefault(key, set()).add(_bare(pair.chosen))
    usable = [(key, pair) for key, pair in keyed if pair.chosen.strip()]
    made: set[tuple[str, str]] = set()
    negatives: list[Pair] = []
    for key, pair in _cycle(usable, round(share * len(pairs)), rng):
        for _ in range(_TRIES):
            other_key, other = rng.choice(usable)
            change = rng.choice(_CHANGES)
            text = change(pair.chosen, other.chosen if other_key != key else "", rng)
            bare = _bare(text)
            if bare and bare not in good[key] and (key, bare) not in made:
                made.add((key, bare))
                margin = None if pair.margin is None else 0.0
                negatives.append(replace(pair, rejected=text, margin=margin))
                break
    return negatives


def _cycle(pairs: Sequence[_Keyed], count: int, rng: Random) -> list[_Keyed]:
    """Return so many of the pairs, each as often as any other or once more."""
    chosen: list[_Keyed] = []
    while pairs and len(chosen) < count:
        chosen += rng.sample(pairs, min(len(pairs), count - len(chosen)))
    return chosen


def _repeated(reply: str, _: str, rng: Random) -> str:
    """Say some of a reply's sentences again."""
    sentences = _split(reply)[0]
    return _with(reply, [rng.choice(sentences) for _ in range(rng.randint(1, MOST_ADDED))], rng)


def _inserted(reply: str, other: str, rng: Random) -> str:
    """Insert sentences of a reply to another prompt."""
    if not other:
        return ""
    theirs = _split(other)[0]
    return _with(reply, rng.sample(theirs, min(rng.randint(1, MOST_ADDED), len(theirs))), rng)


def _replaced(reply: str, other: str, rng: Random) -> str:
    """Replace a sentence by one of a reply to another prompt."""
    sentences, gaps = _split(reply)
    if not other or len(sentences) < 2:
        return ""
    sentences[rng.randrange(len(sentences))] = rng.choice(_split(other)[0])
    return _joined(sentences, gaps)


def _other_prompt(_: str, other: str, __: Random) -> str:
    """Return a preferred reply to another prompt."""
    return other


def _truncated(reply: str, _: str, rng: Random) -> str:
    """Cut a reply behind a word that ends no sentence; one without blanks anywhere."""
    text = reply.strip()
    places = [
        m.start() for m in re.finditer(r"\s+", text) if text[m.start() - 1] not in ".!?。！？"
    ]
    if not places and not re.search(r"\s", text):
        places = [*range(1, len(text))]
    return text[: rng.choice(places)] if places else ""


Change = Callable[[str, str, Random], str]
#: Ways to make a reply worse: from it and a reply to another prompt, or none. Empty texts are none.
_CHANGES: tuple[Change, ...] = (_repeated, _inserted, _replaced, _other_prompt, _truncated)


def _bare(text: str) -> str:
    """Return a text without what separates its words, which makes no reply worse."""
    return " ".join(text.split())


def _with(reply: str, sentences: Sequence[str], rng: Random) -> str:
    """Insert sentences at random places, with the gap of each place."""
    own, gaps = _split(reply)
    for sentence in sentences:
        place = rng.randint(1, len(own))
        gaps.insert(place - 1, gaps[min(place, len(gaps)) - 1] if gaps else " ")
        own.insert(place, sentence)
    return _joined(own, gaps)


def _split(reply: str) -> tuple[list[str], list[str]]:
    """Return a reply's sentences and the gaps between them."""
    text = reply.strip()
    ends = [m.span() for m in SENTENCE_GAP.finditer(text) if m.start() > 0 and m.end() < len(text)]
    starts = [0, *(end for _, end in ends)]
    stops = [*(start for start, _ in ends), len(text)]
    sentences = [text[a:b] for a, b in zip(starts, stops, strict=True)]
    return sentences, [text[a:b] for a, b in ends]


def _joined(sentences: Sequence[str], gaps: Sequence[str]) -> str:
    return sentences[0] + "".join(g + s for g, s in zip(gaps, sentences[1:], strict=True))
