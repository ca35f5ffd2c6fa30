"""False promotions, power and false rejections of the shipped gates in simulated retrainings.

A retraining draws gate prompts from the pool (300 of its 1,000, without replacement), and for each
of them `samples_per_prompt` of the policies' replies, with replacement. Its evaluation is computed
from the scores of these replies and goes through the product's own gate: the default rules, then
the comparison with the champion at the confidence of one of ten looks.

Challengers are really evaluated policies, or mixtures: with the chance q a reply is the better
policy's, else the champion's, with q such that the true win rate by gold is that which is asked
for. The judge decides, which does not see gold.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.gates.pool import REPLIES, Scores
from rlhf.challenge import with_comparison
from rlhf.config import PipelineConfig
from rlhf.gates import Verdict, judge
from rlhf.inference import share_of, stratified_share, wilson

SCORERS = ("proxy", "judge", "gold")


@dataclass(frozen=True)
class Challenger:
    """Replies with a chance: of `first` with `share`, else of `second`."""

    name: str
    first: str
    second: str
    share: float = 1.0
    proxy: str = "proxy"
    """Scorer that stands for the training reward model."""
    champion: str = "champion"


def win_rate(before: NDArray[np.float64], after: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the win rate of each prompt over all pairs of replies; a tie counts a half.

    Args:
        before: Scores of shape (prompts, replies).
        after: Those of the challenger, of the same shape.
    """
    return ((np.sign(after[:, :, None] - before[:, None, :]) + 1) / 2).mean((1, 2))


def true_win_rate(scores: Scores, challenger: Challenger, scorer: str = "gold") -> float:
    """Return the win rate over the champion on all prompts and replies of the pool."""
    before = scores[f"{challenger.champion}/{scorer}"]
    parts = [
        float(win_rate(before, scores[f"{name}/{scorer}"]).mean())
        for name in (challenger.first, challenger.second)
    ]
    return challenger.share * parts[0] + (1 - challenger.share) * parts[1]


def mixture(scores: Scores, target: float, better: str, champion: str) -> Challenger:
    """Return a mixture of two policies whose true win rate over the worse one is the target.

    Raises:
        ValueError: The better one does not reach it.
    """
    whole = true_win_rate(scores, Challenger("", better, champion, champion=champion))
    even = true_win_rate(scores, Challenger("", champion, champion, champion=champion))
    share = (target - even) / (whole - even)
    if not 0 <= share <= 1:
        raise ValueError(f"{better} wins {whole:.3f} against {champion}, less than {target}")
    name = f"mixture of {better} with {champion}"
    return Challenger(name, better, champion, share, champion=champion)


def retrain(
    scores: Scores, challenger: Challenger, config: PipelineConfig, rng: np.random.Generator
) -> Verdict:
    """Simulate one retraining up to the verdict of its gate."""
    evaluation, gates = config.evaluation, config.gates
    groups = scores["group"]
    rows = rng.permutation(len(groups))[: evaluation.prompts]
    k = evaluation.samples_per_prompt
    picks = {
        name: rng.integers(REPLIES, size=(len(rows), k)) for name in ("sft", "champion", "new")
    }
    is_first = rng.random((len(rows), k)) < challenger.share

    def draw(policy: str, scorer: str, pick: str) -> NDArray[np.float64]:
        return scores[f"{policy}/{scorer}"][rows[:, None], picks[pick]]

    metrics: dict[str, Any] = {"judge": {"usable": True}, "prompts_sha256": "pool"}
    names = {"win_rate": challenger.proxy, "judge_win_rate": "judge"}
    for part, before in (("sampled", "sft"), ("champion", challenger.champion)):
        block: dict[str, Any] = {"n": len(rows)}
        slices: dict[str, dict[str, Any]] = {}
        for name, scorer in names.items():
            after = np.where(
                is_first,
                draw(challenger.first, scorer, "new"), draw(challenger.second, scorer, "new"),
            )  # fmt: skip
            pick = "sft" if part == "sampled" else "champion"
            wins = win_rate(draw(before, scorer, pick), after)
            block |= share_of(wins.tolist()).metrics(name)
            for group in np.unique(groups):
                index = groups[rows] == group
                values = slices.setdefault(str(group), {"n": int(index.sum())})
                values |= share_of(wins[index].tolist()).metrics(name)
        metrics[part] = {**block, "by_group": slices}
    # KL and ends are not simulated: all policies of the pool meet those rules or are judged so.
    metrics["sampled"] |= {"kl": 5.0, "eos_rate": 1.0}
    metrics["champion"]["policy"] = "champion"
    verdict = judge("gate-policy", "challenger", metrics, gates.policy)
    assert gates.champion is not None
    return with_comparison(verdict, metrics, gates.champion, look=1)


def rates(
    scores: Scores, challenger: Challenger, config: PipelineConfig, runs: int, seed: int = 0
) -> dict[str, Any]:
    """Return how often a challenger is promoted, and which checks reject it."""
    rng = np.random.default_rng([seed, *challenger.name.encode()])
    failed: dict[str, int] = {}
    promoted = 0
    for _ in range(runs):
        verdict = retrain(scores, challenger, config, rng)
        promoted += verdict.approved
        for check in verdict.checks:
            if not check.passed:
                failed[check.metric] = failed.get(check.metric, 0) + 1
    low, high = wilson(promoted / runs, runs, 1.96)
    return {
        "challenger": challenger.name,
        "share": challenger.share,
        "true_win_rate": true_win_rate(scores, challenger),
        "judge_win_rate": true_win_rate(scores, challenger, "judge"),
        "proxy_win_rate": true_win_rate(scores, challenger, challenger.proxy),
        "promoted": promoted / runs, "promoted_low": low, "promoted_high": high, "runs": runs,
        "rejected_by": {name: count / runs for name, count in failed.items()},
    }  # fmt: skip


def reward_gate(scores: Mapping[str, Any], true: float, pairs: int, runs: int) -> float:
    """Return how often the default reward gate rejects a reward model of a true accuracy.

    Its pairs are independent: one for each prompt, as on the generated world.
    """
    from rlhf.config import GatesConfig

    rng = np.random.default_rng([pairs, round(1000 * true)])
    rules = GatesConfig().reward_model
    rejected = 0
    for _ in range(runs):
        right = (rng.random(pairs) < true).astype(float)
        sides = np.where(rng.random(pairs) < 0.5, "longer", "shorter").tolist()
        weights = {"longer": 0.5, "shorter": 0.5}
        controlled = stratified_share(right.tolist(), range(pairs), sides, weights)
        metrics = {
            **scores,
            **share_of(right.tolist()).metrics("accuracy"),
            **controlled.metrics("length_controlled_accuracy"), "n": pairs, "prompts": pairs,
        }  # fmt: skip
        rejected += not judge("gate-reward-model", "model", metrics, rules).approved
    return rejected / runs
