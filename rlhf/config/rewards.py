"""Section of the rewards of replies: reward functions and environments.

Without either, the reward model scores each reply. Components of `multi_objective` are in
`components`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, ValidationInfo, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rlhf.config import text
from rlhf.config.components import (
    COMPONENTS,
    AnyComponent,
    ComponentSection,
    CorrectnessComponent,
    CorrectnessConfig,
    CustomConfig,
    LengthPenaltyConfig,
    RewardModelComponent,
    validate_component,
)
from rlhf.config.numbers import Few, Signed, Temperature
from rlhf.config.section import NESTED, OrText, Section, nested_error, validate_as
from rlhf.files import expand_home
from rlhf.limits import load_json, read_text
from rlhf.permissions import check_paths

RewardFunction = Literal["default", "length_penalty", "correctness", "custom"]
EnvironmentType = Literal["text_generation", "multi_objective", "preference_comparison"]

FUNCTIONS = ("length_penalty", "correctness", "custom")


class TextGenerationConfig(Section):
    """One reply to each prompt, scored by the reward model or `reward_fn`."""

    stop_sequences: tuple[Annotated[str, Field(min_length=1)], ...] = ()
    """A reply ends where one of these appears, and is cut off before it."""


def _allow_null_components(schema: dict[str, Any]) -> None:
    """Make the JSON schema accept a component without options, such as null."""
    values = schema["additionalProperties"]
    schema["additionalProperties"] = {**values, "anyOf": [*values["anyOf"], {"type": "null"}]}


class MultiObjectiveConfig(Section):
    """The reward is a weighted sum of named components."""

    components: dict[str, AnyComponent] = Field(
        default_factory=dict[str, AnyComponent], json_schema_extra=_allow_null_components
    )
    """Name of each component and its options; its kind is `type`, or else the name itself."""

    @field_validator("components", mode="before")
    @classmethod
    def _validate_components(cls, value: Any) -> Any:
        # A tagged union would do most of this, but its JSON schema (oneOf) refuses a component
        # whose type is its name, and its errors do not name the known keys of the type.
        if not isinstance(value, Mapping):
            raise ValueError("must be a mapping from names to components")
        components: dict[str, ComponentSection] = {}
        errors: list[dict[str, Any]] = []
        for name, options in cast("Mapping[Any, Any]", value).items():
            try:
                components[str(name)] = validate_component(str(name), options)
            except PydanticCustomError as error:
                errors.append({"type": NESTED, "loc": (str(name),), "ctx": error.context})
        if errors:
            raise nested_error(errors)
        return components


class PreferenceConfig(Section):
    """Several replies to each prompt; each is rewarded for what it wins against its rivals."""

    replies_per_prompt: Few = Field(default=2, ge=1)
    """Replies to one prompt; `ppo.chunk_size` counts replies, so it must be a multiple."""
    temperature: Temperature = Field(default=1.0, gt=0)
    """τ in σ((sᵢ − sⱼ)/τ) − ½: the smaller, the more a small difference counts."""
    judge: Literal["reward_model", "pair_model", "custom"] = "reward_model"
    """Who compares: the reward model's scores; a sequence classifier that reads the prompt and
    both replies, asked in both orders; or scores of a function of one's own."""
    pair_model: str | None = Field(default=None, min_length=1)
    """`judge: pair_model`: folder of a classifier with one label, positive if the first is
    better."""
    custom: CustomConfig | None = None
    """`judge: custom`: the function."""
    rival: Literal["others", "reference"] = "others"
    """Compare with the other replies to the prompt, or with the reference policy's reply."""

    @model_validator(mode="after")
    def _fits_together(self) -> Self:
        if self.rival == "others" and self.replies_per_prompt == 1:
            raise ValueError(
                "replies_per_prompt = 1 leaves no other reply to compare with; set it to at least "
                "2, or rival to reference"
            )
        for name in ("pair_model", "custom"):
            is_set = getattr(self, name) is not None
            if is_set and self.judge != name:
                raise ValueError(f"{name} is given, but judge = {self.judge!r} does not use it; "
                                 f"set judge to {name}")  # fmt: skip
            if self.judge == name and not is_set:
                raise ValueError(f"judge = {name!r} needs {name}; give it")
        return self


AnyEnvironment = TextGenerationConfig | MultiObjectiveConfig | PreferenceConfig

#: The section of each `env_type`.
ENVIRONMENTS: Mapping[str, type[Section]] = {
    "text_generation": TextGenerationConfig,
    "multi_objective": MultiObjectiveConfig,
    "preference_comparison": PreferenceConfig,
}


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
    reward_weights: Annotated[dict[str, Signed] | None, OrText()] = None
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
            return None  # an invalid env_type has an error of its own, which is shown instead
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
            alternative = {
                "multi_objective": "add a component for it to env_config.components",
                "preference_comparison": "set env_config.judge",
            }[str(self.env_type)]
            raise ValueError(
                f"reward_fn = {self.reward_fn!r} contradicts env_type = {self.env_type!r}; "
                f"remove one of them, or {alternative}"
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
    def rewards_by_model_alone(self) -> bool:
        """True if a reply's reward is the reward model's score of it, and nothing else."""
        return self.needs_reward_model and not self.comparison and not self.components

    @property
    def needs_reference_answers(self) -> str | None:
        """The setting that needs a reference answer for every prompt, or None."""
        if self.reward_fn == "correctness":
            return "reward_fn = 'correctness'"
        names = [n for n, c in self.components.items() if isinstance(c, CorrectnessComponent)]
        return f"component {names[0]!r}" if names else None


def read_mapping(value: Any, what: str) -> Any:
    """Read a mapping from JSON text, or from the path of a JSON or YAML file.

    Other values are returned as is. The content takes the place of the path, so that a changed file
    is another configuration. A relative path starts from the working directory.

    Raises:
        ValueError: The text or file can't be read, or holds no mapping.
    """
    if not isinstance(value, str):
        return value
    if value.lstrip().startswith("{"):
        try:
            return load_json(value, parse_constant=_refuse_constant, object_pairs_hook=text.unique)
        except ValueError as error:
            raise ValueError(f"is no JSON ({error}); mend the text") from None
    path = expand_home(value)
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise ValueError(f"{value!r} is no mapping, JSON text or .json, .yaml or .yml file; "
                         f"give {what} as one of these")  # fmt: skip
    check_paths(f"{what} = {value!r}", [path])
    try:
        tree = text.parse(read_text(path))
    except OSError as error:
        raise ValueError(f"{value!r} can't be read ({error.strerror}); correct the path") from None
    except text.BROKEN as error:
        reason = text.reason(error)
        raise ValueError(f"{value!r} is not valid YAML or JSON ({reason}); mend it") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{value!r} holds no mapping; write `key: value` lines into it")
    return cast("dict[str, Any]", tree)


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is no number")


def _shown(value: str | None) -> str:
    return "none" if value is None else repr(value)
