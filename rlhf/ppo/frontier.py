"""The frontier of a PPO run: looks at the policy, reasons to stop, and the choice of what goes on.

A look measures the policy on the same held-out prompts, with the same random numbers, after some
updates. All functions here are pure functions of the looks. No torch is loaded: reports read this.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from rlhf.config.watchdog import WatchdogConfig
from rlhf.inference import Estimate, mean_of, positive_mean_p_value

#: Detector of a loss that is not finite; it knows nothing of the looks.
NON_FINITE = "non_finite"
#: One-sided level at which the training reward must have risen for over-optimisation. The other
#: condition, the judge's fall, bounds the false alarms, so that this one needs no correction.
RISE_LEVEL = 0.05
#: One-sided level at which the judge must prefer a later look for it to displace the retained one:
#: that of a challenger's superiority (docs/gates.md). Judges are fooled too, by a little at first:
#: with one standard error 6 of 10 over-optimised runs went on from a worse policy than the start.
GAIN_LEVEL = 0.005
#: Share of replies that must end at the start for their loss to mean something.
LEAST_EOS = 0.2
#: How far above that the value loss of a critic is that does not only lag behind a rising reward.
#: A toy run whose reward rises by three deviations in ten updates stays below seven.
LOSS_GROWTH = 10.0


@dataclass(frozen=True)
class Look:
    """The policy after some updates: a point of the reward–KL frontier."""

    update: int
    kl: float
    """KL to the SFT policy in nats, per reply."""
    entropy: float
    """Mean entropy of a token."""
    tokens: float
    """Mean length of a reply."""
    eos_rate: float
    """Share of replies that end by themselves."""
    judges: tuple[float, ...] = ()
    """The judge's score of each prompt's reply; empty without a usable judge."""
    proxies: tuple[float, ...] = ()
    """The training reward of each prompt's reply; empty if it is known in training alone."""
    has_plain_rewards: bool = True
    """Whether `proxies` are the rewards that the critic learns, neither scaled nor clipped."""
    proxy_in_training: float | None = None
    """Mean reward of the updates since the last look, where `proxies` is empty."""
    explained_variance: float | None = None
    """Mean explained variance of the critic since the last look; at the start that of the first
    update, before the critic learns."""
    value_loss: float | None = None
    """Mean value loss since the last look."""

    @property
    def judge(self) -> Estimate | None:
        """Mean of the judge's scores."""
        return mean_of(self.judges) if self.judges else None

    @property
    def proxy(self) -> float | None:
        """Mean training reward."""
        return mean_of(self.proxies).value if self.proxies else self.proxy_in_training

    def row(self) -> dict[str, float | int | None]:
        """Return the point as a row of `watchdog.json`."""
        judge = self.judge
        return {
            "update": self.update,
            "kl": self.kl,
            "proxy": self.proxy,
            "judge": judge and judge.value,
            # With one prompt there is no interval, and JSON has no infinity.
            "judge_low": judge.low if judge and math.isfinite(judge.low) else None,
            "judge_high": judge.high if judge and math.isfinite(judge.high) else None,
            "tokens": self.tokens,
            "eos_rate": self.eos_rate,
            "entropy": self.entropy,
            "explained_variance": self.explained_variance,
        }


@dataclass(frozen=True)
class Finding:
    """Reason for which a run was stopped."""

    detector: str
    update: int
    evidence: str


