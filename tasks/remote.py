"""Stages on other hardware: each as a run of its own deployment.

The child run gets references and the configuration, and returns nothing: its result is in the
store, under the same record as if it had run here. Requests to Prefect's server are retried while
it restarts.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Mapping
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.exceptions import ObjectNotFound
from prefect.logging import get_run_logger
from prefect.runtime import flow_run, task_run
from prefect.settings import PREFECT_API_URL, PREFECT_UI_URL

from rlhf.budget import Spending
from rlhf.config import PipelineConfig
from rlhf.config.pipeline import place_names
from rlhf.errors import ConfigError, StageFailed, StageLost
from rlhf.report.model import StageState
from rlhf.store import ArtifactRef
from tasks.board import board
from tasks.budget import require_left
from tasks.ledger import costs_of
from tasks.lost_runs import NEVER_STARTED, Limits, give_up
from tasks.retries import asked_server as _retried
from tasks.runner import NOTHING_SPENT, Outcome, recorded_outcome, used, work_of
from tasks.stage import Stage, store_of

#: Seconds between two polls of the child, before and after `WAIT_NOTICE`.
POLL, SLOW_POLL = 1.0, 5.0
#: Seconds between two notices in the log that the child waits for a worker.
WAIT_NOTICE = 60.0
#: Limit on the children that have ended without a result of the same work.
ATTEMPTS = 1000
#: Seconds in which the event of a task's start reaches Prefect's database.
TASK_EVENT = 10.0
#: Prefix of the tag that children bear.
WORK_TAG = "work:"


def run_remotely(
    stage: Stage, config: PipelineConfig, inputs: Mapping[str, ArtifactRef], deployment: str,
    held: Iterable[ArtifactRef] = (), spent: Spending = NOTHING_SPENT,
) -> Outcome:  # fmt: skip
    """Run a stage in a deployment, unless it has a record; return the result.

    A child of any parent that already does this work is waited for: the idempotency key is the
    work's fingerprint, with a number that rises when a child has ended without a result. What one
    with another budget was stopped at, or failed at, is no result here: another child goes on.

    Raises:
        StageLost: The child crashed, or never started: its machine, worker or process is gone.
            Retriable.
        StageFailed: The child failed or was cancelled, or left no result.
    """
    started = time.monotonic()
    store = store_of(config)
    work = work_of(stage, config, inputs, store)
    recorded = recorded_outcome(work, store)
    if recorded is not None:
        return recorded
    require_left(stage, config, spent)
    # The child may wait for its machine longer than any grace period.
    with used(work, store, held), get_client(sync_client=True) as client:
        key = f"{stage.name}-{work.key}"
        while True:
            child, unstarted = _child(client, key, deployment, config, inputs, spent)
            limits = Limits.of(config.retries, unstarted)
            ended = _wait(client, child, deployment, limits)
            own = _has_budget_of(child, config)
            if own:
                _require_completed(client, ended, deployment)
            result = recorded_outcome(work, store)
            if result is not None or own:
                break
            get_run_logger().info(
                "%s had another budget; another run goes on from what it has done", child.name
            )
    if result is None:
        raise StageFailed(
            f"{stage.name}: {ended.name} on {deployment} completed, but its artifact is not in "
            f"{store.uri}; check that both machines run the same code, data and store"
        )
    cost = costs_of(store, [result.ref.digest]).get(result.ref.digest)
    return Outcome(
        stage.name, result.ref, False, time.monotonic() - started, result.metrics, cost
    )  # fmt: skip


def is_child_run() -> bool:
    """Return whether the flow run of this process is one that `run_remotely` created."""
    return any(tag.startswith(WORK_TAG) for tag in flow_run.get_tags())


def check_placement(config: PipelineConfig) -> None:
    """Check that every deployment of the placement exists.

    Raises:
        ConfigError: One does not, or no Prefect server is configured.
    """
    placement = {stage: place for stage, place in config.placement.items() if "/" in place}
    if not placement:
        return
    if not PREFECT_API_URL.value():
        raise ConfigError(
            f"placement.{next(iter(placement))}: needs a Prefect server; start one and set "
            "PREFECT_API_URL, or leave the placement out"
        )
    with get_client(sync_client=True) as client:
        for stage, place in placement.items():
            field = f"placement.{stage} = {place!r}"
            try:
                _retried(lambda place=place: client.read_deployment_by_name(place))
            except ObjectNotFound:
                short = place_names(stage, place)[0]
                raise ConfigError(
                    f"{field}: no such deployment on {client.api_url}; run `make deploy`, or "
                    f"choose one that `prefect deployment ls` shows ({short} alone means "
                    f"{stage}/{stage}-{short})"
                ) from None


def _child(
    client: SyncPrefectClient, key: str, deployment: str, config: PipelineConfig,
    inputs: Mapping[str, ArtifactRef], spent: Spending,
) -> tuple[FlowRun, int]:  # fmt: skip
    """Return the run that does this work, found by its idempotency key or created.

    Returns:
        The run, and how many before it never started.
    """
    target = _retried(lambda: client.read_deployment_by_name(deployment))
    parent = _linkable(client, task_run.id)
    parameters: dict[str, Any] = {
        "overrides": config.model_dump(mode="json", exclude={"placement"}),
        "inputs": {role: ref.digest for role, ref in inputs.items()},
    }
    if config.budget.is_set:
        parameters["spent"] = spent.model_dump()
    unstarted = 0
    for attempt in range(ATTEMPTS):
        child = _retried(
            lambda attempt=attempt: client.create_flow_run_from_deployment(
                target.id,
                parameters=parameters,
                name=f"{flow_run.name}-{deployment.partition('/')[0]}",
                idempotency_key=f"{key}-{attempt}",
                parent_task_run_id=parent,
                tags=[f"{WORK_TAG}{key[-12:]}"],
            )
        )
        if child.state is None or not child.state.is_final():
            created = child.parent_task_run_id == parent
            get_run_logger().info(
                "%s %s on %s %s",
                "created" if created else "found", child.name, deployment, _link(child.id),
            )  # fmt: skip
            return child, unstarted
        unstarted += child.state.name == NEVER_STARTED
    raise StageFailed(f"{deployment}: {ATTEMPTS} runs of this work have ended without a result")


def _has_budget_of(child: FlowRun, config: PipelineConfig) -> bool:
    """Return whether a child was created with the same budget and prices."""
    overrides: Mapping[str, Any] = child.parameters.get("overrides") or {}
    own = config.model_dump(mode="json", include={"budget", "costs"})
    return all(overrides.get(name) == value for name, value in own.items())


def _linkable(client: SyncPrefectClient, identifier: str | None) -> UUID | None:
    """Return this task's id once the server has it, by an event; else None."""
    end = time.monotonic() + TASK_EVENT
    while identifier and time.monotonic() < end:
        try:
            return _retried(lambda: client.read_task_run(UUID(identifier))).id
        except ObjectNotFound:
            time.sleep(0.2)
    return None


