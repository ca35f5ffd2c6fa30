"""The seed product's names: a field of section `ppo` may also be written as `rl_<name>`."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from typing import Any, cast

from pydantic import BaseModel

from rlhf.config.wording import one_line, shown_value

PREFIX = "rl_"
#: The seed's parameters, without their prefix; those that are no field (yet) have no alias.
SEED_NAMES = (
    *("reward_model_path", "gamma", "gae_lambda", "kl_coef", "value_loss_coef", "clip_range"),
    *("value_clip_range", "num_ppo_epochs", "chunk_size", "mini_batch_size"),
    *("optimize_device_cache", "max_new_tokens", "top_k", "top_p", "temperature", "reward_fn"),
    *("multi_objective", "reward_weights", "env_type", "env_config"),
)


def aliases(fields: Collection[str]) -> dict[str, str]:
    """`rl_<name>` to `<name>`, for those of the seed's names that are fields."""
    return {PREFIX + name: name for name in SEED_NAMES if name in fields}


def allow_aliases(schema: dict[str, Any]) -> None:
    """Let a JSON schema accept the aliases without offering each field twice in a form.

    In the section itself each has its field's own schema; at the top, where that isn't known, any.
    """
    fields = schema.get("properties", {})
    schema["patternProperties"] = {f"^{PREFIX}{name}$": fields.get(name, {}) for name in SEED_NAMES}


def renamed(
    given: Iterable[tuple[str, Any]], fields: Collection[str], section: str = ""
) -> dict[str, Any]:
    """The values of section `ppo`, each under its field's own name.

    Raises:
        ValueError: A field has two values; `section` stands before its name in the message.
    """
    known = aliases(fields)
    found: dict[str, Any] = {}
    for key, value in given:
        name = known.get(key, key)
        if name in found:
            raise ValueError(
                one_line(
                    f"{section}{name} is given twice, as {name} and as {PREFIX}{name}: "
                    f"{shown_value(found[name])} and {shown_value(value)}; keep one"
                )
            )
        found[name] = value
    return found


def gathered(tree: Mapping[str, Any], fields: Collection[str]) -> dict[str, Any]:
    """A whole configuration whose section `ppo` holds every value, each under its own name.

    Text in place of section `promotion` is its field `approval`.

    Raises:
        ValueError: A field has two values.
    """
    if isinstance(tree.get("promotion"), str):
        tree = {**tree, "promotion": {"approval": tree["promotion"]}}
    known = aliases(fields)
    at_top = [(key, value) for key, value in tree.items() if key in known]
    section: Any = tree.get("ppo")
    if isinstance(section, BaseModel) and at_top:
        section = section.model_dump(exclude_unset=True)
    if section is None and at_top:
        section = {}
    if not isinstance(section, dict):
        return dict(tree)  # what is wrong with it is for validation to say
    inside = [*cast("dict[str, Any]", section).items(), *at_top]
    rest = {key: value for key, value in tree.items() if key not in known}
    return {**rest, "ppo": renamed(inside, fields, "ppo.")}
