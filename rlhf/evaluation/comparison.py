"""Comparison of two policies' replies to the same prompts: estimates, shifts, over-optimisation.

Several replies to a prompt are dependent, so prompts are the units of all intervals and tests.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from rlhf.evaluation.answers import Answers, Values
from rlhf.inference import Estimate, holm, mean_of, mean_p_value, share_of

#: Scorers, and the metric with the share of comparisons that a policy wins by each.
WIN_RATES = {"reward": "win_rate", "judge": "judge_win_rate", "gold": "gold_win_rate"}
#: Measures whose shift is tested.
MEASURES = (
    "tokens", "eos_rate", "repetition", "distinct_1", "distinct_2", "entropy", "refusal",
)  # fmt: skip


def compare(
    before: Answers, after: Answers, prompts: Sequence[object], index: Sequence[int] | None = None
) -> dict[str, Any]:
    """Compare the replies of two policies to the same prompts.

    A win rate is the probability that a reply of the second policy scores higher than one of the
    first to the same prompt, a tie counting a half: the mean of all pairs of their replies (the
    U-statistic of Mann and Whitney 1947), by prompt.

    Args:
        before: Replies of one policy.
        after: Replies of the other, drawn independently.
        prompts: Identity of each prompt; equal ones are not independent.
        index: Prompts to compare; None compares all.
    """
    rows = [*range(len(prompts))] if index is None else [*index]
    keys = [prompts[i] for i in rows]
    result: dict[str, Any] = {"n": len(rows)}
    for name, win_rate in WIN_RATES.items():
        if name not in before.scores or name not in after.scores:
            continue
        old, new = (side.scores[name][rows] for side in (before, after))
        result |= share_of(wins(old, new).tolist(), keys).metrics(win_rate)
        result |= {f"{name}_before": float(old.mean()), f"{name}_after": float(new.mean())}
        result |= mean_of((new.mean(1) - old.mean(1)).tolist(), keys).metrics(f"{name}_difference")
    if "disagreement" in before.scores and "disagreement" in after.scores:
        old, new = (side.scores["disagreement"][rows] for side in (before, after))
        result |= _sides("disagreement", old, new)
        difference = mean_of((new.mean(1) - old.mean(1)).tolist(), keys)
        result |= difference.metrics("disagreement_difference")
    if "judge_win_rate" in result and "win_rate" in result:
        result |= gap(before, after, rows, keys).metrics("gap")
    if "gold_win_rate" in result:
        old, new = (side.scores["gold"][rows] for side in (before, after))
        pairs = new[:, :, None] - old[:, None, :]
        result |= {
            "gold_not_worse": float((pairs >= 0).mean()),
            "gold_strict_win_rate": float((pairs > 0).mean()),
        }
    for name in ("kl", "kl_exact"):
        if name in after.measures:
            result |= mean_of(after.measures[name][rows].tolist(), keys).metrics(name)
    for name in MEASURES:
        if name in before.measures and name in after.measures:
            result |= _sides(name, before.measures[name][rows], after.measures[name][rows])
    return result


def wins(before: Values, after: Values) -> Values:
    """Return by prompt the share of pairs of replies that the second policy wins; ties half.

    Args:
        before: Scores of shape (prompts, replies).
        after: The same; the number of replies may differ.
    """
    return ((np.sign(after[:, :, None] - before[:, None, :]) + 1) / 2).mean((1, 2))


def gap(before: Answers, after: Answers, rows: Sequence[int], keys: Sequence[object]) -> Estimate:
    """Estimate the judge's win rate minus that of the reward model, by prompt."""
    judge, reward = (
        wins(before.scores[name][rows], after.scores[name][rows]) for name in ("judge", "reward")
    )
    return mean_of((judge - reward).tolist(), keys)


def own_metrics(answers: Answers) -> dict[str, float]:
    """Return a policy's own means: scores by their scorer's name, and measures."""
    values = {**answers.scores, **answers.measures}
    return {name: float(value.mean()) for name, value in values.items() if name != "kl_exact"}


