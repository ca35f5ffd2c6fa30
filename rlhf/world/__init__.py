"""Synthetic preference data with a known true reward: questions and replies.

`sentences.yaml` holds the sentences, `text.py` loads them, `gold.py` scores a reply, `replies.py`
writes good and bad replies, and `generate.py` the datasets.
`python -m benchmarks.world --seed 0 --show 5` prints samples and statistics.
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
