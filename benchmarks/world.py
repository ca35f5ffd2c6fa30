"""Print samples and statistics of a generated world."""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from random import Random
from statistics import fmean, pstdev

from rlhf.config.data import WorldConfig
from rlhf.world.generate import World, ceiling, generate
from rlhf.world.gold import BEST, gold, gold_parts, read_question
from rlhf.world.replies import best_reply


def main(arguments: Sequence[str] | None = None) -> None:
    """Print samples and statistics."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.world", description=__doc__)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--show", type=int, default=5, help="number of prompts to print")
    options = parser.parse_args(arguments)
    config = WorldConfig()
    world = generate(config, options.seed)
    for pair in world.eval_pairs[: options.show]:
        print(f"\n{pair.prompt}  [{pair.group}]")
        show(pair.prompt, pair.chosen)
        show(pair.prompt, pair.rejected)
        question = read_question(pair.prompt)
        if question:
            show(pair.prompt, best_reply(Random(options.seed), question))
    print()
    for name, value in statistics(world, config.temperature).items():
        print(f"{name:36}{value:8.3f}")


def show(prompt: str, reply: str) -> None:
    """Print a reply, its gold score and the parts that are not zero."""
    parts = {name: round(value, 2) for name, value in gold_parts(prompt, reply).items() if value}
    print(f"  {gold(prompt, reply):5.2f}  {reply}\n         {parts}")


def statistics(world: World, temperature: float) -> dict[str, float]:
    """Return statistics of a world by name."""
    replies = [d.response for d in world.demonstrations]
    prompts = [d.prompt for d in world.demonstrations]
    scores = [gold(d.prompt, d.response) for d in world.demonstrations]
    words = set(re.findall(r"\w+", " ".join(prompts + replies)))
    longer = [
        (len(pair.chosen) > len(pair.rejected)) + 0.5 * (len(pair.chosen) == len(pair.rejected))
        for pair in world.pairs
    ]
    agree = [gold(p.prompt, p.chosen) > gold(p.prompt, p.rejected) for p in world.eval_pairs]
    return {
        "demonstrations: mean gold": fmean(scores),
        "demonstrations: sd of gold": pstdev(scores),
        "demonstrations: lowest gold": min(scores),
        "demonstrations: highest gold": max(scores),
        "best possible gold": BEST,
        "eval pairs: ceiling": ceiling(world.eval_pairs, temperature),
        "eval pairs: label agrees with gold": fmean(agree),
        "pairs: P(chosen longer)": fmean(longer),
        "prompts: mean words": mean_words(prompts),
        "replies: mean words": mean_words(replies),
        "words": len(words),
        "words, any case": len({word.lower() for word in words}),
    }


def mean_words(texts: Sequence[str]) -> float:
    """Return the mean number of words."""
    return fmean(len(text.split()) for text in texts)


if __name__ == "__main__":
    main()