@dataclass
class Frontier:
    """All looks of a run so far, the retained one, and why it was stopped."""

    looks: list[Look] = field(default_factory=list)
    retained: int = 0
    """Update of the look whose weights are retained."""
    stopped: Finding | None = None

    def add(self, look: Look, config: WatchdogConfig, planned: int) -> bool:
        """Add a look, and stop if a detector says so; return whether its weights are to retain.

        Args:
            look: Look at the current weights.
            config: Thresholds.
            planned: Looks of a whole run, without the one at the start.
        """
        self.looks.append(look)
        self.stopped = find(self.looks, config, planned)
        if len(self.looks) > 1 and not _displaces(self.looks, self._retained(), config):
            return False
        self.retained = look.update
        return True

    def choose(self, config: WatchdogConfig) -> tuple[int, str]:
        """Return the update whose policy goes on, and the reason in a sentence.

        That is the last one, unless a detector stopped the run, the last one is beyond a limit, or
        the judge prefers the retained one by more than a standard error: within noise two judges,
        the training reward and this one, do not agree that something was lost.
        """
        last, retained = self.looks[-1], self._retained()
        if self.stopped:
            by = "the last that the judge found better" if retained.judges else "the last in limits"
            return retained.update, f"update {retained.update} goes on: {by} before the stop"
        if retained.update == last.update:
            return last.update, "the last update goes on"
        reasons = _beyond_limits(self.looks, config)
        if reasons:
            return retained.update, f"update {retained.update} goes on: at the last {reasons[0]}"
        loss = _difference(retained, last)
        if loss and loss.value > loss.error:
            return retained.update, (
                f"update {retained.update} goes on: the judge scores its replies "
                f"{loss.value:.3f} ± {loss.error:.3f} higher than those of the last update"
            )
        return last.update, "the last update goes on: the judge knows none that is better"

    @property
    def has_gained(self) -> bool:
        """Whether the judge prefers the retained policy to the start, beyond noise."""
        return _is_better(self._retained(), self.looks[0])

    def _retained(self) -> Look:
        return next(look for look in self.looks if look.update == self.retained)

    def state_dict(self) -> dict[str, Any]:
        """State for a checkpoint, as JSON values."""
        return asdict(self)

    @classmethod
    def of(cls, state: Mapping[str, Any]) -> Frontier:
        """Restore what `state_dict` returned."""
        looks = [
            Look(**{**row, "judges": tuple(row["judges"]), "proxies": tuple(row["proxies"])})
            for row in state["looks"]
        ]
        stopped = state["stopped"] and Finding(**state["stopped"])
        return cls(looks, state["retained"], stopped)


def find(looks: Sequence[Look], config: WatchdogConfig, planned: int) -> Finding | None:
    """Return a reason to stop that the last `patience` looks share; None if there is none."""
    if len(looks) <= config.patience:
        return None
    for name, detector in DETECTORS.items():
        ends = range(len(looks), len(looks) - config.patience, -1)
        evidence = [detector(looks[:end], config, planned) for end in ends]
        if all(evidence):
            return Finding(name, looks[-1].update, str(evidence[0]))
    return None


def over_optimised(looks: Sequence[Look], config: WatchdogConfig, planned: int) -> str | None:
    """Detect that the judge's score fell while the training reward rose, beyond noise.

    The last look is compared with the one that the judge scored best: one-sided paired t-tests over
    prompts. The level of the fall is false_alarms / (planned · m) at the look with m earlier ones:
    Bonferroni's correction for all looks of a run, and for the choice of the best among m.
    """
    last, earlier = looks[-1], looks[:-1]
    if not earlier or not last.judges:
        return None
    best = max(earlier, key=lambda look: look.judge.value if look.judge else 0.0)
    fall = [before - after for before, after in zip(best.judges, last.judges, strict=True)]
    p = positive_mean_p_value(fall)
    if p > config.false_alarms / (planned * len(earlier)) or not _proxy_rose(best, last):
        return None
    lost = mean_of(fall)
    return (
        f"the judge's score is {lost.value:.3f} ± {lost.error:.3f} below that of update "
        f"{best.update} (p = {p:.1e} over {lost.clusters} prompts), while the training reward rose "
        f"from {best.proxy or 0:.3f} to {last.proxy or 0:.3f}"
    )


def _proxy_rose(best: Look, last: Look) -> bool:
    if best.proxies and last.proxies:
        rise = [after - before for before, after in zip(best.proxies, last.proxies, strict=True)]
        return positive_mean_p_value(rise) <= RISE_LEVEL
    return best.proxy is not None and last.proxy is not None and last.proxy > best.proxy


def kl_above_budget(looks: Sequence[Look], config: WatchdogConfig, _: int) -> str | None:
    """Detect a KL above `max_kl`."""
    kl, limit = looks[-1].kl, config.max_kl
    if limit is None or kl <= limit:
        return None
    return f"the KL is {kl:.1f} nats a reply, above ppo.watchdog.max_kl = {limit:g}"


def entropy_collapse(looks: Sequence[Look], config: WatchdogConfig, _: int) -> str | None:
    """Detect an entropy below `min_entropy` of the start's."""
    now, start = looks[-1].entropy, looks[0].entropy
    if now >= config.min_entropy * start:
        return None
    return (
        f"the entropy is {now:.2g} nats a token, {now / start:.1%} of the start's {start:.2g}; "
        f"ppo.watchdog.min_entropy = {config.min_entropy:g}"
    )


