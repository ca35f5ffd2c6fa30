"""Another machine's part of a stage with `nodes`: fetch its inputs, train with the first machine.

The first machine says all: the configuration, the inputs' digests and the job. What belongs to a
machine, as its folders, is this one's own. Nothing is written to the store from here.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rlhf.config import PipelineConfig, apply_machine_settings
from rlhf.config.load import MACHINE_FIELDS
from rlhf.errors import ConfigError
from rlhf.launch import Job, take_part
from rlhf.launch.torchrun import torchrun_environment
from tasks.nodes import digests_of
from tasks.progress import Transfer
from tasks.runner import code_version, library_versions
from tasks.stage import store_of
from tasks.stages import stage_named

log = logging.getLogger("rlhf.tasks")


def join_stage(leader: tuple[str, int], node: int, wait: float) -> None:
    """Take part in the stage whose first machine listens there, until it has ended.

    Args:
        leader: Host and port of the first machine.
        node: Number of this machine, from 1.
        wait: Seconds in which the first machine must answer.

    Raises:
        WorkerDied: The first machine did not answer, or was lost.
        RLHFError: The stage failed on one of the machines.
    """
    log.info("node %d: meets the stage's first machine at %s:%d", node + 1, *leader)
    versions = {"rlhf": code_version(), **library_versions()}
    take_part(leader, node, prepare_job, versions=versions, wait=wait)


def own_place() -> tuple[tuple[str, int], int]:
    """Return the first machine's host and port, and this one's number, from torchrun's variables.

    Raises:
        ConfigError: They are not set, or this is the first machine.
    """
    told = torchrun_environment()
    if told is None:
        raise ConfigError(
            "PET_NNODES is not set; set PET_NNODES, PET_NODE_RANK and PET_MASTER_ADDR as torchrun "
            "reads them, or let a stage on a deployment start its other machines"
        )
    if told.node == 0:
        raise ConfigError(
            "PET_NODE_RANK = 0: the first machine runs the stage itself, as by `rlhf stage`"
        )
    return (told.host, told.port), told.node


def prepare_job(sent: str, context: Mapping[str, Any], folder: Path) -> Job:
    """Return a job as it is on this machine: with the inputs fetched, and folders of its own.

    Raises:
        ConfigError: A model outside of the store is another one here.
        StoreError: An input can't be fetched.
    """
    job, stage = Job.model_validate_json(sent), stage_named(context["stage"])
    config = _on_this_machine(PipelineConfig.model_validate(context["config"]))
    digests = digests_of(config, stage, context["refs"], job.section)
    for field, digest in context["digests"].items():
        if digests.get(field) != digest:
            raise ConfigError(
                f"{field}: is another model on this machine than on the first one; give all "
                "machines the same"
            )
    store = store_of(config)
    inputs = {
        role: store.fetch(store.resolve(ref), listener=Transfer(f"{stage.name}: fetching {role}"))
        for role, ref in context["refs"].items()
    }
    external = stage.external_model(config)
    if external is not None and "base" not in inputs:
        inputs["base"] = external.fetch(folder / "base").folder
    out, checkpoints = folder / "out", folder / "checkpoints"
    out.mkdir()
    moved: dict[str, Any] = {
        "inputs": inputs,
        "out_dir": out,
        "runtime": config.runtime,
        # The first machine saves, and sends what all resume from.
        "checkpoints": checkpoints if job.checkpoints else None,
        "checkpoint_store": None,
    }
    moved |= _own_base(job, inputs.get("base"))
    return job.model_copy(update=moved)


def _own_base(job: Job, folder: Path | None) -> dict[str, Any]:
    """Return the parts of a job that name its base, with this machine's folder of it.

    Raises:
        ConfigError: It names another folder, which this machine has not checked.
    """
    was = str(job.inputs["base"]) if folder and "base" in job.inputs else None
    moved: dict[str, Any] = {}
    for part, field in (("base", "path"), ("section", "base")):
        named = getattr(getattr(job, part), field, None)
        if named is None:
            continue
        if named != was:
            raise ConfigError(
                f"{part}.{field} = {named!r}: the first machine names a model that is no input of "
                "this stage; give all machines the same version of this project"
            )
        moved[part] = getattr(job, part).model_copy(update={field: str(folder)})
    return moved


def _on_this_machine(config: PipelineConfig) -> PipelineConfig:
    """Replace folders and sizes of the first machine by this one's own, or the defaults."""
    own: dict[str, Any] = {}
    for name, fields in MACHINE_FIELDS.items():
        section = getattr(config, name)
        defaults = type(section)()
        kept = ("device", "threads")  # of the training
        values = {f: getattr(defaults, f) for f in fields if f not in kept}
        own[name] = section.model_copy(update=values)
    return apply_machine_settings(config.model_copy(update=own))
