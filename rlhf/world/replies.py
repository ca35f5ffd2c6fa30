"""Write replies: the best one to a question, and ones that go wrong in independent ways."""

from __future__ import annotations

from random import Random

from rlhf.world import text

Question = tuple[str, str]
"""The topic and the intent that a prompt asks for."""


def _other(rng: Random, values: tuple[str, ...], value: str) -> str:
    return rng.choice([candidate for candidate in values if candidate != value])


def _kind(rng: Random, **weights: float) -> str:
    return rng.choices(list(weights), list(weights.values()))[0]


def fact(rng: Random, topic: str, intent: str, detail: str | None = None) -> str:
    """Phrase the answer for a topic and intent; the right one unless a `detail` is given."""
    detail = detail or text.right_detail(topic, intent)
    return rng.choice(text.FACTS[intent]).format(topic=topic, detail=detail)


def best_reply(rng: Random, question: Question) -> str:
    """Write a reply with nothing to improve."""
    parts = (
        rng.choice(text.OPENINGS),
        fact(rng, *question),
        rng.choice(text.STEPS),
        rng.choice(text.CLOSINGS),
    )
    return " ".join(parts)


def _answer(rng: Random, question: Question) -> list[str]:
    topic, intent = question
    kind = _kind(rng, right=0.45, detail=0.27, intent=0.14, topic=0.09, evasion=0.03, none=0.02)
    if kind == "none":
        return []
    if kind == "evasion":
        return [rng.choice(text.EVASIONS).format(topic=topic)]
    if kind == "topic":
        topic = _other(rng, text.TOPICS, topic)
    if kind == "intent":
        intent = _other(rng, text.INTENTS, intent)
    right = text.right_detail(topic, intent)
    wrong = _other(rng, text.DETAILS[intent], right)
    answer = [fact(rng, topic, intent, wrong if kind == "detail" else right)]
    if rng.random() < 0.1:
        further = _other(rng, text.INTENTS, intent)
        answer.append(fact(rng, topic, further))
    return answer


def _manner(rng: Random, polite: tuple[str, ...], rude: tuple[str, ...]) -> list[str]:
    kind = _kind(rng, polite=0.4, rude=0.3, none=0.3)
    if kind == "none":
        return []
    return [rng.choice(polite if kind == "polite" else rude)]


def _step(rng: Random) -> list[str]:
    kind = _kind(rng, concrete=0.35, vague=0.4, none=0.25)
    if kind == "none":
        return []
    if kind == "vague":
        return [rng.choice(text.VAGUE_STEPS)]
    # More than one step is a burden to the customer, and a reward model has to be able to see it.
    return rng.sample(text.STEPS, rng.choice((1, 1, 1, 2)))


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
