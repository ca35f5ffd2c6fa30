"""Section of the watchdog, which judges PPO's policy on held-out prompts while it trains."""

from __future__ import annotations

from pydantic import Field

from rlhf.config.numbers import Count, Factor, Measure
from rlhf.config.section import Section


class WatchdogConfig(Section):
    """Looks at the policy during PPO, reasons to stop, and the choice of what goes on.

    Thresholds that compare with the start compare with the SFT policy on the same prompts. They are
    far outside of what a healthy run does: a stop costs the rest of a run.
    """

    every: Count = Field(default=4, ge=1)
    """Updates between two looks, beside those at the start and after the last update. With
    `prompts` it decides the cost: the defaults are an eighth of the replies that PPO's own default
    chunk samples, and are not optimised on."""
    prompts: Count = Field(default=64, ge=8)
    """Prompts of a look, out of those of the judge split. A mean over 64 prompts is known to an
    eighth of the scores' deviation; more find a fall sooner."""
    patience: Count = Field(default=2, ge=1)
    """Looks in a row that must have the same reason before the run stops. One of them can be an
    outlier; the policy of before is retained meanwhile, so that waiting costs time alone."""
    false_alarms: float = Field(default=0.05, gt=0, lt=0.5)
    """Largest probability that a run whose judge's score does not fall is stopped as
    over-optimised; it is divided among all looks, and all earlier looks that each is compared
    with."""
    max_kl: Factor | None = Field(default=30.0, gt=0)
    """Most KL to the SFT policy in nats a reply; none: no limit. 30 is five times the default
    `kl_target`: the policy's replies are then e³⁰ times as likely as under the SFT policy, and
    the reward model has seen nothing like them."""
    min_entropy: float = Field(default=0.02, ge=0, lt=1)
    """Least entropy a token, as a share of the start's; 0: no limit. Healthy runs keep a tenth to
    a half; below a fiftieth all replies to a prompt are one, and nothing is left to learn from."""
    max_length: Factor | None = Field(default=4.0, gt=1)
    """Longest mean reply, as a multiple of the start's; none: no limit. PPO often doubles lengths
    (Singhal et al. 2023); four times is what a reward for length alone does."""
    min_eos: float = Field(default=0.5, ge=0, lt=1)
    """Least share of replies that end by themselves, as a share of the start's; 0: no limit. It has
    no effect where fewer than a fifth end at the start."""
    min_explained_variance: Measure | None = Field(default=-1.0, lt=0)
    """Least explained variance of the critic, as the mean since the last look, where its loss is
    above ten times that of predicting the start's mean reward; none: no limit. At −1 its errors
    are twice the variance of the returns: advantages are noise of its making."""