def length_explosion(looks: Sequence[Look], config: WatchdogConfig, _: int) -> str | None:
    """Detect replies longer than `max_length` times the start's."""
    now, start, limit = looks[-1].tokens, looks[0].tokens, config.max_length
    if limit is None or now <= limit * start:
        return None
    return (
        f"replies have {now:.0f} tokens on average, {now / start:.1f} times the start's "
        f"{start:.0f}; ppo.watchdog.max_length = {limit:g}"
    )


def eos_loss(looks: Sequence[Look], config: WatchdogConfig, _: int) -> str | None:
    """Detect a share of ended replies below `min_eos` of the start's."""
    now, start = looks[-1].eos_rate, looks[0].eos_rate
    if start < LEAST_EOS or now >= config.min_eos * start:
        return None
    return (
        f"{now:.1%} of the replies end by themselves, at the start {start:.1%}; "
        f"ppo.watchdog.min_eos = {config.min_eos:g}"
    )


def value_collapse(looks: Sequence[Look], config: WatchdogConfig, _: int) -> str | None:
    """Detect a critic that is worse than none, and whose error is far above the reward's spread.

    The explained variance alone also falls when all replies come to have the same reward; the
    critic's error then falls too. It lags behind a reward that rises fast, and recovers. A critic
    that was no better before has not learned yet.
    """
    now, limit, scale = looks[-1], config.min_explained_variance, _plain_loss(looks)
    explained, loss = now.explained_variance, now.value_loss
    if limit is None or explained is None or loss is None or not scale:
        return None
    if explained >= limit or loss <= LOSS_GROWTH * scale:
        return None
    before = (look.explained_variance for look in looks[:-1])
    if not any(value is not None and value >= limit for value in before):
        return None
    return (
        f"the critic's explained variance is {explained:.2f}, below "
        f"ppo.watchdog.min_explained_variance = {limit:g}, and its loss of {loss:.3g} is "
        f"{loss / scale:.0f} times what predicting the mean reward of the start costs"
    )


def _plain_loss(looks: Sequence[Look]) -> float | None:
    """Return the value loss of predicting the start's mean reward: half the reward's variance.

    Where the rewards of single replies are not known, or not in the units of the returns, it is the
    loss of the first updates.
    """
    proxies = looks[0].proxies
    if proxies and looks[0].has_plain_rewards:
        return statistics.pvariance(proxies) / 2
    return next((look.value_loss for look in looks if look.value_loss is not None), None)


Detector = Callable[[Sequence[Look], WatchdogConfig, int], str | None]

#: Detectors by name. Each returns its evidence against the last of some looks, or None; the last
#: argument is the number of looks of a whole run.
DETECTORS: Mapping[str, Detector] = {
    "kl_above_budget": kl_above_budget,
    "eos_loss": eos_loss,
    "length_explosion": length_explosion,
    "entropy_collapse": entropy_collapse,
    "value_collapse": value_collapse,
    "over_optimisation": over_optimised,
}


def _beyond_limits(looks: Sequence[Look], config: WatchdogConfig) -> list[str]:
    """Return the evidence of all detectors that need no judge against the last look."""
    found = (d(looks, config, 1) for d in DETECTORS.values() if d is not over_optimised)
    return [evidence for evidence in found if evidence]


def _displaces(looks: Sequence[Look], retained: Look, config: WatchdogConfig) -> bool:
    """Return whether the last look's weights are to be retained in place of earlier ones.

    Without a judge the last look within the limits is retained. With one, a later look, which as a
    rule has more KL, must be better beyond noise (`GAIN_LEVEL`), or no worse with less KL.
    """
    new = looks[-1]
    if _beyond_limits(looks, config):
        return False
    gain = _difference(new, retained)
    if gain is None or (gain.value >= 0 and new.kl <= retained.kl):
        return True
    return _is_better(new, retained)


def _is_better(a: Look, b: Look) -> bool:
    """Return whether the judge prefers one look to another by a one-sided paired t-test."""
    if not a.judges or not b.judges:
        return False
    gains = [x - y for x, y in zip(a.judges, b.judges, strict=True)]
    return positive_mean_p_value(gains) <= GAIN_LEVEL


def _difference(a: Look, b: Look) -> Estimate | None:
    """Return how much higher the judge scores one look's replies; None without a judge."""
    if not a.judges or not b.judges:
        return None
    return mean_of([x - y for x, y in zip(a.judges, b.judges, strict=True)])
