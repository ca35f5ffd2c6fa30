"""Measures of replies by their text alone: repetition, distinct n-grams, refusals.

Words are what spaces separate, in lower case: in a language without spaces only `is_refusal`, which
knows English alone, means what it says. Loads no torch.
"""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.statistics import repeated_ngrams

#: Beginnings of replies that refuse, in lower case and with a straight apostrophe. A list so short
#: finds the usual phrases of assistants, not every refusal; it is for comparing two policies.
REFUSALS = (
    "i can't", "i cannot", "i can not", "i won't", "i will not", "i'm unable", "i am unable",
    "i'm not able", "i am not able", "i must decline", "i have to decline", "i'm sorry, but",
    "i am sorry, but", "sorry, but i", "sorry, i can't", "sorry, i cannot", "i apologize, but",
    "i apologise, but", "i'm afraid i can", "unfortunately, i can", "unfortunately, i'm unable",
    "as an ai", "i'm just an ai", "i am just an ai",
)  # fmt: skip


def repetition(text: str) -> float:
    """Return the share of a reply's 3-grams of words that repeat earlier ones."""
    return repeated_ngrams(text.lower().split(), 3)


def distinct(texts: Sequence[str], n: int) -> float:
    """Return the number of different n-grams of words of all texts, over that of all n-grams.

    1 if there are none. Source: Li et al. 2016, "A Diversity-Promoting Objective Function for
    Neural Conversation Models", section 5.1.
    """
    words = [text.lower().split() for text in texts]
    ngrams = [tuple(w[i : i + n]) for w in words for i in range(len(w) - n + 1)]
    return len(set(ngrams)) / len(ngrams) if ngrams else 1.0


def is_refusal(text: str) -> bool:
    """Return whether a reply begins like a refusal, by `REFUSALS`."""
    start = text.replace("’", "'").lower().lstrip(" \t\n\"'*_")
    return start.startswith(REFUSALS)
