"""Replies to a question: the best one, and ones with independent random mistakes."""

from __future__ import annotations

from random import Random

from rlhf.world import text

Question = tuple[str, str]
"""Topic and intent."""


def best_reply(rng: Random, question: Question) -> str:
    """Write a reply with nothing to improve."""
    parts = (
        rng.choice(text.OPENINGS),
        fact(rng, *question),
        rng.choice(text.STEPS),
        rng.choice(text.CLOSINGS),
    )
    return " ".join(parts)


def mixed_reply(rng: Random, question: Question) -> str:
    """Write a reply in which each aspect is good or bad independently of the others."""
    body = _answer(rng, question)
    if rng.random() < 0.18:
        body += rng.sample(text.FILLERS, rng.choice((1, 1, 2)))
    body += _step(rng)
    opening = _manner(rng, text.OPENINGS, text.RUDE_OPENINGS)
    closing = _manner(rng, text.CLOSINGS, text.RUDE_CLOSINGS)
    if body and rng.random() < 0.15:
        body.append(rng.choice(body))
    parts = opening + body + closing
    return " ".join(parts) if parts else rng.choice(text.VAGUE_STEPS)


def fact(rng: Random, topic: str, intent: str, detail: str | None = None) -> str:
    """Phrase the answer for a topic and intent, with the right detail by default."""
    detail = detail or text.right_detail(topic, intent)
    return rng.choice(text.FACTS[intent]).format(topic=topic, detail=detail)


def _answer(rng: Random, question: Question) -> list[str]:
    topic, intent = question
    choice = _choice(rng, right=0.45, detail=0.27, intent=0.14, topic=0.09, evasion=0.03, none=0.02)
    if choice == "none":
        return []
    if choice == "evasion":
        return [rng.choice(text.EVASIONS).format(topic=topic)]
    if choice == "topic":
        topic = _other(rng, text.TOPICS, topic)
    if choice == "intent":
        intent = _other(rng, text.INTENTS, intent)
    right = text.right_detail(topic, intent)
    wrong = _other(rng, text.DETAILS[intent], right)
    answer = [fact(rng, topic, intent, wrong if choice == "detail" else right)]
    if rng.random() < 0.1:
        further = _other(rng, text.INTENTS, intent)
        answer.append(fact(rng, topic, further))
    return answer


def _manner(rng: Random, polite: tuple[str, ...], rude: tuple[str, ...]) -> list[str]:
    choice = _choice(rng, polite=0.4, rude=0.3, none=0.3)
    if choice == "none":
        return []
    return [rng.choice(polite if choice == "polite" else rude)]


def _step(rng: Random) -> list[str]:
    choice = _choice(rng, concrete=0.35, vague=0.4, none=0.25)
    if choice == "none":
        return []
    if choice == "vague":
        return [rng.choice(text.VAGUE_STEPS)]
    # A second step lowers the gold score; a reward model can learn that only from examples.
    return rng.sample(text.STEPS, rng.choice((1, 1, 1, 2)))


def _other(rng: Random, values: tuple[str, ...], value: str) -> str:
    return rng.choice([candidate for candidate in values if candidate != value])


def _choice(rng: Random, **weights: float) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]
