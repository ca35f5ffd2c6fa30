"""`rl_` names of section `ppo`'s fields, from the seed product."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, cast

from pydantic import BaseModel

from rlhf.config.wording import one_line, shown_value
from rlhf.errors import ConfigError

#: Fields of section `ppo` that have an `rl_` name: the seed's parameters.
SEED_NAMES = (
    *("reward_model_path", "gamma", "gae_lambda", "kl_coef", "value_loss_coef", "clip_range"),
    *("value_clip_range", "num_ppo_epochs", "chunk_size", "mini_batch_size"),
    *("optimize_device_cache", "max_new_tokens", "top_k", "top_p", "temperature", "reward_fn"),
    *("multi_objective", "reward_weights", "env_type", "env_config"),
)
#: The field of each `rl_` name.
ALIASES = {f"rl_{name}": name for name in SEED_NAMES}


def by_field_names(tree: Mapping[str, Any]) -> dict[str, Any]:
    """A configuration tree with each `rl_` name moved to its field in section `ppo`.

    `rl_` names may stand at the top and in the section. Text in place of section `promotion`
    becomes the section's field `approval`. What is not a valid section is left to validation.

    Raises:
        ConfigError: A field has two values.
    """
    if isinstance(tree.get("promotion"), str):
        tree = {**tree, "promotion": {"approval": tree["promotion"]}}
    at_top = {key: value for key, value in tree.items() if key in ALIASES}
    section: Any = tree.get("ppo")
    if isinstance(section, BaseModel) and at_top:
        section = section.model_dump(exclude_unset=True)
    if section is None and at_top:
        section = {}
    if not isinstance(section, dict):
        return dict(tree)
    values = [*cast("dict[str, Any]", section).items(), *at_top.items()]
    others = {key: value for key, value in tree.items() if key not in ALIASES}
    return {**others, "ppo": section_by_field_names(values, "ppo.")}


def section_by_field_names(values: Iterable[tuple[str, Any]], prefix: str = "") -> dict[str, Any]:
    """Values of section `ppo`, each under its field's name.

    Args:
        values: (name, value) pairs; a name may be an `rl_` name.
        prefix: Stands before a field's name in errors.

    Raises:
        ConfigError: A field has two values.
    """
    section: dict[str, Any] = {}
    for key, value in values:
        name = ALIASES.get(key, key)
        if name in section:
            raise ConfigError(
                one_line(
                    f"{prefix}{name} is given twice, as {name} and as rl_{name}: "
                    f"{shown_value(section[name])} and {shown_value(value)}; keep one"
                )
            )
        section[name] = value
    return section


def allow_aliases(schema: dict[str, Any]) -> None:
    """Make a JSON schema accept `rl_` names.

    They are patterns, so that a form lists each field once. In section `ppo` an `rl_` name has its
    field's schema; at the top any value is accepted.
    """
    fields = schema.get("properties", {})
    schema["patternProperties"] = {f"^rl_{name}$": fields.get(name, {}) for name in SEED_NAMES}
