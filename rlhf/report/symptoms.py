"""Findings of a run, and the numbers that they are found in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from rlhf.gates import Verdict
from rlhf.report.reward_model import signed
from rlhf.report.text import LARGEST, interval, number, number_of, percent, percent_range, points

#: `serious`: the policy got worse or can't be trusted; `warning`: look at it before using the
#: policy; `note`: true of the run, and often harmless.
Severity = Literal["serious", "warning", "note"]
SEVERITIES: tuple[Severity, ...] = ("serious", "warning", "note")


@dataclass(frozen=True)
class Finding:
    """One thing that stands out in a run, and the change that cures it."""

    symptom: str
    """Name of the symptom, as in docs/findings.md."""
    severity: Severity
    text: str
    """A sentence with the run's own numbers."""
    cure: str
    """A sentence with the parameters to change, and the direction."""


class Change(NamedTuple):
    """A measure before and after PPO, with the 95 % interval of the change if there is one."""

    before: float
    after: float
    low: float | None = None
    high: float | None = None

    def certainty(self, sign: int) -> Literal["sure", "likely", ""]:
        """Return how sure it is that the measure rose (sign 1) or fell (−1).

        `sure` means that the interval excludes no change, `likely` that the change is beyond one
        standard error: by chance alone one of six runs has that much.
        """
        step = sign * (self.after - self.before)
        if not step > 0:
            return ""
        if self.low is None or self.high is None:
            return "likely"
        if (self.low if sign > 0 else -self.high) > 0:
            return "sure"
        # A 95 % interval is four standard errors wide.
        return "likely" if step > (self.high - self.low) / 4 else ""


@dataclass(frozen=True)
class Facts:
    """Numbers of a run; any part may be missing, and its values may be anything."""

    policy: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The policy's `evaluation.json`."""
    curve: Sequence[Mapping[str, Any]] = ()
    """A row per PPO update."""
    watchdog: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """PPO's `watchdog.json`."""
    sft: Sequence[Mapping[str, Any]] = ()
    """A row per logged step of SFT."""
    sft_metrics: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """Metrics of the SFT stage."""
    reward_model: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The reward model's `evaluation.json`."""
    card: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The data's `card.json`."""
    verdicts: Sequence[Verdict] = ()
    """The gates' verdicts."""
    settings: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """The configuration's values by dotted name."""

    @classmethod
    def of(
        cls, *, policy: Any = None, curve: Any = None, watchdog: Any = None, sft: Any = None,
        sft_metrics: Any = None, reward_model: Any = None, card: Any = None,
        verdicts: Sequence[Verdict] = (), settings: Any = None,
    ) -> Facts:  # fmt: skip
        """Take the parts of a run as they were read; what has another shape counts as missing."""
        return cls(
            policy=mapping(policy), curve=rows_of(curve), watchdog=mapping(watchdog),
            sft=rows_of(sft), sft_metrics=mapping(sft_metrics),
            reward_model=mapping(reward_model), card=mapping(card),
            verdicts=verdicts, settings=mapping(settings),
        )  # fmt: skip

    @property
    def sampled(self) -> Mapping[str, Any]:
        """Metrics of the sampled replies."""
        return mapping(self.policy.get("sampled"))

    @property
    def prompts(self) -> str:
        """Number of held-out prompts, as text; empty if unknown."""
        n = value_of(self.sampled.get("n"))
        return "" if n is None else f"{number(int(n))} prompts"

    def metric(self, name: str) -> float | None:
        """Return a metric of the sampled replies; None if it is missing or not finite."""
        return value_of(self.sampled.get(name))

    def change(self, name: str) -> Change | None:
        """Return a metric of the sampled replies before and after PPO; None if one is missing."""
        before = self.metric(f"{name}_before")
        after = self.metric("eos_rate" if name == "eos_rate" else f"{name}_after")
        if before is None or after is None:
            return None
        source, prefix = self.sampled, f"{name}_difference_"
        for row in rows_of(self.policy.get("shifts")):
            if row.get("metric") == name:
                source, prefix = row, ""
        ends = (value_of(source.get(f"{prefix}{end}")) for end in ("low", "high"))
        return Change(before, after, *ends)

    def value(self, name: str) -> Any:
        """Return a setting by its dotted name; None if it is unknown or none."""
        return self.settings.get(name)

    def now(self, name: str) -> str:
        """Return a setting's name with its present value: `ppo.kl_coef (now 0.05)`."""
        if name not in self.settings:
            return name
        value = self.settings[name]
        if isinstance(value, bool):
            value = str(value).lower()
        text = f"{value:g}" if isinstance(value, float) else str(value)
        return f"{name} (now {'none' if value is None else text})"

    @property
    def stay_closer(self) -> str:
        """The change that keeps a policy nearer to SFT: `raise ppo.kl_coef (now 0.05)`."""
        if self.value("ppo.kl_controller") == "adaptive":
            return f"lower {self.now('ppo.kl_target')}"
        return f"raise {self.now('ppo.kl_coef')}"

    @property
    def more_negatives(self) -> str:
        """The change by which a reward model learns what makes a reply worse."""
        present = value_of(self.value("reward_model.negatives"))
        target = 1 if present is None or present < 1 else min(4, int(present) + 1)
        return f"raise {self.now('reward_model.negatives')} to {target}"

    def wins(self, prefix: str = "") -> str:
        """Return the win rate over SFT by a scorer, with its interval."""
        return share_with_interval(self.sampled, f"{prefix}win_rate")


