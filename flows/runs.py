"""`rlhf runs` and `rlhf status`: what Prefect's server knows of the runs, in the terminal."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from uuid import UUID

import httpx
from rich.console import Console, Group
from rich.live import Live
from rich.table import Table
from rich.text import Text

from flows.showing import (
    clock,
    duration,
    message_of,
    next_step,
    progress_of,
    seconds_of,
    state_text,
)
from rlhf.config.placement import STAGE_NAMES
from rlhf.errors import ArtifactMissing, ConfigError

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import Artifact, FlowRun, TaskRun

FLOWS = ["rlhf-pipeline", "retraining"]
#: Most rows that Prefect's API gives at once.
PAGE = 200
WATCH_EVERY = 2.0

console = Console()


def runs(*, limit: int = 20) -> None:
    """List the runs that Prefect's server knows, the newest first.

    Parameters
    ----------
    limit
        Most runs to list.
    """
    from prefect.client.schemas.sorting import FlowRunSort

    if not 1 <= limit <= PAGE:
        raise ConfigError(f"--limit {limit}: give a number from 1 to {PAGE}")
    with _server("rlhf runs") as client:
        found = _runs(client, sort=FlowRunSort.START_TIME_DESC, limit=limit)
        coming = _runs(
            client, future=True, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=1
        )  # fmt: skip
        places = _deployments(client, found)
    table = Table("run", "id", "state", "started", "time", "where", expand=True)
    # It takes what the others leave, and is cut there.
    table.add_column("message", no_wrap=True, overflow="ellipsis", ratio=1)
    for run in found:
        table.add_row(
            Text(run.name), str(run.id)[:8], state_text(run.state), clock(run.start_time),
            duration(seconds_of(run)), Text(places.get(run.deployment_id, "local")),
            Text(message_of(run.state)),
        )  # fmt: skip
    console.print(table if found else f"no runs on {client.api_url}", highlight=False)
    for run in coming:
        line = f"next: {run.name} {str(run.id)[:8]} at {clock(run.expected_start_time)}"
        console.print(line, highlight=False)


def status(run: str, *, watch: bool = False) -> None:
    """Show a run's stages: their state, progress and key metric, and where they ran.

    Parameters
    ----------
    run
        Its name, its id, or the beginning of one of them.
    watch
        Show it anew every 2 s until the run has ended.
    """
    with _server(run) as client:
        shown = _meant(client, run)
        if not watch:
            console.print(_status(client, shown), soft_wrap=not console.is_terminal)
            return
        with Live(_status(client, shown), console=console, auto_refresh=False) as live:
            while shown.state is None or not (shown.state.is_final() or shown.state.is_paused()):
                time.sleep(WATCH_EVERY)
                shown = client.read_flow_run(shown.id)
                live.update(_status(client, shown), refresh=True)


@contextmanager
def _server(asked: str) -> Iterator[SyncPrefectClient]:
    """A client of the server that was set.

    Raises:
        ConfigError: None is set, or it does not answer.
    """
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL

    # Without it, the client would start a server of its own, on which there are no runs.
    if not PREFECT_API_URL.value():
        raise ConfigError(
            f"{asked}: needs the Prefect server that the runs are on; set PREFECT_API_URL"
        )
    with get_client(sync_client=True) as client:
        try:
            yield client
        except httpx.HTTPError as error:
            # The address may hold a password.
            where = client.api_url.copy_with(userinfo=b"")
            said = getattr(getattr(error, "response", None), "reason_phrase", None) or error
            raise ConfigError(
                f"{asked}: Prefect's server does not answer at {where} ({said}); start it, or set "
                "PREFECT_API_URL"
            ) from error


def _runs(
    client: SyncPrefectClient, *, future: bool = False, flows: Sequence[str] = FLOWS, **asked: Any
) -> list[FlowRun]:
    """Runs of these flows that are due, or those that a schedule has made for the future."""
    from prefect.client.schemas.filters import (
        FlowFilter,
        FlowFilterName,
        FlowRunFilter,
        FlowRunFilterExpectedStartTime,
    )

    now: Any = datetime.now(UTC)
    due = FlowRunFilterExpectedStartTime(**{"after_" if future else "before_": now})
    return client.read_flow_runs(
        flow_filter=FlowFilter(name=FlowFilterName(any_=[*flows])),
        flow_run_filter=FlowRunFilter(expected_start_time=due),
        **asked,
    )


def _meant(client: SyncPrefectClient, text: str) -> FlowRun:
    """The one run of that name, id, or beginning of one of them.

    Raises:
        ArtifactMissing: There is none.
        ConfigError: Several are meant.
    """
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_flow_run(UUID(text))
    except (ValueError, ObjectNotFound):
        pass
    known: list[FlowRun] = []
    while page := _runs(
        client, flows=[*FLOWS, *STAGE_NAMES], sort=FlowRunSort.START_TIME_DESC, limit=PAGE,
        offset=len(known),
    ):  # fmt: skip
        known += page
    called = [run for run in known if run.name == text]
    begun = [run for run in known if run.name.startswith(text) or str(run.id).startswith(text)]
    meant = called or (begun if text else [])
    if not meant:
        newest = ", ".join(run.name for run in known[:5]) or "none"
        raise ArtifactMissing(f"{text!r}: no run is called that; the newest are: {newest}")
    if len(meant) > 1:
        some = ", ".join(f"{run.name} ({str(run.id)[:8]})" for run in meant[:5])
        raise ConfigError(f"{text!r}: {len(meant)} runs are meant; give more of one: {some}")
    return meant[0]


def _status(client: SyncPrefectClient, run: FlowRun) -> Group:
    from prefect.client.schemas.filters import (
        ArtifactFilter,
        ArtifactFilterFlowRunId,
        FlowRunFilter,
        FlowRunFilterId,
        FlowRunFilterParentFlowRunId,
    )
    from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort

    alone = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    tasks = client.read_task_runs(flow_run_filter=alone, limit=PAGE)
    below = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run.id]))
    children = client.read_flow_runs(
        flow_run_filter=below, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=PAGE
    )
    ids = ArtifactFilterFlowRunId(any_=[run.id, *(child.id for child in children)])
    artifacts = client.read_artifacts(
        artifact_filter=ArtifactFilter(flow_run_id=ids), sort=ArtifactSort.UPDATED_DESC, limit=PAGE
    )
    places = _deployments(client, [run, *children])
    parts: list[Any] = [
        Text.assemble(
            (run.name, "bold"), f" {run.id}  ", state_text(run.state), f"  {message_of(run.state)}"
        ),
        Text(
            f"started {clock(run.start_time)}, {duration(seconds_of(run))}, "
            f"{places.get(run.deployment_id, 'local')}"
        ),
        _stages(tasks, children, artifacts, places),
        *(Text(line) for line in _report(artifacts)),
        *(Text(line, "bold") for line in next_step(run)),
    ]
    return Group(*parts)


def _stages(
    tasks: Sequence[TaskRun], children: Sequence[FlowRun], artifacts: Sequence[Artifact],
    places: dict[UUID | None, str],
) -> Table:  # fmt: skip
    from tasks.stages import STAGES

    table = Table("stage", "state", "time", "progress", "key metric", "where")
    for stage in STAGES:
        tries = sorted(
            (task for task in tasks if task.name == stage),
            key=lambda task: task.expected_start_time or datetime.min.replace(tzinfo=UTC),
        )
        if not tries:
            table.add_row(stage, Text("not run", "dim"), "", "", "", "")
            continue
        last, of_stage = tries[-1], {task.id for task in tries}
        # A parent that is tried again finds the child that an earlier try has made.
        made = [child for child in children if child.parent_task_run_id in of_stage]
        child = made[-1] if made else None
        at_work = child or last
        told = next((a for a in artifacts if _tells(a, stage, at_work)), None)
        message = message_of(last.state) or (message_of(child.state) if child else "")
        table.add_row(
            stage, state_text(last.state), duration(seconds_of(last)), progress_of(told, at_work),
            Text(message), _where(child, places),
        )  # fmt: skip
    return table


def _tells(artifact: Artifact, stage: str, at_work: FlowRun | TaskRun) -> bool:
    """Whether it is the progress of this task, or of the child that does its work."""
    ids = (artifact.flow_run_id, artifact.task_run_id)
    return artifact.key == f"{stage}-progress" and at_work.id in ids


def _where(child: FlowRun | None, places: dict[UUID | None, str]) -> Text:
    """The child that was made for a stage, with its own state, if it is not done inline."""
    if child is None:
        return Text("inline")
    place = places.get(child.deployment_id, "local")
    return Text.assemble(f"{place}: {child.name} {str(child.id)[:8]} ", state_text(child.state))


def _report(artifacts: Sequence[Artifact]) -> list[str]:
    """Where the newest report lies, and the command that gets it: the end of its summary."""
    newest = next((a for a in artifacts if a.key == "report"), None)
    if newest is None:
        return []
    last = str(newest.data).rpartition("\n\nReport:")[2]
    return [f"report: {' '.join(last.split())}"]


def _deployments(client: SyncPrefectClient, runs: Sequence[FlowRun]) -> dict[UUID | None, str]:
    """`<deployment> on <work pool>` of the deployments of these runs."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

    ids = sorted({run.deployment_id for run in runs if run.deployment_id})
    if not ids:
        return {}
    asked = DeploymentFilter(id=DeploymentFilterId(any_=ids))
    found = client.read_deployments(deployment_filter=asked, limit=PAGE)
    return {d.id: f"{d.name} on {d.work_pool_name or 'no pool'}" for d in found}
