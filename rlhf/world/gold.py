"""Gold score: the true quality of a reply, computed sentence by sentence.

The best reply scores 5.3:

| part | earns | costs |
|---|---|---|
| intent | 1.5 answers what was asked | -0.5 other intent, -1 other topic, -1.5 no answer |
| fact | 1.5 right detail | -1 wrong detail |
| extra | | -1.5 per further claim |
| opening, closing | 0.5 polite | -0.5 rude |
| step | 0.8 concrete next step | -0.8 vague, -0.4 none |
| concise | 0.5 to the point | -0.4 per filler sentence, -0.05 per word beyond 40 |
| repetition | | -0.5 per repeated part |
| readable | | -0.3 per sentence that is not one of the world's |
"""

from __future__ import annotations

import re
from functools import cache
from typing import NamedTuple

from rlhf.world import text

BEST = 5.3
"""Highest score."""
WORST = -15.0
"""Lower bound of all scores: every part has a floor."""
MAX_WORDS = 40
"""Longer replies lose points."""
_SENTENCE = re.compile(r"[^.!?]*[.!?]|[^.!?]+$")


class Claim(NamedTuple):
    """Content of a sentence: the `detail` that answers `intent` for `topic`."""

    topic: str
    intent: str
    detail: str


class Sentence(NamedTuple):
    """A parsed sentence: its role, its claim if it is a fact, its text for comparing."""

    role: str
    claim: Claim | None
    text: str


def gold(prompt: str, reply: str) -> float:
    """Score `reply` as an answer to `prompt`: the sum of all aspects, at most `BEST`."""
    return sum(gold_parts(prompt, reply).values())


def gold_parts(prompt: str, reply: str) -> dict[str, float]:
    """Score each aspect of `reply` as an answer to `prompt`; both may be any text."""
    parsed = read_reply(reply)
    roles = [sentence.role for sentence in parsed]
    claims = {sentence.claim for sentence in parsed if sentence.claim is not None}
    intent, fact = _answer_parts(read_question(prompt), claims)
    return {
        "intent": intent,
        "fact": fact,
        "extra": -1.5 * min(max(len(claims) - 1, 0), 2),
        "opening": _manner(parsed, "opening", 0),
        "closing": _manner(parsed, "closing", -1),
        "step": _step(roles),
        "concise": _concise(roles, len(reply.split())),
        "repetition": -0.5 * min(_repeats(parsed), 6),
        "readable": -0.3 * min(roles.count("unknown"), 10),
    }


def read_question(prompt: str) -> tuple[str, str] | None:
    """Return the topic and intent of a prompt's first known question, or None."""
    known = _known_questions()
    questions = (known[sentence] for sentence in sentences(prompt) if sentence in known)
    return next(questions, None)


def read_reply(reply: str) -> list[Sentence]:
    """Parse a reply into sentences; those not of the world have the role `unknown`."""
    known = _known_sentences()
    return [known.get(line, Sentence("unknown", None, line)) for line in sentences(reply)]


def sentences(words: str) -> list[str]:
    """Split into lower-case sentences with their end marks and single spaces."""
    parts = (" ".join(part.split()).lower() for part in _SENTENCE.findall(words))
    return [part for part in parts if part]


def _answer_parts(question: tuple[str, str] | None, claims: set[Claim]) -> tuple[float, float]:
    """Score intent and fact; both are 0 for a prompt without a known question."""
    if question is None:
        return 0.0, 0.0
    answers = {claim for claim in claims if (claim.topic, claim.intent) == question}
    if answers:
        right = answers == {Claim(*question, text.right_detail(*question))}
        return 1.5, 1.5 if right else -1.0
    if any(claim.topic == question[0] for claim in claims):
        return -0.5, 0.0
    return (-1.0 if claims else -1.5), 0.0


def _manner(parsed: list[Sentence], role: str, position: int) -> float:
    """Score politeness: a polite sentence at its `position`, a rude one anywhere."""
    if any(sentence.role == f"rude {role}" for sentence in parsed):
        return -0.5
    return 0.5 if parsed and parsed[position].role == role else 0.0


def _step(roles: list[str]) -> float:
    if "vague step" in roles:
        return -0.8
    return 0.8 if "step" in roles else -0.4


def _concise(roles: list[str], n_words: int) -> float:
    """Score brevity; a reply without any claim gets no credit for it."""
    cost = 0.4 * roles.count("filler") + 0.05 * max(0, n_words - MAX_WORDS)
    if cost == 0:
        return 0.5 if "fact" in roles else 0.0
    return max(-cost, -3.0)


def _repeats(parsed: list[Sentence]) -> int:
    """Count sentences with the meaning of an earlier one, in the same or other words."""
    meanings: set[object] = set()
    for sentence in parsed:
        same_role = sentence.role in {"opening", "closing", "step"}
        meanings.add(sentence.role if same_role else sentence.claim or sentence.text)
    return len(parsed) - len(meanings)


@cache
def _known_questions() -> dict[str, tuple[str, str]]:
    return {
        template.format(topic=topic).lower(): (topic, intent)
        for intent in text.INTENTS
        for template in text.QUESTIONS[intent] + text.NEW_QUESTIONS[intent]
        for topic in text.TOPICS
    }


@cache
def _known_sentences() -> dict[str, Sentence]:
    roles = {
        "opening": text.OPENINGS,
        "rude opening": text.RUDE_OPENINGS,
        "closing": text.CLOSINGS,
        "rude closing": text.RUDE_CLOSINGS,
        "step": text.STEPS,
        "vague step": text.VAGUE_STEPS,
        "filler": text.FILLERS,
    }
    known = {
        line.lower(): Sentence(role, None, line.lower())
        for role, lines in roles.items()
        for line in lines
    }
    for topic in text.TOPICS:
        for template in text.EVASIONS:
            line = template.format(topic=topic).lower()
            known[line] = Sentence("evasion", None, line)
        for intent in text.INTENTS:
            for detail in text.DETAILS[intent]:
                for template in text.FACTS[intent]:
                    line = template.format(topic=topic, detail=detail).lower()
                    known[line] = Sentence("fact", Claim(topic, intent, detail), line)
    return known
