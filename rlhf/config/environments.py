"""Options of environments: the section of `env_config` for each `env_type`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self, cast

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from rlhf.config import strict_yaml
from rlhf.config.components import (
    AnyComponent,
    ComponentSection,
    CustomConfig,
    validate_component,
)
from rlhf.config.section import NESTED, Section, nested_error
from rlhf.files import at_home


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

    replies_per_prompt: int = Field(default=2, ge=1)
    """Replies to one prompt; `ppo.chunk_size` counts replies, so it must be a multiple."""
    temperature: float = Field(default=1.0, gt=0)
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
            return json.loads(
                value, parse_constant=_refuse_constant, object_pairs_hook=strict_yaml.unique
            )
        except (ValueError, RecursionError) as error:
            raise ValueError(f"is no JSON ({error}); mend the text") from None
    path = at_home(value)
    if path.suffix.lower() not in (".json", ".yaml", ".yml"):
        raise ValueError(f"{value!r} is no mapping, JSON text or .json, .yaml or .yml file; "
                         f"give {what} as one of these")  # fmt: skip
    try:
        tree = strict_yaml.parse(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(f"{value!r} can't be read ({error.strerror}); correct the path") from None
    except strict_yaml.BROKEN as error:
        reason = strict_yaml.reason(error)
        raise ValueError(f"{value!r} is not valid YAML or JSON ({reason}); mend it") from None
    if not isinstance(tree, dict):
        raise ValueError(f"{value!r} holds no mapping; write `key: value` lines into it")
    return cast("dict[str, Any]", tree)


def _refuse_constant(constant: str) -> float:
    raise ValueError(f"{constant} is no number")
