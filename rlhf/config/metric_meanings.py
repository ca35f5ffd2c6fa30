"""Meanings of the metrics that a gate may name, one line each."""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from rlhf.config.metric_names import ENDS, METRICS, Part, needs_of

_LEAVES = {
    "accuracy": "share of held-out pairs whose preferred reply gets the higher score; a tie is ½",
    "baseline_longer": "the same for choosing the longer reply",
    "baseline_format": "the same for choosing by format (lists, headings, code)",
    "length_controlled_accuracy": "accuracy with pairs weighted so that length is no help",
    "prefers_longer": "share of pairs in which the longer reply gets the higher score",
    "margin_mean": "mean score of the preferred reply less that of the other",
    "score_mean": "mean score of all replies",
    "score_std": "standard deviation of the scores",
    "log_loss": "negative log-likelihood of the labels, in nats; 0.693 is a coin's",
    "log_loss_calibrated": "the same at the fitted temperature",
    "brier": "mean squared error of the predicted preference; 0.25 is a coin's",
    "ece": "expected calibration error of the predicted preference",
    "ece_chance": "what calibration error chance alone gives with so many pairs",
    "temperature": "factor on the margins that calibrates them; above 1 they were too certain",
    "ceiling": "accuracy of the gold score on the same noisy labels",
    "share_of_ceiling": "accuracy as a share of that",
    "rises": "share of replies whose score rises by the probe's change",
    "mean_change": "mean change of the score by the probe's change",
    "heads": "number of members of the reward model",
    "disagreement_mean": "mean disagreement of the members, in deviations of the scores",
    "n": "pairs, or prompts, that were evaluated",
    "prompts": "different prompts among them",
    "samples_per_prompt": "replies that each policy samples to a prompt",
    "pairs_cut": "pairs of which the model read a cut reply",
    "pairs_equal_when_cut": "pairs left out, as their replies are equal where the model cuts them",
    "prompts_shortened": "prompts that lost whole turns to fit",
    "prompts_too_long": "prompts left out, as they are too long for a model",
    "prompts_refused": "prompts left out, as the chat template refuses them",
    "system_turns_refused": "prompts left out for a system turn that the template refuses",
    "win_rate": "share of the policy's replies that the reward model scores higher; a tie is ½",
    "judge_win_rate": "the same by the judge, which PPO never sees",
    "gold_win_rate": "the same by the gold score",
    "gold_strict_win_rate": "share of replies with a higher gold score; a tie is none",
    "gold_not_worse": "share of replies with at least the gold score of the other policy's",
    "reward_difference": "mean score by the reward model, less that of the other policy",
    "judge_difference": "mean score by the judge, less that of the other policy",
    "gold_difference": "mean gold score, less that of the other policy",
    "disagreement_difference": "disagreement of the members, less that on the other policy",
    "gap": "win rate by the judge less that by the reward model; below 0 hints at exploitation",
    "kl": "KL from the SFT policy, in nats per reply",
    "kl_exact": "the same from whole distributions, with less noise",
    "eos_rate": "share of the replies that end by an end token or a stop sequence",
    "nll_difference": "rise of the loss on held-out demonstrations; above 0 the policy forgets",
    "reward": "mean score by the reward model",
    "judge": "mean score by the judge",
    "gold": "mean gold score",
    "disagreement": "mean disagreement of the reward model's members",
    "tokens": "mean length of the replies in tokens",
    "repetition": "share of the words that repeat a sequence of words",
    "distinct_1": "share of different words",
    "distinct_2": "share of different pairs of words",
    "refusal": "share of replies that begin like a refusal (English)",
    "entropy": "mean entropy of a token's distribution, in nats",
    "nll": "loss on held-out demonstrations, in nats per token",
    "perplexity": "its exponential",
}
_SIDES = {"before": "of the SFT policy", "after": "of the policy"}
_CHAMPION_SIDES = {"before": "of the champion", "after": "of the policy"}
#: Parts of the evaluations, as headings.
PARTS = {
    "reward_model": {
        "": "whole evaluation", "members": "members of the reward model, on average",
        "worst": "worst slice", "by_group.*": "each group of prompts", "by_slice.*": "each slice",
        "probes.*": "each probe",
    },
    "policy": {
        "": "whole evaluation", "judge": "the judge itself, on held-out pairs",
        "sampled": "sampled replies against SFT's", "greedy": "greedy replies against SFT's",
        "champion": "sampled replies against the champion's",
        "champion.own": "the champion's own replies",
        "forgetting": "held-out demonstrations, against SFT",
        "sampled.by_group.*": "each group of prompts", "greedy.by_group.*": "each group of prompts",
        "champion.by_group.*": "each group of prompts",
    },
}  # fmt: skip


#: Parts with the names of another part.
ALIKE = {
    "by_group.*": "worst", "by_slice.*": "worst", "greedy": "sampled", "champion": "sampled",
    "sampled.by_group.*": "sampled", "greedy.by_group.*": "sampled",
    "champion.by_group.*": "sampled",
}  # fmt: skip


class MetricMeaning(NamedTuple):
    """A metric that a gate may name."""

    gate: str
    part: str
    """Its path; empty for the whole evaluation."""
    title: str
    name: str
    meaning: str
    has_interval: bool
    """Whether a rule may be on its lower or upper end (`on: low`)."""
    needs: tuple[str, ...]
    """What a run must have, or the metric is missing."""


def metric_meanings(gate: str) -> Iterator[MetricMeaning]:
    """Yield the metrics of a gate's evaluation, part by part, without the ends of intervals."""
    for path, part in METRICS[gate].items():
        estimates = {*part.shares, *part.means}
        for leaf in (*part.shares, *part.means, *part.numbers):
            name = f"{path}.{leaf}" if path else leaf
            yield MetricMeaning(
                gate, path, PARTS[gate][path], name, _meaning(path, part, leaf), leaf in estimates,
                tuple(sorted(needs_of(name))),
            )  # fmt: skip


def _meaning(path: str, part: Part, leaf: str) -> str:
    """Return what a metric says.

    Raises:
        KeyError: It has no meaning here.
    """
    if leaf in _LEAVES:
        of = _SIDES["after"] if leaf == "eos_rate" and "eos_rate_before" in part.numbers else ""
        return f"{_LEAVES[leaf]} {of}".strip()
    stem, _, side = leaf.rpartition("_")
    sides = _CHAMPION_SIDES if path.startswith("champion") else _SIDES
    return f"{_LEAVES[stem]}, {sides[side]}"


#: What the endings of an estimate's names mean.
END_MEANINGS = dict(
    zip(
        ENDS,
        (
            "(lower end)", "(upper end)", "(effective observations)", "(standard error)",
        ),
        strict=True,
    )
)  # fmt: skip
