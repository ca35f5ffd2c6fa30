"""Negatives: preferred replies made worse, which a reward model learns to reject.

Preferences hold few replies that nobody would write, and PPO finds those that a model of them
scores too high: sentences said again, sentences that belong elsewhere. Two models trained on such
preferences share the error, so that a judge would follow the reward model into it. Pairs of a
preferred reply and a worse version of it say what is missing in the data (Liu et al. 2024, "RRM:
Robust reward model training mitigates reward hacking", with the replies to other prompts).

Some versions are longer than the reply, some shorter and some neither: length says nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from random import Random

from rlhf.data.rows import Pair

#: Between two sentences; scripts without blanks have none between theirs.
SENTENCE_GAP = re.compile(r"(?<=[.!?])\s+|(?<=[。！？])\s*|\n+")
#: Most sentences that are added to a reply.
MOST_ADDED = 4
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
    usable = [pair for pair in pairs if pair.chosen.strip()]
    good: dict[str, set[str]] = {}
    for pair in pairs:
        good.setdefault(repr(pair.prompt), set()).add(pair.chosen.strip())
    made: set[tuple[str, str]] = set()
    negatives: list[Pair] = []
    for pair in _cycle(usable, round(share * len(pairs)), rng):
        for _ in range(_TRIES):
            text = rng.choice(_CHANGES)(pair.chosen, rng.choice(usable), pair, rng)
            key = (repr(pair.prompt), text.strip())
            if text.strip() and text.strip() not in good[key[0]] and key not in made:
                made.add(key)
                margin = None if pair.margin is None else 0.0
                negatives.append(replace(pair, rejected=text, margin=margin))
                break
    return negatives


def _cycle(pairs: Sequence[Pair], count: int, rng: Random) -> list[Pair]:
    """Return so many of the pairs, each as often as any other or once more."""
    chosen: list[Pair] = []
    while pairs and len(chosen) < count:
        chosen += rng.sample(pairs, min(len(pairs), count - len(chosen)))
    return chosen


def _repeated(reply: str, _: Pair, __: Pair, rng: Random) -> str:
    """Say some of a reply's sentences again."""
    sentences = _split(reply)[0]
    return _with(reply, [rng.choice(sentences) for _ in range(rng.randint(1, MOST_ADDED))], rng)


def _inserted(reply: str, other: Pair, pair: Pair, rng: Random) -> str:
    """Insert sentences of a reply to another prompt."""
    if other.prompt == pair.prompt:
        return ""
    theirs = _split(other.chosen)[0]
    count = min(rng.randint(1, MOST_ADDED), len(theirs))
    return _with(reply, rng.sample(theirs, count), rng)


def _replaced(reply: str, other: Pair, pair: Pair, rng: Random) -> str:
    """Replace a sentence by one of a reply to another prompt."""
    sentences, gaps = _split(reply)
    if other.prompt == pair.prompt or len(sentences) < 2:
        return ""
    sentences[rng.randrange(len(sentences))] = rng.choice(_split(other.chosen)[0])
    return _joined(sentences, gaps)


def _other_prompt(_: str, other: Pair, pair: Pair, __: Random) -> str:
    """Return a preferred reply to another prompt."""
    return other.chosen if other.prompt != pair.prompt else ""


def _truncated(reply: str, _: Pair, __: Pair, rng: Random) -> str:
    """Cut a reply behind a word that ends no sentence; one without blanks anywhere."""
    text = reply.strip()
    places = [
        m.start() for m in re.finditer(r"\s+", text) if text[m.start() - 1] not in ".!?。！？"
    ]
    if not places and not re.search(r"\s", text):
        places = [*range(1, len(text))]
    return text[: rng.choice(places)] if places else ""


Change = Callable[[str, Pair, Pair, Random], str]
#: Ways to make a reply worse: from the reply, some other pair and its own. An empty text is none.
_CHANGES: tuple[Change, ...] = (_repeated, _inserted, _replaced, _other_prompt, _truncated)


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
