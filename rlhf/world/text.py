"""Sentences of the world, from `sentences.yaml`: questions and parts of replies."""

from __future__ import annotations

from pathlib import Path

import yaml

_SENTENCES = yaml.safe_load(Path(__file__).with_name("sentences.yaml").read_text(encoding="utf-8"))


def _all(name: str) -> tuple[str, ...]:
    return tuple(_SENTENCES[name])


def _by_intent(name: str) -> dict[str, tuple[str, ...]]:
    return {intent: tuple(lines) for intent, lines in _SENTENCES[name].items()}


TOPICS, INTENTS = _all("topics"), _all("intents")
#: Answer details; the right one for `TOPICS[i]` is the i-th.
DETAILS = _by_intent("details")
FACTS = _by_intent("facts")
QUESTIONS, NEW_QUESTIONS = _by_intent("questions"), _by_intent("new_questions")
GREETINGS, NEW_GREETINGS = _all("greetings"), _all("new_greetings")
REMARKS = _all("remarks")
NAMES, CITIES = _all("names"), _all("cities")
OPENINGS, RUDE_OPENINGS = _all("openings"), _all("rude_openings")
CLOSINGS, RUDE_CLOSINGS = _all("closings"), _all("rude_closings")
STEPS, VAGUE_STEPS = _all("steps"), _all("vague_steps")
FILLERS, EVASIONS = _all("fillers"), _all("evasions")


def right_detail(topic: str, intent: str) -> str:
    """Return the detail that answers `intent` for `topic`."""
    return DETAILS[intent][TOPICS.index(topic)]


def templates(*, new: bool) -> tuple[str, ...]:
    """Return the question templates of all intents: the held-out ones when `new`."""
    table = NEW_QUESTIONS if new else QUESTIONS
    return tuple(template for intent in INTENTS for template in table[intent])
