"""Section of the gates: rules on an evaluation's metrics, and the comparison with the champion."""

from __future__ import annotations

from typing import Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator

from rlhf.config.numbers import Count, Measure
from rlhf.config.section import Section
from rlhf.limits import MAX_PATTERN

#: Value of the metric that a rule compares: the metric itself, or an end of its interval.
End = Literal["estimate", "low", "high"]


class GateRule(Section):
    """One condition on one metric of an evaluation; a non-finite metric fails (docs/gates.md)."""

    metric: str = Field(min_length=1, max_length=MAX_PATTERN)
    """Dotted name in the evaluation's metrics, for example `sampled.win_rate`."""
    min: Measure | str | None = None
    """Lower bound (inclusive): a number, or the name of another metric."""
    max: Measure | str | None = None
    """Upper bound (inclusive): a number, or the name of another metric."""
    on: End = "estimate"
    """Value that is compared: the metric, or the low or high end of its interval."""
    confidence: float | None = Field(default=None, gt=0.5, lt=1)
    """One-sided confidence of the end that `on` names; none takes that of the evaluation's
    two-sided 95 % intervals, which is 0.975."""
    margin: Measure = 0.0
    """Added to a bound that is a metric: `{min: baseline_longer, margin: 0.05}`."""
    slices: bool = False
    """Whether the rule holds for every slice of the data, instead of for all of them together."""
    slice_n: Count = Field(default=30, ge=2)
    """Fewest prompts of a slice that is judged; smaller ones are shown."""
    if_missing: Literal["fail", "skip"] = "fail"
    """What a metric that the evaluation does not have means: the model fails, or the rule is shown
    as not measured."""

    @model_validator(mode="before")
    @classmethod
    def _on_is_a_name(cls, data: Any) -> Any:
        """Read the name `on`, which YAML 1.1 takes for the value true."""
        if not isinstance(data, dict):
            return data
        tree = cast("dict[Any, Any]", data)
        return {"on" if key is True else key: value for key, value in tree.items()}

    @model_validator(mode="after")
    def _says_something(self) -> Self:
        if self.min is None and self.max is None:
            raise ValueError("a rule needs min, max or both; as it is, it can't reject anything")
        if self.confidence is not None and self.on == "estimate":
            raise ValueError(
                f"confidence = {self.confidence:g} is that of an end of the interval; set on to "
                "low or high, or leave confidence out"
            )
        if self.margin and not any(isinstance(bound, str) for bound in (self.min, self.max)):
            raise ValueError(
                f"margin = {self.margin:g} is added to a bound that is a metric, and this rule's "
                "is a number; change the number instead"
            )
        return self


class ChampionGateConfig(Section):
    """Comparison of a policy with the model line's champion before it takes its place."""

    confidence: float = Field(default=0.95, gt=0.5, lt=1)
    """One-sided confidence that the policy is better than the champion, over all `looks` together,
    and that it is not worse in a slice."""
    looks: Count = Field(default=10, ge=1)
    """Policies that may be compared on the same gate prompts. Each is held to the confidence
    1 − (1 − confidence)/looks; after the last one set another `data.rotation`."""
    margin: float = Field(default=0.1, ge=0, lt=0.5)
    """Non-inferiority in a slice: the win rate over the champion is above 0.5 − margin."""
    slice_n: Count = Field(default=30, ge=2)
    """Fewest prompts of a slice that is judged; smaller ones are shown."""

    @property
    def look_level(self) -> float:
        """Chance of error of each look: Bonferroni over the planned number of looks."""
        return (1 - self.confidence) / self.looks

    @property
    def look_confidence(self) -> float:
        """One-sided confidence of each look."""
        return 1 - self.look_level

    def allows_look(self, spent: float) -> bool:
        """Return whether another look keeps the chance of error of all looks within the plan.

        Args:
            spent: Sum of the levels of the looks before it, whatever settings they had.
        """
        return spent + self.look_level <= (1 - self.confidence) * (1 + 1e-9)


class GatesConfig(Section):
    """The rules that a model has to meet before the pipeline goes on, and what they default to.

    Each default has its reason in docs/gates.md.
    """

    reward_model: tuple[GateRule, ...] | None = (
        # A reward model that may be a coin can't teach anything.
        GateRule(metric="accuracy", on="low", min=0.5),
        # Where length decides nothing, it must still know: one that counts tokens is at 0.5.
        GateRule(metric="length_controlled_accuracy", on="low", min=0.5),
        # A good reply to another prompt must score lower, or the prompt is not read.
        GateRule(metric="probes.other_prompt.rises", on="high", max=0.5, if_missing="skip"),
    )
    """Checked before PPO; none asks for nothing."""
    policy: tuple[GateRule, ...] | None = (
        # By its own reward PPO must have gained something.
        GateRule(metric="sampled.win_rate", on="low", min=0.5),
        # And by a judge that PPO has not seen, or the gain is one of the reward model's errors.
        GateRule(metric="sampled.judge_win_rate", on="low", min=0.5, if_missing="skip"),
        # Beyond some 20 nats a reply has little to do with the model that was fine-tuned.
        GateRule(metric="sampled.kl", max=20.0),
        # A policy that no longer ends its replies is of no use, whatever they score.
        GateRule(metric="sampled.eos_rate", min=0.8),
    )
    """Checked before promotion; none asks for nothing."""
    champion: ChampionGateConfig | None = ChampionGateConfig()
    """Comparison with the champion of `promotion.name`; none promotes what meets the rules."""

    @field_validator("reward_model", "policy", mode="before")
    @classmethod
    def _refuse_an_empty_list(cls, value: Any) -> Any:
        """Refuse rules that would approve everything without saying so."""
        if value in ([], ()):
            raise ValueError(
                "is an empty list, and would approve every model; write rules, leave it out for "
                "the default ones, or write none if there shall be no gate"
            )
        return value
