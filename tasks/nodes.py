"""The other machines of a stage with `nodes`: runs of a deployment, or torchrun's variables.

A stage that runs in the deployment `train-sft/train-sft-gpu` starts a run of `node/train-node-gpu`
for each further machine, and workers of its pool take them up; each connects to the stage.
Prefect is loaded only then.
"""

from __future__ import annotations

import logging
import os
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from typing import Any
from urllib.parse import urlsplit
from uuid import UUID

from rlhf.config import PipelineConfig, PPOConfig
from rlhf.config.pipeline import INLINE, place_names
from rlhf.config.training import ProcessSection
from rlhf.errors import ConfigError
from rlhf.launch.nodes import Nodes, nodes_of_environment
from tasks.external_inputs import pair_model
from tasks.stage import Stage, StageRun

log = logging.getLogger("rlhf.tasks")
#: Name of the flow that takes another machine's part.
FLOW = "node"
#: Environment variable with the address of this machine that the others reach.
ADDRESS = "RLHF_NODE_ADDRESS"


def nodes_of(run: StageRun, stage: Stage, field: str, section: ProcessSection) -> Nodes | None:
    """Return how a stage finds its other machines; None if it has none.

    Args:
        run: Arguments of the stage's body.
        stage: The stage.
        field: Name of the section in the configuration.
        section: Hyper-parameters.

    Raises:
        ConfigError: Nothing says where they are.
    """
    if section.nodes == 1:
        return None
    context: dict[str, Any] = {
        "stage": stage.name,
        "config": run.config.model_dump(mode="json"),
        "refs": {role: ref.digest for role, ref in run.refs.items()},
        "digests": digests_of(run.config, stage, run.refs, section),
    }
    producer = run.producer
    versions = {"rlhf": producer.code_version, **producer.versions}
    shared: Any = {
        "context": context, "versions": versions, "wait": run.config.retries.pending_seconds,
    }  # fmt: skip
    told = nodes_of_environment(field, section.nodes, **shared)
    if told is not None:
        return told
    deployment = _own_deployment(stage)
    if deployment is None:
        raise ConfigError(_NOWHERE.format(field, section.nodes, stage.name))
    return Nodes(
        call=lambda port: _called(deployment, port, section.nodes),
        cure=f"see that as many workers of the pool of {deployment} are free as it has nodes",
        **shared,
    )


def digests_of(
    config: PipelineConfig, stage: Stage, refs: Mapping[str, Any], section: ProcessSection
) -> dict[str, str]:
    """Return digests of what a stage reads from outside the store, as this machine has it."""
    digests: dict[str, str] = {}
    external = stage.external_model(config)
    if external is not None and "base" not in refs:
        digests[external.field] = external.digest()
    comparison = section.comparison if isinstance(section, PPOConfig) else None
    if comparison is not None and comparison.pair_model:
        model = pair_model(comparison.pair_model)
        digests[model.field] = model.digest()
    return digests


def check_nodes(config: PipelineConfig, stages: Mapping[str, Stage]) -> None:
    """Check, before any work, that stages with several machines can find them.

    Raises:
        ConfigError: Nothing says where they are, or the deployment for them does not exist.
    """
    for stage in stages.values():
        section = getattr(config, stage.section or "", None)
        if not isinstance(section, ProcessSection) or section.nodes == 1:
            continue
        if not stage.trains(config):
            continue
        place = config.deployment_of(stage.name)
        if place == INLINE:
            if nodes_of_environment(stage.section or "", section.nodes) is not None:
                continue
            deployment = _own_deployment(stage)
            if deployment is None:
                raise ConfigError(_NOWHERE.format(stage.section, section.nodes, stage.name))
        else:
            deployment = _for_nodes(stage, place)
        _check_deployment(deployment, f"{stage.section}.nodes = {section.nodes}")


_NOWHERE = (
    "{}.nodes = {}: {} does not know its other machines; place it on a deployment "
    "(placement), or set PET_NNODES, PET_NODE_RANK and PET_MASTER_ADDR on each (docs/deploying.md)"
)


def _own_deployment(stage: Stage) -> str | None:
    """Return the deployment for further machines of this process's run; None outside of one."""
    from prefect.runtime import deployment

    return _for_nodes(stage, str(deployment.name)) if deployment.id else None


def _for_nodes(stage: Stage, deployment: str) -> str:
    """Return the deployment for further machines of a stage that runs in a deployment."""
    return f"{FLOW}/train-node-{place_names(stage.name, deployment)[0]}"


def _check_deployment(name: str, field: str) -> None:
    from prefect.client.orchestration import get_client
    from prefect.exceptions import ObjectNotFound

    from tasks.retries import asked_server

    with get_client(sync_client=True) as client:
        try:
            asked_server(lambda: client.read_deployment_by_name(name))
        except ObjectNotFound:
            raise ConfigError(
                f"{field}: needs the deployment {name!r}, which is not on {client.api_url}; run "
                "`make deploy`, or place the stage where there is one (deployments/prefect.yaml)"
            ) from None


@contextmanager
def _called(deployment: str, port: int, count: int) -> Iterator[None]:
    """Start a run for each further machine; at the end, give up those that never started."""
    from prefect.client.orchestration import get_client
    from prefect.runtime import flow_run

    from tasks.lost_runs import give_up
    from tasks.retries import asked_server

    address = _own_address()
    if address.startswith("127."):
        log.warning(
            "the other machines are told to meet at %s, which is right on this machine alone; if "
            "Prefect is reached through a tunnel, set %s", address, ADDRESS,
        )  # fmt: skip
    leader = f"{address}:{port}"
    runs: list[UUID] = []
    with get_client(sync_client=True) as client:
        target = asked_server(lambda: client.read_deployment_by_name(deployment))
        try:
            for node in range(1, count):
                made = asked_server(
                    lambda node=node: client.create_flow_run_from_deployment(
                        target.id,
                        parameters={"leader": leader, "node": node},
                        name=f"{flow_run.name}-node-{node + 1}",
                    )
                )
                runs.append(made.id)
                log.info(
                    "created %s on %s, which meets this stage at %s", made.name, deployment, leader
                )
            yield
        finally:
            # Those that run end by themselves, when this machine closes their connection.
            for run in runs:
                with suppress(Exception):
                    found = client.read_flow_run(run)
                    if found.state and (found.state.is_scheduled() or found.state.is_pending()):
                        give_up(client, found, "The stage has ended without it.")


def _own_address() -> str:
    """Return the address of this machine that others reach: that by which it reaches Prefect."""
    from prefect.settings import PREFECT_API_URL

    if given := os.environ.get(ADDRESS):
        return given
    url = urlsplit(PREFECT_API_URL.value() or "")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        probe.connect((url.hostname or "127.0.0.1", url.port or 4200))  # sends nothing
        return probe.getsockname()[0]
