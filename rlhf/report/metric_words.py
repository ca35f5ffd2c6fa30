"""Names of metrics in words."""

from __future__ import annotations

import re

from rlhf.report.text import words

#: Metrics of both evaluations; other names are made of their own words.
NAMES = {
    "accuracy": "Accuracy",
    "baseline_longer": "Accuracy of choosing the longer reply",
    "baseline_format": "Accuracy of choosing by format",
    "length_controlled_accuracy": "Accuracy where length is no help",
    "prefers_longer": "How often it prefers the longer reply",
    "log_loss": "Log-loss",
    "log_loss_calibrated": "Log-loss at the fitted temperature",
    "temperature": "Fitted temperature",
    "rises": "How often the score rises",
    "brier": "Brier score",
    "ece": "Expected calibration error",
    "margin_mean": "Mean margin",
    "win_rate": "Win rate by the reward model",
    "judge_win_rate": "Win rate by the judge",
    "gold_win_rate": "Win rate by gold",
    "reward": "Reward",
    "judge": "Judge's score",
    "gold": "Gold score",
    "gap": "Win rate by the judge less that by the reward model",
    "kl": "KL from the SFT policy",
    "kl_exact": "KL from the SFT policy, exact",
    "eos_rate": "Replies that end by EOS",
    "tokens": "Reply length in tokens",
    "repetition": "Repetition",
    "distinct_1": "Distinct words",
    "distinct_2": "Distinct pairs of words",
    "entropy": "Entropy per token",
    "refusal": "Replies like refusals",
    "nll": "Loss on held-out demonstrations",
    "perplexity": "Perplexity on held-out demonstrations",
    "disagreement": "Disagreement of the reward model's members",
    "disagreement_mean": "Mean disagreement",
    "heads": "Number of members",
    "look": "Comparisons on these gate prompts",
    "n": "Size of the evaluation",
    "prompts": "Prompts",
}
#: Shares, which are shown in per cent; their differences are percentage points.
SHARES = {"eos_rate", "repetition", "distinct_1", "distinct_2", "refusal"}
_PARTS = {
    "sampled": "sampled replies",
    "greedy": "greedy replies",
    "champion": "against the champion",
    "own": "the champion's own",
    "forgetting": "",
    "members": "mean of the members",
    "probes": "probe",
    "by_group": "",
    "by_slice": "",
    "worst": "worst slice",
}
_ENDS = (
    ("_low", "lower bound"),
    ("_high", "upper bound"),
    ("_before", "before"),
    ("_after", "after"),
    ("_difference", "difference"),
    ("_error", "standard error"),
    ("_size", "effective size"),
)
_GROUP = re.compile(r"(?<=by_group\.|by_slice\.).+(?=\.)")


def metric_name(name: str) -> str:
    """Return a metric's dotted name in words, for example `Win rate, sampled replies`."""
    found = _GROUP.search(name)
    group = found[0] if found else ""
    *parts, last = name.replace(f".{group}.", ".", 1).split(".") if group else name.split(".")
    ends = []
    while last not in NAMES and (end := next((e for e in _ENDS if last.endswith(e[0])), None)):
        last, ends = last.removesuffix(end[0]), [end[1], *ends]
    where = [_PARTS.get(part, words(part).lower()) for part in parts]
    return ", ".join(
        text for text in (NAMES.get(last) or words(last), *ends, *where, group) if text
    )