def value_of(value: Any) -> float | None:
    """Return a value as a number; None for what is none, or so large that it is damage."""
    number = number_of(value)
    return None if number is None or abs(number) > LARGEST else number


def share_with_interval(metrics: Mapping[str, Any], key: str) -> str:
    """Return a share as text, with its interval if that is known: `75.0 % (50.1–90.2 %)`."""
    value, low, high = (value_of(metrics.get(f"{key}{end}")) for end in ("", "_low", "_high"))
    spread = percent_range(low, high)
    return percent(value) + (f" ({spread})" if spread else "")


def moved(change: Change, facts: Facts, unit: str = "") -> str:
    """Return a change as text, with what tells how sure it is.

    For example `from 0.31 to 0.12 (95 % interval of the change −0.30 to −0.08, 300 prompts)`.

    Args:
        change: The change.
        facts: Numbers of the run.
        unit: Stands behind the value; `%` shows shares in per cent.
    """
    share = unit == "%"
    spread = interval(change.low, change.high, points if share else signed)
    spread += " points" if share and spread else ""
    known = f"95\u00a0% interval of the change {spread}" if spread else ""
    parts = ", ".join(filter(None, (known, facts.prompts)))
    evidence = f" ({parts})" if parts else ""
    before, after = (percent(x) if share else number(x) for x in (change.before, change.after))
    return f"from {before} to {after}{f' {unit}' if unit and not share else ''}{evidence}"


def capital(text: str) -> str:
    """Return a sentence with a capital at its beginning."""
    return text[:1].upper() + text[1:]


def mean_of(rows: Sequence[Mapping[str, Any]], name: str) -> float | None:
    """Return the mean of a column over the rows that have it as a finite number."""
    values = [x for row in rows if (x := value_of(row.get(name))) is not None]
    return sum(values) / len(values) if values else None


def rows_of(value: Any) -> list[Mapping[str, Any]]:
    """Return the mappings of a list; of anything else, none."""
    if not isinstance(value, list | tuple):
        return []
    return [row for row in value if isinstance(row, Mapping)]


def mapping(value: Any) -> Mapping[str, Any]:
    """Return a mapping as it is, and an empty one in place of anything else."""
    return value if isinstance(value, Mapping) else {}
