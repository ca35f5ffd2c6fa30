"""Comparisons outside of a run: of two policies, of two reward models, and a policy's own scores.

`a` is the one before, `b` the one after. All intervals are of 95 %, clustered by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from rlhf.data.collect import exact_key
from rlhf.data.fitting import Fitting
from rlhf.data.rows import Pair, PromptRow
from rlhf.errors import DataError
from rlhf.evaluation.answers import Answers, score_answers, scored_by
from rlhf.evaluation.common import groups_of
from rlhf.evaluation.comparison import (
    WIN_RATES,
    compare,
    kinds_of,
    over_optimisation,
    shifts,
    wins,
)
from rlhf.evaluation.policy import SEEDS
from rlhf.evaluation.replies import Policy, fitting_rows
from rlhf.evaluation.reward_model import pairs_report
from rlhf.evaluation.slices import slices_of
from rlhf.inference import CONFIDENCE, Estimate, mean_of, prompts_needed, share_of
from rlhf.modeling.reward import Scorer
from rlhf.stage import Progress, silent

#: Measures that are shares.
SHARES = ("eos_rate", "repetition", "refusal")
#: True win rate, and true gain in accuracy, for which a needed number of prompts is told.
WIN_RATE, GAIN = 0.55, 0.05
#: Probability of finding them.
POWER = 0.8
#: Prompts of each kind that the samples mark as worth reading.
SHOWN = 6


@dataclass(frozen=True)
class Scorers:
    """Models that score replies; the judge decides, or without one the reward model."""

    reward: Scorer | None = None
    judge: Scorer | None = None

    @property
    def named(self) -> dict[str, Scorer]:
        """The scorers there are, by the beginning of their metrics' names."""
        given = {"reward": self.reward, "judge": self.judge}
        return {name: scorer for name, scorer in given.items() if scorer is not None}

    @property
    def deciding(self) -> str:
        """The scorer whose win rate decides."""
        return "judge" if self.judge is not None else "reward"


def judge_policy(
    policy: Policy, rows: Sequence[PromptRow], scorer: Scorer, progress: Progress = silent
) -> dict[str, Any]:
    """Sample a policy's replies and score them.

    Returns:
        score and the measures of `rlhf.evaluation.answers`, each with interval; n replies, prompts;
        prompts left out by reason; replies.
    """
    rows, left_out = fitting_rows(rows, [policy.fitting, Fitting(scorer.renderer, scorer.limits)])
    answers = policy.answer(rows, policy.plan.seed)
    progress(1, 2, {})
    scores = score_answers(answers, rows, scorer)
    progress(2, 2, {})
    keys = [exact_key(row.prompt) for row in rows]
    found = mean_of(scores.mean(1).tolist(), keys).metrics("score")
    for name, values in answers.measures.items():
        estimate = share_of if name in SHARES else mean_of
        found |= estimate(values.tolist(), keys).metrics(name)
    replies = [
        {"prompt": row.prompt, "group": row.group, "reply": text, "score": float(score)}
        for row, texts, own in zip(rows, answers.texts, scores, strict=True)
        for text, score in zip(texts, own, strict=True)
    ]
    return {
        **_finite(found), "n": len(replies), "prompts": len(rows), "prompts_left_out": left_out,
        "replies": replies,
    }  # fmt: skip


