"""Generation of the world's datasets: demonstrations, pairs and prompts."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from random import Random

from rlhf.config.data import WorldConfig
from rlhf.world import text
from rlhf.world.gold import gold
from rlhf.world.replies import Question, mixed_reply

SEEN = "seen-template"
"""Group of prompts whose templates training uses."""
NEW = "new-template"
"""Group of held-out prompts whose templates training never uses."""


@dataclass(frozen=True)
class Demonstration:
    """A reply of mixed quality, for supervised fine-tuning."""

    prompt: str
    response: str


@dataclass(frozen=True)
class WorldPair:
    """Two replies to a prompt, labelled by a Bradley–Terry draw on their gold scores."""

    prompt: str
    chosen: str
    rejected: str
    group: str = SEEN


@dataclass(frozen=True)
class EvalPrompt:
    """A held-out prompt and the group of its templates."""

    prompt: str
    group: str


@dataclass(frozen=True)
class World:
    """The datasets. No prompt occurs twice, in one dataset or in two."""

    demonstrations: list[Demonstration]
    pairs: list[WorldPair]
    eval_pairs: list[WorldPair]
    prompts: list[str]
    eval_prompts: list[EvalPrompt]
    judge_pairs: list[WorldPair]


def generate(config: WorldConfig, seed: int) -> World:
    """Generate all datasets.

    Held-out prompts are drawn first, so they do not depend on the size of the training sets. Those
    of the judge are drawn last, so no other dataset depends on them.
    """
    prompts = _Prompts(seed)
    eval_pairs = prompts.draw("eval pairs", config.eval_pairs, (SEEN, NEW))
    eval_prompts = prompts.draw("eval prompts", config.eval_prompts, (SEEN, NEW))
    demonstrations = prompts.draw("demonstrations", config.demonstrations, (SEEN,))
    pairs = prompts.draw("pairs", config.pairs, (SEEN,))
    rollouts = prompts.draw("prompts", config.prompts, (SEEN,))
    count = config.pairs // 4 if config.judge_pairs is None else config.judge_pairs
    judge_pairs = prompts.draw("judge pairs", count, (SEEN,))

    def label(name: str, drawn: list[tuple[str, Question, str]]) -> list[WorldPair]:
        rng = Random(f"{seed}/{name}/replies")
        return [make_pair(rng, *row, config.temperature) for row in drawn]

    rng = Random(f"{seed}/demonstrations/replies")
    return World(
        demonstrations=[Demonstration(p, mixed_reply(rng, q)) for p, q, _ in demonstrations],
        pairs=label("pairs", pairs),
        eval_pairs=label("eval pairs", eval_pairs),
        prompts=[prompt for prompt, _, _ in rollouts],
        eval_prompts=[EvalPrompt(prompt, group) for prompt, _, group in eval_prompts],
        judge_pairs=label("judge pairs", judge_pairs),
    )


def make_prompt(rng: Random, group: str) -> tuple[str, Question]:
    """Return a customer's message, and its topic and intent."""
    topic, intent = rng.choice(text.TOPICS), rng.choice(text.INTENTS)
    greetings = text.NEW_GREETINGS if group == NEW else text.GREETINGS
    questions = text.NEW_QUESTIONS if group == NEW else text.QUESTIONS
    parts = [
        rng.choice(greetings).format(name=rng.choice(text.NAMES), city=rng.choice(text.CITIES))
    ]
    if rng.random() < 0.2:
        parts.append(rng.choice(text.REMARKS))
    parts.append(rng.choice(questions[intent]).format(topic=topic))
    return " ".join(parts), (topic, intent)


def make_pair(
    rng: Random, prompt: str, question: Question, group: str, temperature: float
) -> WorldPair:
    """Draw two different replies and a noisy label."""
    first = second = mixed_reply(rng, question)
    while second == first:
        second = mixed_reply(rng, question)
    gap = gold(prompt, first) - gold(prompt, second)
    if rng.random() < preference(gap, temperature):
        return WorldPair(prompt, first, second, group)
    return WorldPair(prompt, second, first, group)


def preference(gap: float, temperature: float) -> float:
    """Return the Bradley–Terry probability that a reply better by `gap` is chosen."""
    return 0.5 * (1 + math.tanh(gap / temperature / 2))


def ceiling(pairs: Sequence[WorldPair], temperature: float) -> float:
    """Return the expected accuracy of a perfect reward model on the noisy labels."""
    if not pairs:
        raise ValueError("the ceiling of no pairs is undefined")
    gaps = (abs(gold(p.prompt, p.chosen) - gold(p.prompt, p.rejected)) for p in pairs)
    return sum(preference(gap, temperature) for gap in gaps) / len(pairs)


class _Prompts:
    """Draws distinct prompts."""

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._used: set[str] = set()

    def draw(self, name: str, count: int, groups: Sequence[str]) -> list[tuple[str, Question, str]]:
        """Draw `count` unused prompts from random stream `name`, with `groups` in turn."""
        rng = Random(f"{self._seed}/{name}/prompts")
        drawn: list[tuple[str, Question, str]] = []
        for _ in range(20 * count + 1000):
            if len(drawn) == count:
                return drawn
            group = groups[len(drawn) % len(groups)]
            prompt, question = make_prompt(rng, group)
            if prompt not in self._used:
                self._used.add(prompt)
                drawn.append((prompt, question, group))
        raise ValueError(f"the world has too few distinct prompts for {count} {name}")
