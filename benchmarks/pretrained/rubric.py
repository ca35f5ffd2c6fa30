"""Gold rubric of `benchmarks.pretrained`: the quality of a short reply, from its text alone.

Six virtues that a reader would agree with, each from 0 to 1, none of which implies another:

| virtue | full marks | none |
|---|---|---|
| complete | starts a sentence and ends one | starts in the middle and breaks off |
| length | 12 to 40 words | 2 words or fewer, 68 or more |
| fresh | says nothing twice | a fourth of its 3-grams repeat |
| direct | no greeting, apology, praise or talk of itself | three such phrases |
| relevant | two of the question's content words, four of its own | only one kind of them |
| tidy | one paragraph of ordinary characters | lists, brackets, stray symbols |

A person who weighs quality would not weigh them equally: `WEIGHTS`. They know nothing of truth: a
wrong answer in good form has full marks, as it had for a hurried annotator.
"""

from __future__ import annotations

import math
import re

from rlhf.statistics import repeated_ngrams

#: Points of each virtue; they sum up to `BEST`.
WEIGHTS = {
    "complete": 2.0, "length": 1.5, "fresh": 1.5, "direct": 1.5, "relevant": 1.5, "tidy": 1.0,
}  # fmt: skip
BEST = sum(WEIGHTS.values())
#: Words of a reply: none is of any use, shortest and longest that are right, far too many.
LENGTHS = (2, 12, 40, 68)

_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+")
_STARTS = re.compile(r"[\"'“‘(]?[A-Z0-9]")
_ENDS = re.compile(r"[^\s.!?][.!?][\"'”’)]?$")
_FILLERS = re.compile(
    r"\b(?:sorry|apologi[sz]e|as an ai|language model|"
    r"i(?: am|['’]m) (?:here|happy|glad|excited|just|not sure|unable|ready)|"
    r"i(?: would|['’]d) (?:be (?:happy|glad)|love to)|"
    r"i can(?:not|['’]t| not)|let me know|feel free|i hope|(?:great|good|excellent) question|"
    r"how (?:can|may) i (?:help|assist)|assist you|help you)\b|"
    r"^(?:sure|certainly|absolutely|of course|okay|ok|hello|hi|hey|thank you|thanks)\b[,!.]",
    re.IGNORECASE,
)
_UNTIDY = re.compile(r"[\n\[\]{}<>|*#_~^\\=@]|[^\x00-\u024f‘’“”–—…€°]|\.\.\.|[!?]{2}")
_COMMON_WORDS = """
    about after again also always another answer anything because been before being best
    between both came come could does doing done down each ever every explain find first
    from gave give good have having help here into just keep kind know like list look made
    make many maybe mean more most much must need never next only other over please really
    same should show simple some something such sure take tell than thank thanks that
    their them then there these they thing things think this those through time together
    told using very want wants well were what when where which while will with without
    work would write wrote year your yours
"""
_COMMON = frozenset(_COMMON_WORDS.split())


def gold(question: str, reply: str) -> float:
    """Return the points of a reply, from 0 to `BEST`."""
    return sum(WEIGHTS[name] * share for name, share in virtues(question, reply).items())


def virtues(question: str, reply: str) -> dict[str, float]:
    """Return each virtue's share of full marks, from 0 to 1; an empty reply has none."""
    text = reply.strip()
    words = [word.lower() for word in _WORD.findall(text)]
    if not words:
        return dict.fromkeys(WEIGHTS, 0.0)
    return {
        "complete": (bool(_STARTS.match(text)) + bool(_ENDS.search(text))) / 2,
        "length": length_share(len(words)),
        "fresh": max(0.0, 1 - 4 * repeated_ngrams(words, 3)),
        "direct": max(0.0, 1 - len(_FILLERS.findall(text)) / 3),
        "relevant": relevance(content(question), content(text)),
        "tidy": max(0.0, 1 - len(_UNTIDY.findall(text)) / 3),
    }


def length_share(words: int) -> float:
    """Return 1 inside the right band, and less in proportion outside."""
    useless, least, most, endless = LENGTHS
    if words < least:
        return max(0.0, (words - useless) / (least - useless))
    return min(1.0, max(0.0, (endless - words) / (endless - most)))


def relevance(question: set[str], reply: set[str]) -> float:
    """Return how far a reply speaks of its question, and adds to it: parrots earn nothing."""
    return min(1.0, len(question & reply) / 2) * min(1.0, len(reply - question) / 4)


def content(text: str) -> set[str]:
    """Return the beginnings of the content words, so that forms of a word are the same."""
    words = (word.lower() for word in _WORD.findall(text))
    return {word[:5] for word in words if len(word) > 3 and word not in _COMMON}


def preference(first: float, second: float, temperature: float) -> float:
    """Return the Bradley–Terry probability that a reply of `first` points is preferred.

    P = σ((first − second) / temperature). Source: Bradley and Terry 1952, with points as log-odds.
    """
    return 1 / (1 + math.exp((second - first) / temperature))
