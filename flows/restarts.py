"""The flow that starts lost runs of the pipeline again: after each crash, and on a schedule."""

from __future__ import annotations

from typing import Annotated
from uuid import UUID

from prefect import flow, get_run_logger
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.runtime import deployment
from prefect.states import Completed
from pydantic import Field

from rlhf.config.numbers import Seconds
from tasks.restarts import cancel_overdue, restart_lost_runs
from tasks.retries import asked_server


@flow(name="restart-lost-runs", persist_result=False)
def restarts(
    limit: Annotated[int, Field(ge=0, le=1000)] = 10,
    pending_seconds: Annotated[Seconds, Field(gt=0)] = 900.0,
) -> State[None]:
    """Start each run of the pipeline again whose process, worker or machine was lost.

    Args:
        limit: Most restarts of one submitted run; 0 starts none again.
        pending_seconds: Longest time from a worker's acceptance of a run to its process.
    """
    log = get_run_logger()
    with get_client(sync_client=True) as client:
        since = None
        if deployment.id:
            own = UUID(str(deployment.id))
            asked_server(lambda: cancel_overdue(client, own))
            # What was lost before this deployment existed has been seen to by a person.
            since = asked_server(lambda: client.read_deployment(own)).created
        lines = asked_server(
            lambda: restart_lost_runs(
                client, limit=limit, pending_seconds=pending_seconds, since=since
            )
        )
    for line in lines:
        log.warning(line)
    return Completed(message=f"{len(lines)} lost runs." if lines else "No run was lost.")
