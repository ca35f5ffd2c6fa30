"""Models, reward functions and tokens from outside, named by the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.config import CustomComponent, PipelineConfig, PPOConfig, RemoteComponent
from rlhf.config.pipeline import place_names
from rlhf.config.training import UNFINGERPRINTED_FIELDS
from rlhf.custom_code import CustomCode
from rlhf.files import expand_home, is_dir
from rlhf.modeling.source import ExternalModel, ExternalTokenizer
from rlhf.permissions import check_paths


def external_base_model(config: PipelineConfig) -> ExternalModel | None:
    """Return the model that SFT starts from; None to start from scratch."""
    base = config.base
    if base.path is None:
        return None
    return ExternalModel("base.path", base.path, config.store_options, base.revision)


def external_tokenizer(config: PipelineConfig, *stages: str) -> ExternalTokenizer | None:
    """Return the tokenizer that data are checked against; None leaves the check to the stages.

    They check too: where the tokenizer is trained on the data, where the base is an artifact, which
    must not become a parent of its data, and where it is a folder and the `stages`, that which
    prepares data and that which trains the base, run on different machines.
    """
    model = external_base_model(config)
    if model is None or model.is_artifact or config.data.source == "world":
        return None
    is_elsewhere = bool(config.placement) and not (model.uri.startswith("s3://") or model.is_on_hub)
    if is_elsewhere and len({_deployment(config, stage) for stage in stages}) > 1:
        return None
    return ExternalTokenizer(model.field, model.uri, model.options, model.revision)


def _deployment(config: PipelineConfig, stage: str) -> str:
    return place_names(stage, config.deployment_of(stage))[0]


def external_reward_model(config: PipelineConfig) -> ExternalModel | None:
    """Return the external reward model, ready or to train from; None: use SFT's."""
    if config.ppo.reward_model_path is not None:
        path = config.ppo.reward_model_path
        return ExternalModel("ppo.reward_model_path", path, config.store_options, ready=True)
    if config.reward_model.base is not None:
        return ExternalModel("reward_model.base", config.reward_model.base, config.store_options)
    return None


def external_judge(config: PipelineConfig) -> ExternalModel | None:
    """Return the external model that the judge is trained from; None: use SFT's."""
    if config.judge.base is None:
        return None
    return ExternalModel("judge.base", config.judge.base, config.store_options)


def judge_settings(config: PipelineConfig) -> Mapping[str, Any]:
    """Return the judge's settings, without the external model itself."""
    if not config.judge.enabled:
        return {"judge": "none"}
    own = {"base", "members", "negatives", *UNFINGERPRINTED_FIELDS}
    return {
        "judge": {
            **config.reward_model.model_dump(exclude=own), "negatives": config.judge.negatives,
        }
    }  # fmt: skip


def reward_settings(config: PipelineConfig) -> Mapping[str, Any]:
    """Return the reward model's settings, without the external model itself."""
    if config.ppo.reward_model_path is not None:
        return {"reward_model": "ready"}  # nothing is trained
    unused = {"base", *UNFINGERPRINTED_FIELDS}
    if config.reward_model.members == 1:
        unused.add("members")  # the same model as before there were any
    return {"reward_model": config.reward_model.model_dump(exclude=unused)}


def reward_function_digests(config: PPOConfig) -> dict[str, str]:
    """Return digests of custom reward functions and of the pair model, by field.

    Raises:
        ConfigError: One of them is missing, or may not run.
    """
    functions = {
        f"ppo.env_config.components.{name}": component.function
        for name, component in config.components.items()
        if isinstance(component, CustomComponent)
    }
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


def pair_model(folder: str) -> ExternalModel:
    """Return the pair model in a folder.

    Raises:
        ConfigError: It is no folder on this machine.
    """
    model = ExternalModel("ppo.env_config.pair_model", folder, ready=True)
    check_paths(f"{model.field} = {folder!r}", [Path(folder)])
    if not is_dir(expand_home(folder)):
        raise model.error("is no folder; give that of a one-label sequence classifier")
    # Absolute, so that owner/name is not looked up on a hub.
    return ExternalModel(model.field, str(expand_home(folder).absolute()), ready=True)


def check_services(config: PPOConfig) -> None:
    """Refuse a reward service that may not be used here, or a token that may not be sent to it.

    Raises:
        ConfigError: See `rlhf.environments.remote.check_service`.
    """
    for name, section in config.components.items():
        if isinstance(section, RemoteComponent):
            from rlhf.environments.remote import check_service  # imports torch: seconds

            check_service(section, f"ppo.env_config.components.{name}")
