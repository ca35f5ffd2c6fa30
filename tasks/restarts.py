"""Pipeline runs that were lost with their process, worker or machine: each is started again.

The new run has the same parameters. It gets what is done from the store, and waits for stages that
still run. It can't be started twice: its idempotency key is made of the lost run's id, and the
server has one run for each key. So any number of calls, at any time, start one.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from datetime import UTC, datetime, timedelta
from email.utils import parsedate_to_datetime
from typing import Any
from uuid import UUID

import httpx
from prefect.client.orchestration import SyncPrefectClient
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterDeploymentId,
    FlowRunFilterEndTime,
    FlowRunFilterExpectedStartTime,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.sorting import FlowRunSort
from prefect.exceptions import PrefectHTTPStatusError
from prefect.states import Cancelled, Scheduled

from rlhf.config.numbers import doubled
from tasks.lost_runs import (
    NEVER_STARTED,
    RESTART_OF,
    RESTARTED,
    Limits,
    give_up,
    is_cancelled,
    states_of,
)
from tasks.prefect_server import PIPELINES, server_error

#: Age up to which a lost run is started again: workers may have been away as long.
OLDEST = timedelta(days=1)
#: Seconds before the first restart; they double with each further one, up to the longest.
FIRST_DELAY, LONGEST_DELAY = 5.0, 600.0
#: Prefix of the tag with the number of restarts before a run.
RESTART = "restart:"
#: Tag of a lost run that is not started again.
NOT_RESTARTED = "not-restarted"
#: Tag of a run that a schedule made, which does not pass to another run.
_AUTO_SCHEDULED = "auto-scheduled"
#: Runs that the server returns in one answer.
_PAGE = 200
#: Answers to a request that will not be better another time; rights and rates may be.
_REFUSED = {
    httpx.codes.BAD_REQUEST, httpx.codes.NOT_FOUND, httpx.codes.CONFLICT,
    httpx.codes.UNPROCESSABLE_ENTITY,
}  # fmt: skip


def restart_lost_runs(
    client: SyncPrefectClient, *, limit: int, pending_seconds: float, since: datetime | None = None
) -> list[str]:
    """Start the pipeline's lost runs again, and return a line for each that was lost.

    Lost are runs of deployments that are Crashed, and those that were Pending for too long. A run
    that was cancelled is not lost, and one that waits for an approval has no process to lose.

    Args:
        client: Of Prefect's server.
        limit: Most restarts of one submitted run.
        pending_seconds: Longest time from a worker's acceptance to a process; doubles with each
            restart.
        since: Earlier losses are left alone.
    """
    now = _server_time(client)
    earliest = max(now - OLDEST, since or now - OLDEST)
    lines: list[str] = []
    for run in _runs(client, [StateType.PENDING, StateType.CANCELLING]):
        assert run.state is not None
        limits = Limits(
            pending=doubled(pending_seconds, restarts_before(run)), cancelling=2 * pending_seconds
        )
        exceeded = limits.exceeded(run.state, (now - run.state.timestamp).total_seconds())
        # Without a restart left nothing would take its place: a process that comes late is right.
        is_last = run.state.type == StateType.PENDING and restarts_before(run) >= limit
        if run.deployment_id and exceeded is not None and not is_last:
            give_up(client, run, exceeded)
    ended = FlowRunFilterEndTime(after_=earliest)  # pyright: ignore[reportArgumentType]
    for run in _runs(client, [StateType.CRASHED, StateType.CANCELLED], end_time=ended):
        if _is_lost(run):
            lines.append(_restart(client, run, limit))
    return lines


def cancel_overdue(client: SyncPrefectClient, deployment: UUID) -> None:
    """Cancel the runs of a deployment that are due: this one does what they would.

    A schedule goes on while no worker is there.
    """
    due = FlowRunFilterExpectedStartTime(before_=_server_time(client))  # pyright: ignore[reportArgumentType]
    for run in _runs(
        client, [StateType.SCHEDULED], expected_start_time=due,
        deployment_id=FlowRunFilterDeploymentId(any_=[deployment]), flows=None,
    ):  # fmt: skip
        client.set_flow_run_state(run.id, Cancelled(message="A later run did the same."))


def restarts_before(run: FlowRun) -> int:
    """Return how many lost runs this run has taken the place of, one after the other."""
    numbers = (tag.removeprefix(RESTART) for tag in run.tags if tag.startswith(RESTART))
    return next((int(number) for number in numbers if number.isdecimal()), 0)


def restart_delay(before: int) -> timedelta:
    """Return the wait before a restart, after so many others."""
    return timedelta(seconds=min(doubled(FIRST_DELAY, before), LONGEST_DELAY))


def _server_time(client: SyncPrefectClient) -> datetime:
    """Return the time by the server's clock, by which it dates states; this machine's may differ.

    A proxy may leave the header out.
    """
    date = client._client.get("/health").headers.get("Date")
    return parsedate_to_datetime(date) if date else datetime.now(UTC)


def _runs(
    client: SyncPrefectClient,
    types: Sequence[StateType],
    flows: Sequence[str] | None = PIPELINES,
    **conditions: Any,
) -> Iterator[FlowRun]:
    """Yield the runs of these flows, or of all, in states of these types."""
    names = FlowFilter(name=FlowFilterName(any_=[*flows])) if flows else None
    state = FlowRunFilterState(type=FlowRunFilterStateType(any_=[*types]))
    found: list[FlowRun] = []
    while True:
        page = client.read_flow_runs(
            flow_filter=names,
            flow_run_filter=FlowRunFilter(state=state, **conditions),
            sort=FlowRunSort.ID_DESC, limit=_PAGE, offset=len(found),
        )  # fmt: skip
        found += page
        if len(page) < _PAGE:
            break
    yield from found


def _is_lost(run: FlowRun) -> bool:
    """Return whether a run that has ended was lost, and nothing has been done about it."""
    if not run.deployment_id or run.state is None or {RESTARTED, NOT_RESTARTED} & {*run.tags}:
        return False
    if run.state.type == StateType.CANCELLED and run.state.name != NEVER_STARTED:
        return False
    return not is_cancelled(states_of(str(run.id)))


def _restart(client: SyncPrefectClient, run: FlowRun, limit: int) -> str:
    """Create the run that takes a lost one's place, if there may be one; return what was done."""
    before = restarts_before(run)
    if before >= limit:
        return _note(
            client, run, NOT_RESTARTED,
            f"lost after {before} restarts, which is the limit: not started again; find the cause, "
            "then submit it anew",
        )  # fmt: skip
    own = (RESTART_OF, RESTART)
    tags = [tag for tag in run.tags if not tag.startswith(own) and tag != _AUTO_SCHEDULED]
    try:
        assert run.deployment_id
        made = client.create_flow_run_from_deployment(
            run.deployment_id,
            parameters=run.parameters,
            tags=[*tags, f"{RESTART_OF}{run.id}", f"{RESTART}{before + 1}"],
            idempotency_key=f"{RESTART_OF}{run.id}",
            state=Scheduled(scheduled_time=_server_time(client) + restart_delay(before)),
            work_queue_name=run.work_queue_name,
            job_variables=run.job_variables or None,
        )
    except PrefectHTTPStatusError as error:
        if error.response.status_code not in _REFUSED:
            raise
        return _note(client, run, NOT_RESTARTED, f"lost, and refused: {server_error(error)}")
    return _note(
        client, run, RESTARTED, f"lost: started again as {made.name} ({made.id}), "
        f"restart {before + 1} of {limit} at most",
    )  # fmt: skip


def _note(client: SyncPrefectClient, run: FlowRun, tag: str, line: str) -> str:
    """Tag a lost run, and add a line to its log; return the line with the run's name."""
    entry = {
        "name": "rlhf.restarts",
        "level": logging.WARNING,
        "message": f"This run was {line}.",
        "timestamp": datetime.now(UTC).isoformat(),
        "flow_run_id": str(run.id),
    }
    client.create_logs([entry])
    client.update_flow_run(run.id, tags=[*run.tags, tag])
    return f"{run.name} ({run.id}) was {line}"