def _wait(client: SyncPrefectClient, child: FlowRun, deployment: str, limits: Limits) -> FlowRun:
    """Wait until the child has ended, and return it; its states are logged.

    A child that stays in a state without a process for longer than its limit is ended. The time
    is that of this machine alone, whose clock may differ from the server's.
    """
    started = last_notice = since = time.monotonic()
    logged, kind = "", None
    while True:
        run = _retried(lambda: client.read_flow_run(child.id))
        assert run.state is not None
        if run.state.type != kind:  # one that waits for a slot is Scheduled again and again
            since, kind = time.monotonic(), run.state.type
        exceeded = limits.exceeded(run.state, time.monotonic() - since)
        if exceeded is not None:
            run = give_up(client, run, exceeded)
        state = run.state
        assert state is not None
        if state.is_final():
            get_run_logger().info("%s: %s", run.name, state.name)
            board.wait("")
            return run
        if state.name != logged:
            logged = state.name or ""
            get_run_logger().info("%s: %s", run.name, logged)
        waiting = state.type in (StateType.SCHEDULED, StateType.PENDING)
        if waiting and time.monotonic() - last_notice > WAIT_NOTICE:
            last_notice = time.monotonic()
            get_run_logger().warning(
                "%s waits for a worker of pool %s: `prefect worker start --pool %s`, or its "
                "concurrency limit is reached", deployment, run.work_pool_name,
                run.work_pool_name,
            )  # fmt: skip
        time.sleep(POLL if time.monotonic() - started < WAIT_NOTICE else SLOW_POLL)


def _cure(run: FlowRun) -> str:
    """Return what starts a run that has no worker yet; empty for one that runs."""
    if run.state is None or run.state.type not in (StateType.SCHEDULED, StateType.PENDING):
        return ""
    return f", for a worker of pool {run.work_pool_name}"


def _require_completed(client: SyncPrefectClient, child: FlowRun, deployment: str) -> None:
    """Raise StageLost or StageFailed for a child that did not complete.

    GateRejected counts as completed: its verdict is in the store, and is enforced by the caller.
    """
    state: Any = child.state
    if state.is_completed() or state.name == StageState.GATE_REJECTED:
        return
    reason = state.message or "no reason"
    message = f"{child.name} on {deployment} {state.name.lower()}: {reason} {_link(child.id)}"
    if state.name == NEVER_STARTED:
        raise StageLost(message)
    # A cancelled trainer saves first; Prefect reports a crash until it has ended.
    states = _retried(lambda: client.read_flow_run_states(child.id))
    cancelled = any(before.type == StateType.CANCELLING for before in states)
    raise StageLost(message) if state.is_crashed() and not cancelled else StageFailed(message)


def _link(identifier: UUID) -> str:
    base = PREFECT_UI_URL.value()
    return f"{base}/runs/flow-run/{identifier}" if base else f"(run {identifier})"