def compare_policies(
    a: Policy,
    b: Policy,
    rows: Sequence[PromptRow],
    scorers: Scorers,
    progress: Progress = silent,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare the sampled replies of two policies to the same prompts, drawn independently.

    The names are those of evaluate-policy's `evaluation.json` and `samples.json`; the KL is there
    if both have the same tokens.

    Returns:
        The evaluation and all replies side by side, those first on which `b` lost most; `kinds` of
        a row names why it is worth reading (`rlhf.evaluation.comparison.kinds_of`).

    Raises:
        DataError: Too many prompts can't be given to the models.
    """
    others = [Fitting(each.renderer, each.limits) for each in scorers.named.values()]
    rows, left_out = fitting_rows(rows, [a.fitting, b.fitting, *others])
    # Of one tokenizer too, models may have output heads of different sizes.
    sizes = {each.model.config.get_text_config().vocab_size for each in (a, b)}
    has_same_tokens = a.renderer.template_hash == b.renderer.template_hash and len(sizes) == 1
    before = a.answer(rows, a.plan.seed)
    progress(1, 3, {})
    after = b.answer(rows, b.plan.seed + SEEDS, a if has_same_tokens else None)
    progress(2, 3, {})
    for name, scorer in scorers.named.items():
        before, after = (_scored(name, scorer, side, rows) for side in (before, after))
    progress(3, 3, {})
    keys = [exact_key(row.prompt) for row in rows]
    sampled = compare(before, after, keys)
    metric = WIN_RATES[scorers.deciding]
    deciding = (side.scores[scorers.deciding] for side in (before, after))
    win_rate = share_of(wins(*deciding).tolist(), keys)
    groups = groups_of([row.group for row in rows])
    evaluation: dict[str, Any] = {
        "n": len(rows),
        "samples_per_prompt": b.plan.samples,
        "decided_by": scorers.deciding,
        "sampled": sampled,
        "shifts": shifts(before, after, keys),
        "prompts_left_out": left_out,
        **verdict_on_policies(win_rate, metric),
    }
    sampled["by_group"] = {name: compare(before, after, keys, i) for name, i in groups.items()}
    if len(scorers.named) == 2:
        evaluation["over_optimisation"] = over_optimisation(sampled, names=("b", "a"))
    return _finite(evaluation), _samples(rows, before, after, scorers.deciding)


def verdict_on_policies(win_rate: Estimate, metric: str) -> dict[str, Any]:
    """Return `verdict` ("better", "worse" or "undecided"), a sentence, and `prompts_needed`."""
    shown = f"win rate {win_rate.value:.2f} ({win_rate.low:.2f}–{win_rate.high:.2f})"

    def needed(spread: float) -> tuple[int, str]:
        prompts = prompts_needed(WIN_RATE, 0.5, spread, (1 + CONFIDENCE) / 2, POWER)
        return prompts, f"{WIN_RATE:.0%}"

    return _decide(win_rate, 0.5, metric, shown, needed)


def compare_reward_models(
    a: Scorer, b: Scorer, pairs: Sequence[Pair], progress: Progress = silent
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare the accuracies of two reward models on the same pairs; a tie counts a half.

    Returns:
        The evaluation: accuracy_before, accuracy_after, accuracy_difference and agreement (both
        choose the same reply), each with interval; who is right where; by_group and by_slice;
        `reports`, the whole report on each as `before` and `after`. And all pairs, those first on
        which the models disagree most: by the difference of their margins, each over its root
        mean square.

    Raises:
        DataError: Too many pairs can't be given to the models, or none is left that both can tell
            apart.
    """
    fittings = [Fitting(each.renderer, each.limits) for each in (a, b)]
    fitting, left_out = fitting_rows(pairs, fittings)
    kept = [pair for pair in fitting if all(_differ(pair, each) for each in fittings)]
    if equal := len(fitting) - len(kept):
        left_out["replies are equal where a model cuts them"] = equal
    if not kept:
        raise DataError("no pair has replies that both models can tell apart; give others")
    reports = [
        pairs_report(scorer, kept, _half_of(progress, number))
        for number, scorer in enumerate((a, b))
    ]
    margins, right = [r.margins for r in reports], [r.correct for r in reports]
    keys = [exact_key(pair.prompt) for pair in kept]
    found = _accuracies(right, margins, keys, range(len(kept)))
    difference = mean_of(_differences(*right), keys)
    evaluation = {
        **found,
        **{
            name: {group: _accuracies(right, margins, keys, rows) for group, rows in parts.items()}
            for name, parts in (
                ("by_group", groups_of([pair.group for pair in kept])),
                ("by_slice", slices_of(kept)),
            )
        },
        "reports": {
            side: _finite(report.metrics)
            for side, report in zip(("before", "after"), reports, strict=True)
        },
        "pairs_left_out": left_out,
        **verdict_on_reward_models(difference),
    }
    return evaluation, _disagreements(kept, margins)


def verdict_on_reward_models(difference: Estimate) -> dict[str, Any]:
    """Return `verdict` ("better", "worse" or "undecided"), a sentence, and `prompts_needed`."""
    shown = f"accuracy {difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"

    def needed(spread: float) -> tuple[int, str]:
        return prompts_for_mean(GAIN, spread), f"{GAIN:.2f}"

    return _decide(difference, 0.0, "accuracy_difference", shown, needed)


def _decide(
    estimate: Estimate, even: float, metric: str, shown: str,
    needed: Callable[[float], tuple[int, str]],
) -> dict[str, Any]:  # fmt: skip
    """Return the verdict on an estimate.

    Args:
        estimate: How b compares with a.
        even: Its value if they are equal.
        metric: Its name.
        shown: The estimate in words.
        needed: Returns, for a spread of prompts, how many find a difference, and that difference.
    """
    on = f"on {estimate.clusters:,} prompts"
    if estimate.low > even:
        return _verdict("better", metric, f"b is better: {shown} {on}")
    if estimate.high < even:
        return _verdict("worse", metric, f"b is worse: {shown} {on}")
    text = f"no difference found: {shown} {on}"
    spread = estimate.error * math.sqrt(estimate.clusters)
    if not 0 < spread < math.inf:  # nothing but ties, or a single prompt
        return _verdict("undecided", metric, text)
    prompts, found = needed(spread)
    text += f"; {prompts:,} prompts would find {found} in {POWER:.0%} of cases"
    return _verdict("undecided", metric, text, prompts)


def prompts_for_mean(true: float, spread: float) -> int:
    """Return the fewest prompts whose 95 % interval excludes 0 with a power of 0.8.

    ((z₀.₉₇₅ + z₀.₈) σ/δ)², rounded up, by the normal approximation; δ is the true mean, σ the
    standard deviation over prompts. Source: Cohen 1988, chapter 2.
    """
    normal = NormalDist()
    z = normal.inv_cdf((1 + CONFIDENCE) / 2) + normal.inv_cdf(POWER)
    return max(2, math.ceil((z * spread / true) ** 2))


def _scored(name: str, scorer: Scorer, answers: Answers, rows: Sequence[PromptRow]) -> Answers:
    if name == "reward":
        return scored_by(name, scorer, answers, rows)
    # The disagreement is that of the reward model's members, not of a judge's.
    return answers.scored(name, score_answers(answers, rows, scorer))


def _samples(
    rows: Sequence[PromptRow], before: Answers, after: Answers, deciding: str
) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = []
    kinds = kinds_of(before, after, SHOWN)
    for i, row in enumerate(rows):
        for j, (old, new) in enumerate(zip(before.texts[i], after.texts[i], strict=True)):
            sample: dict[str, Any] = {
                "prompt": row.prompt, "group": row.group, "before": old, "after": new,
            }  # fmt: skip
            for name in ("reward", "judge"):
                for side, answers in (("before", before), ("after", after)):
                    scores = answers.scores.get(name)
                    sample[f"{name}_{side}"] = None if scores is None else float(scores[i, j])
            # They were chosen by the first reply of each.
            sample["kinds"] = [name for name, index in kinds.items() if i in index and j == 0]
            found.append(sample)
    return sorted(found, key=lambda each: each[f"{deciding}_after"] - each[f"{deciding}_before"])


def _verdict(verdict: str, metric: str, sentence: str, needed: int | None = None) -> dict[str, Any]:
    return {
        "verdict": verdict, "verdict_metric": metric, "sentence": sentence,
        "prompts_needed": needed,
    }  # fmt: skip


def _half_of(progress: Progress, number: int) -> Progress:
    """Return the progress of one of two equal parts of the work."""

    def report(step: int, total: int, metrics: Mapping[str, float]) -> None:
        progress(number * total + step, 2 * total, metrics)

    return report


def _accuracies(
    right: Sequence[Sequence[float]], margins: Sequence[Sequence[float]], keys: Sequence[str],
    index: Sequence[int],
) -> dict[str, Any]:  # fmt: skip
    own = [keys[i] for i in index]
    a, b = ([side[i] for i in index] for side in right)
    same = [float(_sign(margins[0][i]) == _sign(margins[1][i])) for i in index]
    return {
        "n": len(own),
        "prompts": len(set(own)),
        **share_of(a, own).metrics("accuracy_before"),
        **share_of(b, own).metrics("accuracy_after"),
        **_finite(mean_of(_differences(a, b), own).metrics("accuracy_difference")),
        **share_of(same, own).metrics("agreement"),
        "both_right": sum(x == y == 1 for x, y in zip(a, b, strict=True)),
        "only_before_right": sum(x == 1 > y for x, y in zip(a, b, strict=True)),
        "only_after_right": sum(y == 1 > x for x, y in zip(a, b, strict=True)),
        "neither_right": sum(max(x, y) < 1 for x, y in zip(a, b, strict=True)),
    }


def _disagreements(
    pairs: Sequence[Pair], margins: Sequence[Sequence[float]]
) -> list[dict[str, Any]]:
    scales = [math.sqrt(_mean([m * m for m in side])) or 1.0 for side in margins]
    gaps = [b / scales[1] - a / scales[0] for a, b in zip(*margins, strict=True)]
    order = sorted(range(len(pairs)), key=lambda i: (-abs(gaps[i]), exact_key(pairs[i].prompt)))
    return [
        {
            "prompt": pairs[i].prompt, "group": pairs[i].group, "chosen": pairs[i].chosen,
            "rejected": pairs[i].rejected, "margin_before": margins[0][i],
            "margin_after": margins[1][i], "disagreement": gaps[i],
        }
        for i in order
    ]  # fmt: skip


def _differ(pair: Pair, fitting: Fitting) -> bool:
    one, other = (fitting.encode(pair.prompt, text) for text in (pair.chosen, pair.rejected))
    return one.response != other.response


def _differences(before: Sequence[float], after: Sequence[float]) -> list[float]:
    return [new - old for old, new in zip(before, after, strict=True)]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _finite(values: dict[str, Any]) -> dict[str, Any]:
    """Return metrics for JSON: a mean of a single prompt has no bounds, and JSON no infinity."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: known(each) for name, each in value.items()}
        return None if isinstance(value, float) and not math.isfinite(value) else value

    return {name: known(value) for name, value in values.items()}
