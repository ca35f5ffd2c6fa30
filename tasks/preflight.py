"""Preflight checks of commands and flows: refuse known failures before any work.

A flow that a command starts in its own process skips the checks that the command made.
"""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import time
from collections.abc import Mapping
from contextlib import suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import httpx

from rlhf.config import PipelineConfig, TrackingConfig, apply_machine_settings
from rlhf.config.load import MACHINE_FIELDS, environment_variable
from rlhf.config.pipeline import INLINE
from rlhf.errors import ConfigError, StoreError
from rlhf.files import expand_home
from rlhf.gate_sizes import Sizes, check_gate_sizes
from rlhf.limits import MAX_MODEL_BYTES
from rlhf.modeling.nf4 import check_package
from rlhf.modeling.reward_source import check_context, check_reward_source
from rlhf.modeling.source import CONFIG, ExternalModel
from rlhf.permissions import check_paths
from rlhf.store import Store
from tasks.budget import check_budget
from tasks.external_inputs import (
    check_services,
    external_judge,
    external_reward_model,
    reward_function_digests,
)
from tasks.nodes import check_nodes
from tasks.prefect_server import lease_advice
from tasks.stage import Stage, store_of
from tasks.stages import STAGES

log = logging.getLogger(__name__)
#: The configuration that a command has checked, for the flow that it starts in this process.
_checked: ContextVar[PipelineConfig | None] = ContextVar("_checked", default=None)


def preflight(config: PipelineConfig) -> None:
    """Check folders, trackers, store, data source, external models and functions.

    Raises:
        ConfigError: One line naming field, value and cure (StoreConfigError for the store).
    """
    _check_folders(config)
    check_budget(config)
    config = apply_machine_settings(config)
    for field in ("work_dir", "report_dir"):
        _check_writable(f"runtime.{field}", getattr(config.runtime, field))
    _check_trackers(config.tracking)
    _check_nf4(config)
    _check_world_gates(config)
    store = store_of(config)
    store.check()
    _sweep(store)
    for stage in STAGES.values():
        if stage.source_digest is not None:
            stage.source_digest(config)
        external = stage.external_model(config)
        if external is not None:
            data = _check_model(external, store)
            if external == external_reward_model(config):
                check_reward_source(config, external, data)
            if external == external_judge(config):
                check_context(config, external, data)
    reward_function_digests(config.ppo)
    check_services(config.ppo)


def preflight_command(config: PipelineConfig) -> None:
    """Run the preflight checks in a command; the flow that it starts skips them.

    Raises:
        ConfigError: See `preflight`.
    """
    preflight(config)
    _checked.set(_without_placement(config))


def preflight_flow(config: PipelineConfig, stages: Mapping[str, Stage] = STAGES) -> None:
    """Run the checks of a flow: placement, nodes, and preflight unless a command did it.

    A deployment's run may be resumed while the store is down, so it retries as often as a stage
    does. A command fails at once.

    Args:
        config: Configuration of the run.
        stages: The stages that it runs.

    Raises:
        ConfigError: One line naming field, value and cure.
    """
    # A command imports this module before it sets Prefect's environment variables.
    from prefect.logging import get_run_logger
    from prefect.runtime import deployment

    from tasks.remote import check_placement

    retries = config.retries
    if not _is_checked(config):
        for left in reversed(range(retries.attempts + 1)):
            try:
                preflight(config)
                break
            except StoreError as error:
                if not (deployment.id and left):
                    raise
                get_run_logger().warning("%s; asking again", error)
                time.sleep(retries.delay(min(retries.attempts - left, 5)))
    check_placement(config)
    check_nodes(config, stages)
    if deployment.id:
        _warn_of_server()


def _warn_of_server() -> None:
    """Log what of the server's settings endangers this run; that it can't be seen is no error."""
    from prefect.client.orchestration import get_client
    from prefect.logging import get_run_logger

    with suppress(httpx.HTTPError), get_client(sync_client=True) as client:
        advice = lease_advice(client)
        if advice is not None:
            get_run_logger().warning(advice)


def _check_folders(config: PipelineConfig) -> None:
    """Check that a run chooses no folder of this machine that its operator does not permit."""
    for name, fields in MACHINE_FIELDS.items():
        section = getattr(config, name)
        for field in fields:
            value, default = getattr(section, field), type(section).model_fields[field].default
            is_machines_own = environment_variable(field) in os.environ
            if field.endswith("_dir") and value != default and not is_machines_own:
                check_paths(f"{name}.{field} = {value!r}", [Path(value)], "folders")


def _check_writable(field: str, path: str) -> None:
    folder = expand_home(path)
    if str(folder).startswith("~"):
        raise ConfigError(f"{field} = {path!r}: there is no such user; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{field} = {str(folder)!r}: can't be created ({error.strerror}); choose another folder"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{field} = {str(folder)!r}: not writable; choose another folder")


def _check_trackers(tracking: TrackingConfig) -> None:
    """Check that the trackers' packages, which have their names, are installed."""
    for name in tracking.trackers:
        package = importlib.util.find_spec(name)
        # wandb leaves a folder of its name, which would be found as a package without a file.
        if package is None or package.origin is None:
            raise ConfigError(
                f"tracking.trackers = {name!r}: that package is not installed; run "
                f"`pip install {name}`, or choose others (tracking.trackers = [] for none)"
            )
    if {"tensorboard", "wandb"} & set(tracking.trackers):
        _check_writable("tracking.log_dir", tracking.log_dir)


def _check_nf4(config: PipelineConfig) -> None:
    """Check that a stage in this process that holds a base in 4 bits has the package for it."""
    for stage in STAGES.values():
        section = getattr(config, stage.section or "", None)
        is_here = config.deployment_of(stage.name) == INLINE and stage.trains(config)
        if is_here and getattr(section, "frozen_dtype", None) == "nf4":
            check_package(str(stage.section))


def _check_world_gates(config: PipelineConfig) -> None:
    """Check that the gates can be passed with the held-out rows that the world will have."""
    if config.data.source != "world":
        return
    world = config.data.world
    prompts = min(world.eval_prompts, config.evaluation.prompts)
    sizes = Sizes(world.eval_pairs, world.eval_pairs, prompts, config.evaluation.samples_per_prompt)
    check_gate_sizes(config, sizes, has_champion=False)


def _sweep(store: Store) -> None:
    """Remove unfinished uploads of killed publishers; a failure is only logged."""
    try:
        swept = store.sweep()
    except StoreError as error:
        log.debug("unfinished uploads stay where they are: %s", error)
        return
    if swept:
        log.info("%s: removed %d unfinished uploads of killed runs", store.uri, swept)


def _check_model(external: ExternalModel, store: Store) -> Mapping[str, Any]:
    """Check an external model's configuration, without its weights, and return it."""
    if not external.is_artifact:
        external.check()
        return json.loads(external.read(CONFIG, MAX_MODEL_BYTES))
    ref = store.resolve(external.uri)
    if CONFIG not in [entry.path for entry in store.manifest(ref).files]:
        raise external.error(f"this artifact is a {ref.kind}, no model; give that of a model")
    data = (store.fetch(ref, [CONFIG]) / CONFIG).read_bytes()
    external.check_config(data)
    return json.loads(data)


def _is_checked(config: PipelineConfig) -> bool:
    """Return whether the command that started this flow has checked its configuration."""
    return _checked.get() == _without_placement(config)


def _without_placement(config: PipelineConfig) -> PipelineConfig:
    """Return a configuration without placement, which `preflight` does not read."""
    return config.model_copy(update={"placement": {}})
