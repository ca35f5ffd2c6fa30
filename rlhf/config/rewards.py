"""Rewards of replies: reward functions, and environments with their options.

Without either, the reward model scores each reply.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import ValidationInfo, field_validator, model_validator

from rlhf.config.components import (
    COMPONENTS,
    ComponentSection,
    CorrectnessComponent,
    CorrectnessConfig,
    CustomConfig,
    LengthPenaltyConfig,
    RewardModelComponent,
    validate_component,
)
from rlhf.config.environments import (
    ENVIRONMENTS,
    AnyEnvironment,
    MultiObjectiveConfig,
    PreferenceConfig,
    TextGenerationConfig,
    read_mapping,
)
from rlhf.config.section import OrText, Section, validate_as

RewardFunction = Literal["default", "length_penalty", "correctness", "custom"]
EnvironmentType = Literal["text_generation", "multi_objective", "preference_comparison"]
FUNCTIONS = ("length_penalty", "correctness", "custom")


class RewardSection(Section):
    """Reward function, environment, and what PPO needs for them."""

    reward_fn: RewardFunction | None = None
    """None and `default`: the reward model; or a function, with the options below."""
    length_penalty: LengthPenaltyConfig | None = None
    """Options of `reward_fn: length_penalty`."""
    correctness: CorrectnessConfig | None = None
    """Options of `reward_fn: correctness`."""
    custom: CustomConfig | None = None
    """Options of `reward_fn: custom`."""
    env_type: EnvironmentType | None = None
    """None: one reply to each prompt, scored as `reward_fn` says; `text_generation`: also with
    stop sequences; `multi_objective`: a weighted sum; `preference_comparison`: replies compared."""
    env_config: Annotated[AnyEnvironment | None, OrText()] = None
    """Options of `env_type`: a mapping, JSON text, or the path of a JSON or YAML file."""
    multi_objective: bool = False
    """The same as `env_type: multi_objective`."""
    reward_weights: Annotated[dict[str, float] | None, OrText()] = None
    """Weight of each component of `multi_objective`: a mapping or JSON text."""

    @field_validator("reward_weights", mode="before")
    @classmethod
    def _read_weights(cls, value: Any) -> Any:
        return read_mapping(value, "reward_weights")

    @model_validator(mode="before")
    @classmethod
    def _sync_multi_objective(cls, data: Any) -> Any:
        """Set `env_type` from `multi_objective: true`, and the other way round."""
        if not isinstance(data, dict):
            return data
        values = cast("dict[str, Any]", data)
        flag, env_type = values.get("multi_objective"), values.get("env_type")
        if env_type is None and (flag is True or str(flag).lower() in ("true", "1", "yes", "on")):
            return {**values, "env_type": "multi_objective"}
        if env_type == "multi_objective" and flag is None:
            return {**values, "multi_objective": True}
        return values

    @field_validator("env_config", mode="before")
    @classmethod
    def _validate_by_env_type(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None or "env_type" not in info.data:
            return None  # an invalid env_type has an error of its own, which is the one to show
        env_type = info.data["env_type"]
        if env_type is None:
            raise ValueError(
                f"there is no env_type that these options are for; set env_type to one of "
                f"{', '.join(ENVIRONMENTS)}"
            )
        return validate_as(ENVIRONMENTS[env_type], read_mapping(value, "env_config"))

    @model_validator(mode="after")
    def _check_functions(self) -> Self:
        for name in FUNCTIONS:
            if getattr(self, name) is not None and self.reward_fn != name:
                raise ValueError(
                    f"{name} is given, but reward_fn = {_shown(self.reward_fn)} does not use it; "
                    f"set reward_fn to {name}"
                )
        if self.reward_fn == "custom" and self.custom is None:
            raise ValueError("reward_fn = 'custom' needs custom.function; give it")
        if self.reward_fn in FUNCTIONS and self.env_type not in (None, "text_generation"):
            instead = {
                "multi_objective": "add a component for it to env_config.components",
                "preference_comparison": "set env_config.judge",
            }[str(self.env_type)]
            raise ValueError(
                f"reward_fn = {self.reward_fn!r} contradicts env_type = {self.env_type!r}; "
                f"remove one of them, or {instead}"
            )
        return self

    @model_validator(mode="after")
    def _check_components(self) -> Self:
        if self.multi_objective != (self.env_type == "multi_objective"):
            raise ValueError(
                f"multi_objective = {str(self.multi_objective).lower()} contradicts env_type = "
                f"{_shown(self.env_type)}; remove one of them"
            )
        if not self.multi_objective:
            if self.reward_weights is not None:
                raise ValueError(
                    f"reward_weights = {self.reward_weights} need multi_objective; set it to true"
                )
            return self
        # Without configured components, a weight's name stands for a type that needs no options.
        known = self._configured_components() or {
            name: section
            for name, section in COMPONENTS.items()
            if not any(field.is_required() for field in section.model_fields.values())
        }
        for name in self.reward_weights or {}:
            if name not in known:
                raise ValueError(
                    f"reward_weights: {name!r} is no component; known are {', '.join(known)}"
                )
        if not self.components:
            raise ValueError(
                "multi_objective has no components; name them in env_config.components or "
                "reward_weights"
            )
        return self

    @property
    def components(self) -> dict[str, ComponentSection]:
        """Components of `multi_objective` with their effective weights; empty without it."""
        weights = self.reward_weights or {}
        if self.env_type != "multi_objective":
            return {}
        components = self._configured_components() or {
            name: validate_component(name, None) for name in weights
        }
        return {
            name: c.model_copy(update={"weight": weights.get(name, c.weight)})
            for name, c in components.items()
        }

    def _configured_components(self) -> Mapping[str, ComponentSection]:
        options = self.env_config
        return options.components if isinstance(options, MultiObjectiveConfig) else {}

    @property
    def generation(self) -> TextGenerationConfig:
        """Options of text generation; the defaults in another environment or without one."""
        options = self.env_config
        return options if isinstance(options, TextGenerationConfig) else TextGenerationConfig()

    @property
    def comparison(self) -> PreferenceConfig | None:
        """Options of `preference_comparison`; None in any other environment."""
        if self.env_type != "preference_comparison":
            return None
        options = self.env_config
        return options if isinstance(options, PreferenceConfig) else PreferenceConfig()

    @property
    def replies_per_prompt(self) -> int:
        """Number of replies to each prompt."""
        return self.comparison.replies_per_prompt if self.comparison else 1

    @property
    def needs_reward_model(self) -> bool:
        """True if any reward comes from the reward model."""
        if self.comparison:
            return self.comparison.judge == "reward_model"
        if self.env_type == "multi_objective":
            return any(isinstance(c, RewardModelComponent) for c in self.components.values())
        return self.reward_fn in (None, "default")

    @property
    def needs_reference_answers(self) -> str | None:
        """The setting that needs a reference answer for every prompt, or None."""
        if self.reward_fn == "correctness":
            return "reward_fn = 'correctness'"
        names = [n for n, c in self.components.items() if isinstance(c, CorrectnessComponent)]
        return f"component {names[0]!r}" if names else None


def _shown(value: str | None) -> str:
    return "none" if value is None else repr(value)
