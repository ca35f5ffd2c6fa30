"""Comparisons outside of a run: of two policies, of two reward models, and a policy's own scores.

`a` is the one before, `b` the one after. All intervals are of 95 %, clustered by prompt.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

from rlhf.data.collect import exact_key
from rlhf.data.fitting import Fitting
from rlhf.data.rows import Pair, PromptRow
from rlhf.errors import DataError
from rlhf.evaluation.common import groups_of, points
from rlhf.evaluation.replies import Policy, Sampled, fitting_rows
from rlhf.inference import (
    CONFIDENCE,
    Estimate,
    holm,
    mean_of,
    mean_p_value,
    prompts_needed,
    share_of,
)
from rlhf.modeling.reward import Scorer
from rlhf.stage import Progress, silent
from rlhf.statistics import repeated_ngrams

#: True win rate, and true gain in accuracy, for which a needed number of prompts is told.
WIN_RATE, GAIN = 0.55, 0.05
#: Probability of finding them.
POWER = 0.8


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
        score, tokens, repetition (means) and finished (share), each with interval; n replies,
        prompts; prompts left out by reason; replies.
    """
    rows, left_out = fitting_rows(rows, [policy.fitting, Fitting(scorer.renderer, scorer.limits)])
    sampled = policy.reply(rows)
    progress(1, 2, {})
    prompts = _repeated(rows, policy)
    scores = scorer([row.prompt for row in prompts], sampled.texts).tolist()
    progress(2, 2, {})
    keys = [exact_key(row.prompt) for row in prompts]
    repetition = [_repetition(text) for text in sampled.texts]
    return {
        **_bounded(mean_of(scores, keys), "score"),
        **_bounded(mean_of(sampled.tokens, keys), "tokens"),
        **_bounded(mean_of(repetition, keys), "repetition"),
        **share_of(list(map(float, sampled.finished)), keys).metrics("finished"),
        "n": len(keys),
        "prompts": len(rows),
        "prompts_left_out": left_out,
        "replies": [
            {
                "prompt": row.prompt, "group": row.group, "reply": text, "score": score,
                "tokens": tokens, "finished": finished,
            }
            for row, text, score, tokens, finished in zip(
                prompts, sampled.texts, scores, sampled.tokens, sampled.finished, strict=True
            )
        ],
    }  # fmt: skip


