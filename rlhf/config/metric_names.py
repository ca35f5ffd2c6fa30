"""Names of the metrics that the evaluations write, and the check of the rules on them.

A `*` in a part's path stands for a name that the data or a probe gives, such as a group's.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from rlhf.config.gates import GateRule

#: Reason that a metric may be absent: no judge, no gold score, no champion, a single head.
Need = Literal["judge", "gold", "champion", "members"]
#: What an estimate writes beside its own name.
LOW, HIGH, SIZE, ERROR = ENDS = ("_low", "_high", "_size", "_error")
#: Parts of an evaluation that hold those of slices, by name.
SLICES = ("by_slice", "by_group")
#: Most names that an error suggests.
_NEIGHBOURS = 3


@dataclass(frozen=True)
class Part:
    """Metrics of one part of an evaluation."""

    shares: tuple[str, ...] = ()
    """Shares with an interval."""
    means: tuple[str, ...] = ()
    """Means with an interval."""
    numbers: tuple[str, ...] = ()
    """Numbers without one."""

    def names(self) -> Iterator[str]:
        """Yield the names of all its metrics."""
        for name in (*self.shares, *self.means):
            yield name
            yield from (name + end for end in ENDS)
        yield from self.numbers


def _beside(*names: str) -> tuple[str, ...]:
    """Return the names of metrics of both policies."""
    return tuple(f"{name}_{side}" for name in names for side in ("before", "after"))


#: Numbers of rows that models could not be given whole.
COUNTS = (
    "pairs_cut", "pairs_equal_when_cut", "prompts_shortened", "prompts_too_long", "prompts_refused",
    "system_turns_refused",
)  # fmt: skip
_ACCURACY = Part(shares=("accuracy",), numbers=("n", "prompts", "ceiling", "share_of_ceiling"))
REWARD_MODEL: Mapping[str, Part] = {
    "": Part(
        shares=(
            "accuracy", "baseline_longer", "baseline_format", "length_controlled_accuracy",
            "prefers_longer",
        ),
        numbers=(
            "n", "prompts", "margin_mean", "score_mean", "score_std", "log_loss", "brier", "ece",
            "ece_chance", "temperature", "log_loss_calibrated", "ceiling", "share_of_ceiling",
            *COUNTS,
        ),
    ),
    "by_group.*": _ACCURACY,
    "by_slice.*": _ACCURACY,
    "worst": _ACCURACY,
    "members": Part(shares=("accuracy",), numbers=("n", "prompts", "heads", "disagreement_mean")),
    "probes.*": Part(shares=("rises",), means=("mean_change",), numbers=("n", "prompts")),
}  # fmt: skip
_SCORES = ("reward", "judge", "gold")
_TEXTS = ("tokens", "repetition", "distinct_1", "distinct_2", "refusal")
_AGAINST = Part(
    shares=("win_rate", "judge_win_rate", "gold_win_rate"),
    means=(
        "reward_difference", "judge_difference", "gold_difference", "disagreement_difference",
        "gap",
    ),
    numbers=(
        "n", "eos_rate", "eos_rate_before", "gold_not_worse", "gold_strict_win_rate",
        *_beside(*_SCORES, "disagreement", *_TEXTS),
    ),
)  # fmt: skip
_GREEDY = Part(_AGAINST.shares, (*_AGAINST.means, "kl"), _AGAINST.numbers)
_SAMPLED = Part(
    _AGAINST.shares, (*_GREEDY.means, "kl_exact"), (*_AGAINST.numbers, *_beside("entropy"))
)
_CHAMPION = Part(_AGAINST.shares, _AGAINST.means, (*_AGAINST.numbers, *_beside("entropy")))
POLICY: Mapping[str, Part] = {
    "": Part(numbers=("n", "samples_per_prompt")),
    "judge": Part(shares=("accuracy",), numbers=("n", "prompts")),
    "sampled": _SAMPLED,
    "sampled.by_group.*": _SAMPLED,
    "greedy": _GREEDY,
    "greedy.by_group.*": _GREEDY,
    "champion": _CHAMPION,
    "champion.by_group.*": _CHAMPION,
    "champion.own": Part(numbers=("eos_rate", "entropy", "disagreement", *_SCORES, *_TEXTS)),
    "forgetting": Part(
        means=("nll_difference",), numbers=("n", *_beside("nll", "perplexity")),
    ),
}  # fmt: skip
#: Metrics of the evaluation that each gate reads.
METRICS = {"reward_model": REWARD_MODEL, "policy": POLICY}
#: Metrics from 0 to 1 without an interval, and those that are 0 or more.
_FRACTIONS = {
    "eos_rate", "repetition", "distinct_1", "distinct_2", "refusal", "gold_not_worse",
    "gold_strict_win_rate", "brier", "ece", "ece_chance", "ceiling",
}  # fmt: skip
_NOT_NEGATIVE = {
    "n", "prompts", "samples_per_prompt", "tokens", "entropy", "log_loss", "log_loss_calibrated",
    "temperature", "score_std", "heads", "disagreement", "disagreement_mean", "perplexity", "nll",
    "kl_exact", *COUNTS,
}  # fmt: skip
_SHARES = {name for parts in METRICS.values() for part in parts.values() for name in part.shares}


def certain_names(gate: str, absent: set[Need]) -> set[str]:
    """Return the names of all metrics but those of slices and probes, and of what is absent."""
    return {
        name
        for path, part in METRICS[gate].items()
        if "*" not in path
        for leaf in part.names()
        if not needs_of(name := f"{path}.{leaf}" if path else leaf) & absent
    }


def is_share(name: str) -> bool:
    """Return whether an estimate with this name is a share; else it is a mean."""
    return name.rpartition(".")[2] in _SHARES


def part_of(name: str, gate: str) -> tuple[str, Part] | None:
    """Return path and part of a metric; None if no evaluation of this gate writes it."""
    for path, part in METRICS[gate].items():
        for leaf in part.names():
            pattern = re.escape(f"{path}.{leaf}" if path else leaf).replace(r"\*", ".+")
            if re.fullmatch(pattern, name):
                return path, part
    return None


def needs_of(name: str) -> set[Need]:
    """Return what a metric needs, without which an evaluation does not have it."""
    first, _, leaf = name.rpartition(".")
    part = first.partition(".")[0]
    needs: set[Need] = {"champion"} if part == "champion" else set()
    if leaf.startswith(("gold", "ceiling", "share_of_ceiling")):
        needs.add("gold")
    if leaf.startswith(("judge", "gap")) or part == "judge":
        needs.add("judge")
    if leaf.startswith("disagreement") or part == "members":
        needs.add("members")
    return needs


def check_rules(gate: str, rules: Sequence[GateRule], absent: Mapping[Need, str]) -> None:
    """Refuse rules on metrics that the evaluation does not write.

    Args:
        gate: Name of the rules in the section `gates`.
        rules: The rules.
        absent: Reasons why what metrics need is absent with this configuration, by need.

    Raises:
        ValueError: A rule is on an unknown metric, or on one that is always absent; it says which.
    """
    for index, rule in enumerate(rules):
        field = f"gates.{gate}.{index}"
        for key in ("metric", "min", "max"):
            name = getattr(rule, key)
            if isinstance(name, str):
                _check_name(name, f"{field}.{key} = {name!r}", gate, rule, absent)
        _check_range(rule, field)
        if rule.on != "estimate" and part_of(f"{rule.metric}_{rule.on}", gate) is None:
            raise ValueError(
                f"{field}.on = {rule.on!r}: {rule.metric} has no interval; set on to estimate"
            )
        if rule.slices:
            _check_slices(rule, field, gate)


def range_of(name: str) -> tuple[float, float]:
    """Return the least and the largest value that a metric can have."""
    leaf = name.rpartition(".")[2]
    for end in (SIZE, ERROR):
        if leaf.endswith(end):
            return 0.0, math.inf
    plain = leaf.removesuffix(LOW).removesuffix(HIGH)
    for side in ("_before", "_after"):
        plain = plain.removesuffix(side)
    if plain in _SHARES or plain in _FRACTIONS:
        return 0.0, 1.0
    return (0.0, math.inf) if plain in _NOT_NEGATIVE else (-math.inf, math.inf)


def _check_range(rule: GateRule, field: str) -> None:
    """Refuse a bound that no value of the metric can meet."""
    least, most = range_of(rule.metric)
    for key, bound in (("min", rule.min), ("max", rule.max)):
        if isinstance(bound, str) or bound is None:
            continue
        if (key == "min" and bound > most) or (key == "max" and bound < least):
            values = f"from {least:g} to {most:g}" if most < math.inf else f"{least:g} or more"
            cure = (
                f"; write {bound / 100:g} for {bound:g} %"
                if key == "min" and most < bound <= 100
                else "; correct it"
            )
            raise ValueError(
                f"{field}.{key} = {bound:g} can't be met: {rule.metric} is {values}{cure}"
            )


def _check_name(
    name: str, field: str, gate: str, rule: GateRule, absent: Mapping[Need, str]
) -> None:
    if part_of(name, gate) is None:
        if name[:1].isdigit() or set(name) & set("*/+() "):
            raise ValueError(
                f"{field} is neither a number nor the name of a metric; write a number without "
                "quotes, or a metric's name with factor and margin beside it (docs/gates.md)"
            )
        raise ValueError(
            f"{field} is no metric of this evaluation; {_suggestion(name, gate)} (docs/gates.md)"
        )
    reasons = [reason for need, reason in absent.items() if need in needs_of(name)]
    if reasons and rule.if_missing == "fail":
        raise ValueError(
            f"{field} can't be relied on, because {reasons[0]}; set if_missing: skip, which "
            "shows it as not measured then, or remove the rule"
        )


def _check_slices(rule: GateRule, field: str, gate: str) -> None:
    parent, dot, leaf = rule.metric.rpartition(".")
    for name in (rule.metric, rule.min, rule.max):
        if not isinstance(name, str):
            continue
        own_parent, _, own = name.rpartition(".")
        paths = [f"{parent}{dot}{slices}.x.{own}" for slices in SLICES]
        if own_parent != parent or not any(part_of(path, gate) for path in paths):
            raise ValueError(
                f"{field}.slices = true: the evaluation has no {own} of slices beside {leaf}; set "
                "slices to false, or take a metric that slices have, such as "
                + ("accuracy" if gate == "reward_model" else "sampled.win_rate")
            )


def _suggestion(name: str, gate: str) -> str:
    """Return the known names that are most like one."""
    slice_name = re.search(r"(?:by_group|by_slice|probes)\.(.+)\.[^.]*$", name)
    known = [
        (f"{path}.{leaf}" if path else leaf).replace("*", slice_name[1] if slice_name else "*")
        for path, part in METRICS[gate].items()
        if slice_name or "*" not in path
        for leaf in part.names()
    ]
    same_end = [each for each in known if each.endswith(f".{name}")]
    close = difflib.get_close_matches(name, known, n=_NEIGHBOURS, cutoff=0.6)
    names = [*dict.fromkeys((*same_end, *close))][:_NEIGHBOURS]
    if not names:
        return f"choose one such as {', '.join(known[:: len(ENDS) + 1][:_NEIGHBOURS])}"
    return f"did you mean {' or '.join(names)}?"
