"""Which models of others the configuration names, and which stage takes them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from rlhf.config import CustomComponent, PipelineConfig, PPOConfig, RemoteComponent
from rlhf.config.processes import WHERE
from rlhf.custom_code import CustomCode
from rlhf.files import at_home
from rlhf.modeling.foreign import ForeignModel


def base_of_others(config: PipelineConfig) -> ForeignModel | None:
    """The model that SFT starts from."""
    base = config.base
    if base.path is None:
        return None
    return ForeignModel("base.path", base.path, base.revision, config.store_options)


def reward_model_of_others(config: PipelineConfig) -> ForeignModel | None:
    """A ready reward model, or one to start training from."""
    for name, place, ready in (
        ("ppo.reward_model_path", config.ppo.reward_model_path, True),
        ("reward_model.base", config.reward_model.base, False),
    ):
        if place is not None:
            return ForeignModel(name, place, options=config.store_options, ready=ready)
    return None


def reward_settings(config: PipelineConfig) -> Mapping[str, Any]:
    """What of the configuration shapes the reward model, beside the model of others itself."""
    if config.ppo.reward_model_path is not None:
        return {"reward_model": "ready"}  # nothing is trained
    return {"reward_model": config.reward_model.model_dump(exclude={"base", *WHERE})}


def judges_of_others(config: PPOConfig) -> dict[str, str]:
    """Digests of what rewards are computed by: functions of the operator's, and a pair model.

    Raises:
        ConfigError: One of them is not there, or may not run.
    """
    found = {name: c for name, c in config.components.items() if isinstance(c, CustomComponent)}
    functions = {f"ppo.env_config.components.{name}": c.function for name, c in found.items()}
    if config.custom:
        functions["ppo.custom"] = config.custom.function
    if config.comparison and config.comparison.custom:
        functions["ppo.env_config.custom"] = config.comparison.custom.function
    codes = {field: CustomCode(name, field) for field, name in functions.items()}
    for code in codes.values():
        code.check()
    digests = {field: code.digest for field, code in codes.items()}
    if config.comparison and config.comparison.pair_model:
        model = pair_model(config.comparison.pair_model)
        model.check()
        digests[model.field] = model.digest()
    return digests


def check_tokens(config: PPOConfig) -> None:
    """Refuse a service's token that is not there or may not be sent.

    Raises:
        ConfigError: See `rlhf.environments.remote.token_of`.
    """
    for name, section in config.components.items():
        if isinstance(section, RemoteComponent) and section.token_env:
            from rlhf.environments.remote import token_of  # with torch, which takes seconds

            token_of(section, f"ppo.env_config.components.{name}")


def pair_model(folder: str) -> ForeignModel:
    """The pair model in this folder.

    Raises:
        ConfigError: It is no folder on this machine.
    """
    model = ForeignModel("ppo.env_config.pair_model", folder, ready=True)
    if not at_home(folder).is_dir():
        raise model.error("is no folder; give that of a one-label sequence classifier")
    # As a path, so that owner/name is not looked for on a hub.
    return ForeignModel(model.field, str(at_home(folder).absolute()), ready=True)
