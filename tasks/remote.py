"""A stage on other hardware: a run of its own deployment, found or created, and waited for.

Only references and the configuration go there, and nothing comes back: what the stage made is in
the store, under the same record as if it had run here.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import flow_run, task_run
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL

from rlhf.config import PipelineConfig
from rlhf.errors import ConfigError, StageFailed, StageLost
from rlhf.store import ArtifactRef
from tasks.prefect_api import patiently
from tasks.runner import Outcome, done_before, store_of, work_of
from tasks.stages import Stage

#: Seconds between two looks at the child; the second is for those that take long.
POLL, SLOW_POLL = 1.0, 5.0
#: Seconds that a child may wait for a worker before the run's log says so, again and again.
WAIT_NOTICE = 60.0
#: Most children that one piece of work may have had before.
ATTEMPTS = 1000
REJECTED = "GateRejected"
#: Seconds in which Prefect's server hears of a task that has just begun.
LINKED = 10.0


def run_remotely(
    stage: Stage, config: PipelineConfig, inputs: Mapping[str, ArtifactRef], deployment: str
) -> Outcome:
    """Have a deployment run the stage, unless it was run before; the outcome as the store has it.

    A child that is at this very work already, for whatever parent, is waited for: its idempotency
    key is the work's fingerprint, with a number that rises when a child has ended without a result.

    Raises:
        StageLost: The child crashed: its machine, worker or process is gone. Retriable.
        StageFailed: The child failed or was cancelled, or left no result.
    """
    begun = time.monotonic()
    store = store_of(config)
    refs, key = work_of(stage, config, inputs, store)
    done = done_before(stage, config, refs, key, store)
    if done is not None:
        return done
    with get_client(sync_client=True) as client:
        child = _child(client, f"{stage.name}-{key}", deployment, config, inputs)
        ended = _wait(client, child, deployment)
        _must_have_ended_well(client, ended, deployment)
    done = done_before(stage, config, refs, key, store)
    if done is None:
        raise StageFailed(
            f"{stage.name}: {ended.name} on {deployment} completed, but its artifact is not in "
            f"{store.uri}; check that both machines run the same code, data and store"
        )
    return Outcome(stage.name, done.ref, False, time.monotonic() - begun, done.metrics)


def check_placement(config: PipelineConfig) -> None:
    """See that every deployment is there before anything is run.

    Raises:
        ConfigError: One is not, or there is no server that it could be on.
    """
    places = {stage: place for stage, place in config.placement.items() if "/" in place}
    if not places:
        return
    if not PREFECT_API_URL.value():
        raise ConfigError(
            f"placement.{next(iter(places))}: needs a Prefect server; start one and set "
            "PREFECT_API_URL, or leave the placement out"
        )
    with get_client(sync_client=True) as client:
        for stage, place in places.items():
            field = f"placement.{stage} = {place!r}"
            try:
                patiently(lambda place=place: client.read_deployment_by_name(place))
            except ObjectNotFound:
                raise ConfigError(
                    f"{field}: no such deployment on {client.api_url}; run `make deploy`, or "
                    "choose one that `prefect deployment ls` shows"
                ) from None


def _child(
    client: SyncPrefectClient, key: str, deployment: str, config: PipelineConfig,
    inputs: Mapping[str, ArtifactRef],
) -> FlowRun:  # fmt: skip
    """The run that is at this work, or a new one after all those that have ended."""
    there = patiently(lambda: client.read_deployment_by_name(deployment))
    parent = _visible(client, task_run.id)
    parameters = {
        "overrides": config.model_dump(mode="json", exclude={"placement"}),
        "inputs": {role: ref.digest for role, ref in inputs.items()},
    }
    for attempt in range(ATTEMPTS):
        child = patiently(
            lambda attempt=attempt: client.create_flow_run_from_deployment(
                there.id,
                parameters=parameters,
                name=f"{flow_run.name}-{deployment.partition('/')[0]}",
                idempotency_key=f"{key}-{attempt}",
                parent_task_run_id=parent,
                tags=[f"work:{key[-12:]}"],
            )
        )
        if child.state is None or not child.state.is_final():
            mine = child.parent_task_run_id == parent
            get_run_logger().info(
                "%s %s on %s %s",
                "created" if mine else "found", child.name, deployment, _link(child.id),
            )  # fmt: skip
            return child
    raise StageFailed(f"{deployment}: {ATTEMPTS} runs of this work have ended without a result")


def _visible(client: SyncPrefectClient, identifier: str | None) -> UUID | None:
    """This task's id once the server knows it, which hears of tasks by events; else None."""
    give_up = time.monotonic() + LINKED
    while identifier and time.monotonic() < give_up:
        try:
            return patiently(lambda: client.read_task_run(UUID(identifier))).id
        except ObjectNotFound:
            time.sleep(0.2)
    return None


def _wait(client: SyncPrefectClient, child: FlowRun, deployment: str) -> FlowRun:
    """The child when it has ended; what it waits for is said now and then."""
    begun, said = time.monotonic(), time.monotonic()
    shown = ""
    while True:
        found = patiently(lambda: client.read_flow_run(child.id))
        state = found.state
        assert state is not None
        if state.is_final():
            get_run_logger().info("%s: %s", found.name, state.name)
            return found
        if state.name != shown:
            shown = state.name or ""
            get_run_logger().info("%s: %s", found.name, shown)
        waiting = state.type in (StateType.SCHEDULED, StateType.PENDING)
        if waiting and time.monotonic() - said > WAIT_NOTICE:
            said = time.monotonic()
            get_run_logger().warning(
                "%s waits for a worker of pool %s: `prefect worker start --pool %s`, or its "
                "concurrency limit is reached", deployment, found.work_pool_name,
                found.work_pool_name,
            )  # fmt: skip
        time.sleep(POLL if time.monotonic() - begun < WAIT_NOTICE else SLOW_POLL)


def _must_have_ended_well(client: SyncPrefectClient, child: FlowRun, deployment: str) -> None:
    """A rejection has ended well: it left its verdict, which says no to whoever reads it."""
    state: Any = child.state
    if state.is_completed() or state.name == REJECTED:
        return
    said = f"{child.name} on {deployment} {state.name.lower()}: {state.message or 'no reason'}"
    # A trainer that is cancelled saves first, and Prefect takes that for a crash, for a while.
    states = patiently(lambda: client.read_flow_run_states(child.id))
    cancelled = any(before.type == StateType.CANCELLING for before in states)
    if state.is_crashed() and not cancelled:
        raise StageLost(f"{said} {_link(child.id)}")
    raise StageFailed(f"{said} {_link(child.id)}")


def _link(identifier: UUID) -> str:
    base = PREFECT_UI_URL.value()
    return f"{base}/runs/flow-run/{identifier}" if base else f"(run {identifier})"
