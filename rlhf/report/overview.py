"""Overview of a run: figures before and after PPO, how many prompts, and what stands out.

The page, the terminal, the summary in Prefect's UI and the form of an approval show the same one.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from rlhf.report.findings import counted, find
from rlhf.report.symptoms import Facts, Finding, value_of
from rlhf.report.text import number, percent

#: Where a reward is shown: evaluations leave out what PPO subtracts from replies without an end.
REWARD_NOTE = "the reward model's score alone"
#: Least mean cost of missing ends for which the reward is shown as PPO counts it, too: half a
#: tenth is seen in figures of two decimals.
LEAST_PENALTY = 0.05
#: Reward functions that are the reward model's score.
_MODEL_SCORES = (None, "default")


@dataclass(frozen=True)
class Figure:
    """One measure of the replies under SFT and after PPO."""

    name: str
    label: str
    before: float | None
    after: float
    is_share: bool = False
    note: str = ""

    @property
    def texts(self) -> tuple[str, str]:
        """Both values as text."""
        form = percent if self.is_share else number
        return form(self.before), form(self.after)

    @property
    def line(self) -> str:
        """The figure in one line: `Reply length: 26.5 → 31.0 tokens`."""
        note = f" ({self.note})" if self.note else ""
        return f"{self.label}: {' → '.join(self.texts)}{note}"


@dataclass(frozen=True)
class Overview:
    """First screen of a run: figures before and after PPO, and findings."""

    figures: tuple[Figure, ...] = ()
    sample: str = ""
    """On what the figures were measured."""
    findings: tuple[Finding, ...] = ()

    @property
    def alarm(self) -> str:
        """Number of serious findings and warnings, in words; empty without either."""
        return counted(self.findings)


def make_overview(facts: Facts) -> Overview:
    """Return the overview of a run."""
    return Overview(tuple(_figures(facts)), _sample(facts), find(facts))


def _figures(facts: Facts) -> Iterator[Figure]:
    after = facts.metric("reward_after")
    if after is not None:
        yield Figure("reward", "Reward", facts.metric("reward_before"), after, note=REWARD_NOTE)
        yield from _training_reward(facts)
    rows: tuple[tuple[str, str, str, Literal["", "%"], str], ...] = (
        ("judge", "Judge's score", "judge", "", ""),
        ("eos_rate", "Replies that end", "eos_rate", "%", ""),
        ("tokens", "Reply length", "tokens", "", "tokens"),
    )
    for name, label, key, unit, note in rows:
        before = facts.metric(f"{key}_before")
        after = facts.metric(key if key == "eos_rate" else f"{key}_after")
        if after is not None:
            yield Figure(name, label, before, after, unit == "%", note)


def _training_reward(facts: Facts) -> Iterator[Figure]:
    """Yield the reward as PPO counts it, if that differs and is known from the means."""
    change, ends = facts.change("reward"), facts.change("eos_rate")
    penalty = value_of(facts.value("ppo.missing_eos_penalty"))
    is_known = (
        facts.value("ppo.missing_eos") == "subtract"
        and facts.value("ppo.reward_fn") in _MODEL_SCORES
        and facts.value("ppo.env_type") in (None, "text_generation")
        and not facts.value("ppo.multi_objective")
    )
    if change is None or ends is None or not penalty or not is_known:
        return
    costs = [penalty * (1 - share) for share in (ends.before, ends.after)]
    if max(costs) < LEAST_PENALTY:
        return
    yield Figure(
        "training_reward", "Reward as PPO counts it", change.before - costs[0],
        change.after - costs[1],
        note=f"less {number(penalty)} for a missing end",
    )  # fmt: skip


def _sample(facts: Facts) -> str:
    """Return on how many prompts and replies the figures rest."""
    n = value_of(facts.sampled.get("n"))
    if n is None:
        return ""
    replies = value_of(facts.policy.get("samples_per_prompt"))
    each = "" if replies is None else f" × {number(int(replies))} sampled replies"
    return f"{number(int(n))} held-out prompts{each} of each policy"
