"""A small world of customer questions and support replies whose true quality is known.

Start at `text.py` (everything that can be said), then `gold.py` (what is good),
`replies.py` (how replies go wrong) and `generate.py` (the data sets).
`python -m rlhf.world --seed 0 --show 5` prints samples and statistics.
"""

from rlhf.world.generate import (
    Demonstration,
    EvalPrompt,
    World,
    WorldPair,
    ceiling,
    generate,
    preference,
)
from rlhf.world.gold import gold, gold_parts
from rlhf.world.replies import best_reply, mixed_reply

__all__ = [
    "Demonstration",
    "EvalPrompt",
    "World",
    "WorldPair",
    "best_reply",
    "ceiling",
    "generate",
    "gold",
    "gold_parts",
    "mixed_reply",
    "preference",
]