def compare_policies(
    a: Policy,
    b: Policy,
    rows: Sequence[PromptRow],
    scorers: Scorers,
    progress: Progress = silent,
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare the replies of two policies to the same prompts, with the same random numbers.

    The names are those of evaluate-policy's `evaluation.json` and `samples.json`; the KL is there
    if both have the same tokens.

    Returns:
        The evaluation and all replies side by side, those first on which `b` lost most.

    Raises:
        DataError: Too many prompts can't be given to the models.
    """
    others = [Fitting(each.renderer, each.limits) for each in scorers.named.values()]
    rows, left_out = fitting_rows(rows, [a.fitting, b.fitting, *others])
    same_tokens = a.renderer.template_hash == b.renderer.template_hash
    before = a.reply(rows)
    progress(1, 4, {})
    after = b.reply(rows, a if same_tokens else None)
    progress(2, 4, {})
    prompts = _repeated(rows, b)
    asked = [row.prompt for row in prompts]
    scores = {
        name: (scorer(asked, before.texts).tolist(), scorer(asked, after.texts).tolist())
        for name, scorer in scorers.named.items()
    }
    progress(4, 4, {})
    keys = [exact_key(row.prompt) for row in prompts]
    sides = _Sides(before, after, scores, keys)
    part = sides.compared(range(len(keys)))
    groups = groups_of([row.group for row in prompts])
    part["by_group"] = {group: sides.compared(index) for group, index in groups.items()}
    deciding = scorers.deciding
    name = "judge_win_rate" if deciding == "judge" else "win_rate"
    evaluation = {
        "n": len(rows),
        "samples_per_prompt": b.plan.samples,
        "decided_by": deciding,
        "sampled": part,
        "shifts": sides.shifts(),
        "prompts_left_out": left_out,
        **verdict_on_policies(sides.win_rate(deciding), name),
    }
    return evaluation, sides.samples(prompts, deciding)


def verdict_on_policies(win_rate: Estimate, metric: str) -> dict[str, Any]:
    """Return `verdict` ("better", "worse" or "undecided"), a sentence, and `prompts_needed`."""
    shown = f"win rate {win_rate.value:.2f} ({win_rate.low:.2f}–{win_rate.high:.2f})"
    on = f"on {win_rate.clusters:,} prompts"
    if win_rate.low > 0.5:
        return _verdict("better", metric, f"b is better: {shown} {on}")
    if win_rate.high < 0.5:
        return _verdict("worse", metric, f"b is worse: {shown} {on}")
    text = f"no difference found: {shown} {on}"
    spread = win_rate.error * math.sqrt(win_rate.clusters)
    if spread == 0:
        return _verdict("undecided", metric, text)
    needed = prompts_needed(WIN_RATE, 0.5, spread, (1 + CONFIDENCE) / 2, POWER)
    text += f"; {needed:,} prompts would find {WIN_RATE:.0%} in {POWER:.0%} of cases"
    return _verdict("undecided", metric, text, needed)


@dataclass(frozen=True)
class _Sides:
    """Replies of both policies with their scores, row by row."""

    before: Sampled
    after: Sampled
    scores: Mapping[str, tuple[list[float], list[float]]]
    """Scores before and after by scorer."""
    keys: list[str]
    """Prompt of each row."""

    def points(self, name: str) -> list[float]:
        """Return 1 where the reply after has the higher score, ½ for a tie, else 0."""
        return [points(new - old) for old, new in zip(*self.scores[name], strict=True)]

    def win_rate(self, name: str) -> Estimate:
        return share_of(self.points(name), self.keys)

    def compared(self, index: Sequence[int]) -> dict[str, Any]:
        """Return the metrics of some rows."""
        keys = [self.keys[i] for i in index]

        def chosen(values: Sequence[float]) -> list[float]:
            return [float(values[i]) for i in index]

        found: dict[str, Any] = {"n": len(keys), "prompts": len(set(keys))}
        for name, (old, new) in self.scores.items():
            rate = "win_rate" if name == "reward" else f"{name}_win_rate"
            found |= share_of(chosen(self.points(name)), keys).metrics(rate)
            found |= {f"{name}_before": _mean(chosen(old)), f"{name}_after": _mean(chosen(new))}
            change = _differences(chosen(old), chosen(new))
            found |= _bounded(mean_of(change, keys), f"{name}_difference")
        if len(self.scores) == 2:
            gaps = _differences(chosen(self.points("reward")), chosen(self.points("judge")))
            found |= _bounded(mean_of(gaps, keys), "gap")
        if self.after.kl is not None:
            found |= _bounded(mean_of(chosen(self.after.kl), keys), "kl")
        for name, (old, new) in self._facts().items():
            found |= {f"{name}_before": _mean(chosen(old)), f"{name}_after": _mean(chosen(new))}
        return found

    def shifts(self) -> list[dict[str, Any]]:
        """Return how the replies' form changed, with p-values corrected for their number."""
        changes = {name: _differences(*sides) for name, sides in self._facts().items()}
        raw = {name: mean_p_value(values, self.keys) for name, values in changes.items()}
        adjusted = holm(raw)
        found = []
        for name, (old, new) in self._facts().items():
            change = mean_of(changes[name], self.keys)
            known = not math.isnan(raw[name])
            found.append({
                "metric": name, "before": _mean(old), "after": _mean(new),
                "difference": change.value, "low": _finite(change.low),
                "high": _finite(change.high), "p": raw[name] if known else None,
                "p_adjusted": adjusted[name] if known else None,
                "significant": known and adjusted[name] < 1 - CONFIDENCE,
            })  # fmt: skip
        return found

    def _facts(self) -> dict[str, tuple[list[float], list[float]]]:
        sides = (self.before, self.after)
        tokens, finished, repetition = (
            [[float(n) for n in side.tokens] for side in sides],
            [[float(done) for done in side.finished] for side in sides],
            [[_repetition(text) for text in side.texts] for side in sides],
        )
        return {
            "tokens": (tokens[0], tokens[1]),
            "eos_rate": (finished[0], finished[1]),
            "repetition": (repetition[0], repetition[1]),
        }

    def samples(self, rows: Sequence[PromptRow], deciding: str) -> list[dict[str, Any]]:
        """Return all replies side by side, those first on which `after` lost most."""
        old, new = self.scores[deciding]
        order = sorted(range(len(rows)), key=lambda i: (new[i] - old[i], self.keys[i]))
        found = []
        for i in order:
            row: dict[str, Any] = {
                "prompt": rows[i].prompt, "group": rows[i].group, "before": self.before.texts[i],
                "after": self.after.texts[i],
            }  # fmt: skip
            for name in ("reward", "judge"):
                sides = self.scores.get(name)
                row[f"{name}_before"] = sides[0][i] if sides else None
                row[f"{name}_after"] = sides[1][i] if sides else None
            found.append(row)
        return found


def compare_reward_models(
    a: Scorer, b: Scorer, pairs: Sequence[Pair], progress: Progress = silent
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Compare the accuracies of two reward models on the same pairs; a tie counts a half.

    Returns:
        The evaluation: accuracy_before, accuracy_after, accuracy_difference and agreement (both
        choose the same reply), each with interval; who is right where; by_group. And all pairs,
        those first on which the models disagree most: by the difference of their margins, each
        over its root mean square.

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
    margins: list[list[float]] = []
    for number, scorer in enumerate((a, b)):
        prompts = [pair.prompt for pair in kept]
        chosen = scorer(prompts, [pair.chosen for pair in kept])
        margins.append((chosen - scorer(prompts, [pair.rejected for pair in kept])).tolist())
        progress(number + 1, 2, {})
    keys = [exact_key(pair.prompt) for pair in kept]
    right = [[points(margin) for margin in side] for side in margins]
    found = _accuracies(right, margins, keys, range(len(kept)))
    difference = mean_of(_differences(*right), keys)
    evaluation = {
        **found,
        "by_group": {
            group: _accuracies(right, margins, keys, index)
            for group, index in groups_of([pair.group for pair in kept]).items()
        },
        "pairs_left_out": left_out,
        **verdict_on_reward_models(difference),
    }
    return evaluation, _disagreements(kept, margins)


def verdict_on_reward_models(difference: Estimate) -> dict[str, Any]:
    """Return `verdict` ("better", "worse" or "undecided"), a sentence, and `prompts_needed`."""
    shown = f"accuracy {difference.value:+.3f} ({difference.low:+.3f} to {difference.high:+.3f})"
    on, metric = f"on {difference.clusters:,} prompts", "accuracy_difference"
    if difference.low > 0:
        return _verdict("better", metric, f"b is better: {shown} {on}")
    if difference.high < 0:
        return _verdict("worse", metric, f"b is worse: {shown} {on}")
    text = f"no difference found: {shown} {on}"
    spread = difference.error * math.sqrt(difference.clusters)
    if spread == 0:
        return _verdict("undecided", metric, text)
    needed = prompts_for_mean(GAIN, spread)
    text += f"; {needed:,} prompts would find {GAIN:.2f} in {POWER:.0%} of cases"
    return _verdict("undecided", metric, text, needed)


def prompts_for_mean(true: float, spread: float) -> int:
    """Return the fewest prompts whose 95 % interval excludes 0 with a power of 0.8.

    ((z₀.₉₇₅ + z₀.₈) σ/δ)², rounded up, by the normal approximation; δ is the true mean, σ the
    standard deviation over prompts. Source: Cohen 1988, chapter 2.
    """
    normal = NormalDist()
    z = normal.inv_cdf((1 + CONFIDENCE) / 2) + normal.inv_cdf(POWER)
    return max(2, math.ceil((z * spread / true) ** 2))


def _verdict(verdict: str, metric: str, sentence: str, needed: int | None = None) -> dict[str, Any]:
    return {
        "verdict": verdict, "verdict_metric": metric, "sentence": sentence,
        "prompts_needed": needed,
    }  # fmt: skip


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
        **_bounded(mean_of(_differences(a, b), own), "accuracy_difference"),
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


def _repeated(rows: Sequence[PromptRow], policy: Policy) -> list[PromptRow]:
    return [row for row in rows for _ in range(policy.plan.samples)]


def _repetition(text: str) -> float:
    return repeated_ngrams(text.lower().split(), 3)


def _differences(before: Sequence[float], after: Sequence[float]) -> list[float]:
    return [new - old for old, new in zip(before, after, strict=True)]


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _bounded(estimate: Estimate, name: str) -> dict[str, float | None]:
    """Return a mean's metrics; of a single prompt it has no bounds, and JSON no infinity."""
    return {key: _finite(value) for key, value in estimate.metrics(name).items()}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
