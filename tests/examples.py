"""Numbers of Hypothesis's examples: a sample in each run of the tests, all in `make campaigns`."""

import os

#: Least number of a sample; the examples are drawn anew in each run.
LEAST = 10


def examples(count: int) -> int:
    """Return the number of examples of a test whose campaign has `count`."""
    return count if os.environ.get("RLHF_CAMPAIGN") == "1" else min(count, max(LEAST, count // 5))
