"""Sizes of held-out data: rules that they can't meet, and the comparison's power.

Both are known once the data are, before any training.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from rlhf.config import GateRule, PipelineConfig
from rlhf.config.metric_names import is_share
from rlhf.errors import ConfigError
from rlhf.inference import detectable_share, prompts_needed, share_bound

#: Share of right answers with which a rule has to be met; half way from a higher bound to 1.
RIGHT = 0.9
#: True win rate whose number of prompts is told, and the power for it.
EXAMPLE, POWER = 0.6, 0.8
#: Variance of win rates between prompts, which further samples of a prompt do not lower. With it a
#: prompt's mean of 4 samples has a standard deviation of 0.35, and of one sample 0.5.
BETWEEN_PROMPTS = 0.08
#: Most rows among which the number that a rule needs is searched.
_MOST = 10_000


@dataclass(frozen=True)
class Sizes:
    """Numbers of held-out rows that the gates' metrics are measured on."""

    pairs: int
    pair_prompts: int
    """Different prompts of the pairs."""
    prompts: int
    """Gate prompts that the policy answers."""
    samples: int = 1
    """Replies sampled to each."""
    are_frozen: bool = False
    """Whether the gate prompts are those of the champion."""


def check_gate_sizes(config: PipelineConfig, sizes: Sizes, *, has_champion: bool) -> None:
    """Refuse gates that a good model could not pass with so few held-out rows.

    A rule on the end of an interval of a share has to be met with 90 % of the observations right,
    rounded down, as if all were independent.

    Raises:
        ConfigError: It names the gate, the number of rows, the number needed, the setting to raise.
    """
    for gate, rules in (
        ("reward_model", config.gates.reward_model),
        ("policy", config.gates.policy),
    ):
        for rule in rules or ():
            for need in _needs(rule):
                _check(config, sizes, gate, rule.metric, need)
    champion = config.gates.champion
    if champion is not None and has_champion:
        need = _Need(0.5, champion.look_confidence, "low")
        _check(config, sizes, "champion", "champion.win_rate", need)


def spread_of(samples: int) -> float:
    """Return the standard deviation of a prompt's mean of some samples, before it is measured.

    √(τ² + (0.25 − τ²)/k) at a win rate of a half: τ² is the variance between prompts
    (`BETWEEN_PROMPTS`), and the rest of a coin's variance of 0.25 is within a prompt.
    """
    return math.sqrt(BETWEEN_PROMPTS + (0.25 - BETWEEN_PROMPTS) / samples)


def describe_power(config: PipelineConfig, sizes: Sizes) -> str:
    """Return in a sentence what the comparison with a champion can find with these gate prompts."""
    champion = config.gates.champion
    if champion is None:
        return "gates.champion = none: the policy is not compared with the champion"
    confidence, spread = champion.look_confidence, spread_of(sizes.samples)
    found = detectable_share(0.5, sizes.prompts, spread, confidence, POWER)
    words = (
        f"a policy that truly wins {found:.1%} of its comparisons with the champion"
        if found
        else "not even a policy that wins every comparison with the champion"
    )
    needed = prompts_needed(EXAMPLE, 0.5, spread, confidence, POWER)
    times = f" × {sizes.samples} replies" if sizes.samples > 1 else ""
    return (
        f"{sizes.prompts:,} gate prompts{times}: {words} is found better in {POWER * 5:.0f} of 5 "
        f"runs (at {confidence:.1%} confidence, for each of {champion.looks} looks); to find one "
        f"that wins {EXAMPLE:.0%} takes {needed:,} prompts"
    )


@dataclass(frozen=True)
class _Need:
    """A bound on one end of the interval of a share."""

    bound: float
    confidence: float
    """One-sided."""
    end: str

    def is_met(self, observations: int, prompts: int) -> bool:
        """Return whether 90 % right, or wrong, of the observations meet the bound."""
        least = self.bound if self.end == "low" else 1 - self.bound
        right = math.floor(max(RIGHT, (1 + least) / 2) * observations)
        low, _ = share_bound(right / observations, observations, prompts, self.confidence)
        return low >= least

    def more(self, prompts: int, samples: int) -> int | None:
        """Return the next larger number of prompts that suffices; None if none does."""
        numbers = range(max(prompts + 1, 2), _MOST)
        return next((n for n in numbers if self.is_met(n * samples, n)), None)


def _needs(rule: GateRule) -> Iterator[_Need]:
    """Yield the bounds of a rule on ends of an interval, as far as they are numbers."""
    end = rule.on
    name = rule.metric
    for suffix in ("low", "high"):
        if rule.on == "estimate" and name.endswith(f"_{suffix}"):
            end, name = suffix, name.removesuffix(f"_{suffix}")
    bound = {"low": rule.min, "high": rule.max}.get(end)
    if isinstance(bound, int | float) and is_share(name) and not rule.slices:
        yield _Need(float(bound), rule.confidence or 0.975, end)


def _check(config: PipelineConfig, sizes: Sizes, gate: str, metric: str, need: _Need) -> None:
    part = metric.rpartition(".")[0]
    measured = {
        "": (sizes.pairs, sizes.pair_prompts, "held-out pairs"),
        "sampled": (sizes.prompts * sizes.samples, sizes.prompts, "gate prompts"),
        "greedy": (sizes.prompts, sizes.prompts, "gate prompts"),
        "champion": (sizes.prompts * sizes.samples, sizes.prompts, "gate prompts"),
    }
    # How many rows a slice has, or a probe, is not known before the evaluation.
    if part not in measured or (part == "" and gate != "reward_model"):
        return
    observations, prompts, what = measured[part]
    if observations >= 1 and need.is_met(observations, prompts):
        return
    count = prompts if part else observations
    sign = "≥" if need.end == "low" else "≤"
    needed = need.more(count, sizes.samples if part in ("sampled", "champion") else 1)
    if needed is None:
        more = "no number of them is enough; choose another bound"
    else:
        more = f"{needed} are needed; {_cure(config, sizes, gate, bool(part))}"
    name, side = metric.removesuffix(f"_{need.end}"), {"low": "lower", "high": "upper"}[need.end]
    raise ConfigError(
        f"gates.{gate}: the {need.confidence * 100:g} % {side} end of {name} {sign} "
        f"{need.bound:g} can't be met with {count} {what}, unless nearly all are right; {more}"
    )


def _cure(config: PipelineConfig, sizes: Sizes, gate: str, is_policy: bool) -> str:
    """Return the setting that gives more held-out rows."""
    data, evaluation = config.data, config.evaluation
    alternative = f"or change the rule in gates.{gate}"
    if gate == "champion":
        alternative = "lower gates.champion.looks, or set gates.champion to none"
    if is_policy and sizes.are_frozen:
        return (
            f"set another data.rotation than {data.rotation}, with more held-out prompts (the "
            f"champion's are used until then), {alternative}"
        )
    if is_policy and sizes.prompts >= evaluation.prompts:
        return f"raise evaluation.prompts = {evaluation.prompts}, {alternative}"
    if data.source == "world":
        name = "eval_prompts" if is_policy else "eval_pairs"
        return f"raise data.world.{name} = {getattr(data.world, name)}, {alternative}"
    if data.eval_source is not None:
        return f"give more rows in data.eval_source, {alternative}"
    return f"give more data, raise data.eval_fraction = {data.eval_fraction:g}, {alternative}"
