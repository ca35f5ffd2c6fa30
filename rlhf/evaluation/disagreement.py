"""Disagreement of a reward model's members on held-out pairs, and whether it foretells errors."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from rlhf.data.rows import Pair
from rlhf.evaluation.common import points
from rlhf.inference import share_of
from rlhf.modeling.members import Members

#: File with a row for each held-out pair, beside `evaluation.json`.
DISAGREEMENT = "disagreement.json"
#: Parts of the pairs by disagreement, of equal size, and the pairs that one needs.
PARTS, PAIRS_OF_A_PART = 4, 10
#: Pairs that are shown.
_EXAMPLES = 6


def members_report(
    members: Members,
    chosen: Tensor,
    rejected: Tensor,
    pairs: Sequence[Pair],
    prompts: Sequence[str],
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Return what the members' scores of held-out pairs say, and a row for each pair.

    The disagreement on a pair is the standard deviation over the members of their margins, in
    deviations of the reference scores. Rows are ordered by it, the largest first.

    Args:
        members: The members.
        chosen: Their scores of the chosen replies, of shape (pairs, members).
        rejected: Of the rejected ones.
        pairs: The pairs.
        prompts: Key of each pair's prompt.
    """
    margins = (chosen - rejected).double()
    right = np.asarray([[points(m) for m in row] for row in margins.tolist()])
    disagreement = members.spread(margins).numpy()
    means = [points(m) for m in margins.mean(1).tolist()]
    accuracy = share_of(means, prompts)
    order = np.argsort(-disagreement, kind="stable").tolist()
    rows = [
        {
            "prompt": pairs[i].prompt,
            "group": pairs[i].group,
            "chosen": pairs[i].chosen,
            "rejected": pairs[i].rejected,
            "margin": float(margins[i, 0]),
            "disagreement": float(disagreement[i]),
            "right": float(right[i, 0]),
        }
        for i in order
    ]
    report: dict[str, Any] = {
        "heads": len(members),
        **accuracy.metrics("accuracy"),
        "n": len(pairs),
        "prompts": accuracy.clusters,
        "accuracies": right.mean(0).tolist(),
        "disagreement_mean": float(disagreement.mean()),
        "by_disagreement": by_disagreement(disagreement, right[:, 0], prompts),
        "examples": rows[:_EXAMPLES],
    }
    return report, rows


def by_disagreement(
    disagreement: NDArray[np.float64], right: NDArray[np.float64], prompts: Sequence[str]
) -> list[dict[str, float]]:
    """Return the trained head's accuracy in quarters of the pairs by disagreement.

    Equal disagreements share a part; few pairs make fewer parts.

    Args:
        disagreement: Of each pair.
        right: Whether the trained head is right; a tie is a half.
        prompts: Key of each pair's prompt.
    """
    count = max(1, min(PARTS, len(right) // PAIRS_OF_A_PART))
    inner = np.quantile(disagreement, [i / count for i in range(1, count)])
    low, high = float(disagreement.min()), float(disagreement.max())
    edges = [low, *dict.fromkeys(float(edge) for edge in inner if low < edge < high), high]
    place = np.searchsorted(edges[1:-1], disagreement, side="right")
    parts: list[dict[str, float]] = []
    for i, (start, end) in enumerate(pairwise(edges)):
        rows = np.flatnonzero(place == i).tolist()
        share = share_of(right[rows].tolist(), [prompts[row] for row in rows])
        parts.append(
            {
                "low": start,
                "high": end,
                "accuracy": share.value,
                "accuracy_low": share.low,
                "accuracy_high": share.high,
                "n": len(rows),
            }
        )
    return parts