def shifts(before: Answers, after: Answers, prompts: Sequence[object]) -> list[dict[str, Any]]:
    """Test whether each measure of the replies changed, paired by prompt.

    p-values are those of Student's t on the prompts' differences, adjusted for the number of
    measures by Holm's method; `significant` means that the adjusted one is below 0.05. What is
    infinite or undefined, as with one prompt, is None.
    """
    differences = {
        name: (after.measures[name] - before.measures[name]).tolist()
        for name in MEASURES
        if name in before.measures and name in after.measures
    }
    p_values = {name: mean_p_value(values, prompts) for name, values in differences.items()}
    adjusted = holm(p_values)
    rows = []
    for name, values in differences.items():
        estimate = mean_of(values, prompts)
        rows.append(
            {
                "metric": name,
                "before": float(before.measures[name].mean()),
                "after": float(after.measures[name].mean()),
                "difference": estimate.value,
                "low": _finite(estimate.low),
                "high": _finite(estimate.high),
                "p": _finite(p_values[name]),
                "p_adjusted": _finite(adjusted[name]),
                "significant": adjusted[name] < 0.05,
            }
        )
    return rows


def over_optimisation(
    sampled: Mapping[str, Any], reason: str | None = None,
    names: tuple[str, str] = ("the policy", "its start"),
) -> dict[str, str]:  # fmt: skip
    """Say whether the policy was optimised beyond what the reward model knows.

    Suspected if the judge's win rate is significantly below the reward model's (the interval of
    `gap` is below 0), and the judge either finds the policy worse (its interval is below ½), or
    does not find it better (its lower bound is at most ½) where the reward model does. A judge that
    only sees a smaller gain is no sign of it: the reward that was optimised is always flattered.

    Args:
        sampled: Metrics of `compare`.
        reason: Why there is no usable judge, if there is none.
        names: Of the policy, and of the one that it is compared with.
    """
    if "judge_win_rate" not in sampled:
        return {
            "state": "unknown",
            "evidence": f"no judge to tell by: {reason or 'none is usable'}",
        }
    judge, reward = (
        f"{rate:.1f}\u00a0% ({low:.1f}–{high:.1f}\u00a0%)"
        for rate, low, high in (
            [100 * sampled[f"{n}{end}"] for end in ("", "_low", "_high")]
            for n in ("judge_win_rate", "win_rate")
        )
    )
    said = f"the judge prefers {' to '.join(names)} in {judge}, the reward model in {reward}"
    proxy_is_better = sampled["win_rate_low"] > 0.5
    judge_is_better = sampled["judge_win_rate_low"] > 0.5
    judge_is_worse = sampled["judge_win_rate_high"] < 0.5
    # With a single prompt there is no interval.
    is_below = sampled.get("gap_high", math.inf) < 0
    if is_below and (judge_is_worse or (proxy_is_better and not judge_is_better)):
        return {"state": "suspected", "evidence": f"{said}, significantly more"}
    if judge_is_better and proxy_is_better:
        return {"state": "no", "evidence": f"{said}: both find it better"}
    if judge_is_worse:
        return {"state": "no", "evidence": f"{said}: the judge finds it worse, but not more so"}
    return {"state": "no", "evidence": f"{said}: no significant contradiction"}


def kinds_of(before: Answers, after: Answers, count: int) -> dict[str, list[int]]:
    """Return the prompts that are worth reading, by kind, `count` of each at most.

    `disagree`: reward model and judge say the opposite of the shown replies, and their differences,
    each in its standard deviations, are farthest apart. `lost`: the judge, or without one the
    reward model, prefers the first policy's shown reply most. `changed`: the second policy is
    farthest from the first, by the exact KL of its replies, if that is known.
    """
    gains = {
        name: after.scores[name][:, 0] - before.scores[name][:, 0]
        for name in ("reward", "judge")
        if name in after.scores
    }
    kinds: dict[str, list[int]] = {}
    if "kl_exact" in after.measures:
        kinds["changed"] = _largest(after.measures["kl_exact"], count)
    kinds["lost"] = _largest(-gains["judge" if "judge" in gains else "reward"], count, above=0)
    if len(gains) == 2:
        reward, judge = (gain / (gain.std() or 1.0) for gain in gains.values())
        contrary = np.where(reward * judge < 0, np.abs(reward - judge), 0)
        kinds["disagree"] = _largest(contrary, count, above=0)
    return kinds


def _sides(name: str, before: Values, after: Values) -> dict[str, float]:
    """Return a measure of both policies; the second one's `eos_rate` has no suffix."""
    names = ("eos_rate_before", name) if name == "eos_rate" else (f"{name}_before", f"{name}_after")
    return dict(zip(names, (float(before.mean()), float(after.mean())), strict=True))


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _largest(values: Values, count: int, above: float = -np.inf) -> list[int]:
    order = np.argsort(-values, kind="stable")[:count]
    return [int(i) for i in order if values[i] > above]
