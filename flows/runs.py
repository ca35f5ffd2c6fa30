"""The commands `rlhf runs` and `rlhf status`: runs on Prefect's server."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast
from uuid import UUID

from rich.console import Group
from rich.live import Live
from rich.table import Table

from rlhf.config import PipelineConfig, apply_machine_settings
from rlhf.config.pipeline import STAGE_NAMES
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.files import expand_home
from rlhf.plain_text import one_line
from tasks.console import console, say, styled
from tasks.listing import (
    Column,
    JsonOption,
    WideOption,
    listing_table,
    print_listing,
    show_json,
    show_listing,
)
from tasks.prefect_server import PIPELINES, check_settings, prefect_server
from tasks.run_record import RUNNING, RunRecord, read_records
from tasks.screen import style_of

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import Artifact, FlowRun, State, TaskRun
    from rich.text import Text

#: Prefect's API returns at most this many rows per request.
PAGE = 200
#: Seconds between two updates of `rlhf status --watch`.
WATCH_EVERY = 2.0

#: Colours of Prefect's types of states.
_TYPE_STYLES = {
    "COMPLETED": "green", "RUNNING": "blue", "FAILED": "red", "CRASHED": "bold red",
    "PAUSED": "yellow",
}  # fmt: skip


def runs(
    *, limit: int = 20, work_dir: Path | None = None, wide: WideOption = False,
    json: JsonOption = False,
) -> None:  # fmt: skip
    """List the runs that Prefect's server knows, if one is set, and this machine's, newest first.

    Parameters
    ----------
    limit
        Most runs to list.
    work_dir
        Work folder with the records of this machine's runs; as configured by default.
    """
    if not 1 <= limit <= PAGE:
        raise ConfigError(f"--limit {limit}: give a number from 1 to {PAGE}")
    check_settings()
    from prefect.settings import PREFECT_API_URL

    folder = records_folder(work_dir)
    rows = [_local_row(record) for record in read_records(folder)]
    scheduled: Sequence[FlowRun] = ()
    address = PREFECT_API_URL.value()
    if address:
        listed, scheduled = _server_rows(limit)
        known = {row["name"] for row in listed}
        rows = listed + [row for row in rows if row["name"] not in known][:limit]
    else:
        rows = rows[:limit]
    columns = (
        Column("run", "name"),
        # A run without an id is one of this machine, which the server does not know.
        Column("id", "id", wide=True, show=lambda id: id[:8]),
        Column("state", "state", show=_state_name),
        Column("started", "started", show=lambda t: _local_time(datetime.fromisoformat(t))),
        Column("time", "seconds", show=duration),
        Column("where", "where", wide=True),
        Column("message", "message"),
    )
    if rows or json:
        show_listing(rows, columns, wide=wide, json=json)
    elif address:
        say(f"no runs on {address}, and none in {folder}")
    else:
        say(f"no runs in {folder}; for those of a Prefect server set PREFECT_API_URL")
    for run in () if json else scheduled:
        say(f"next: {run.name} {str(run.id)[:8]} at {_local_time(run.expected_start_time)}")


def records_folder(work_dir: Path | None) -> Path:
    """Return the folder with the records of this machine's runs."""
    configured = apply_machine_settings(PipelineConfig()).runtime.work_dir
    return expand_home(work_dir or configured) / "runs"


def _local_row(record: RunRecord) -> dict[str, Any]:
    at = next((stage.name for stage in record.stages if stage.state == RUNNING), "")
    end = record.updated if record.is_over else time.time()
    return {
        "name": record.name, "id": None, "state": record.state,
        "started": datetime.fromtimestamp(record.started, UTC).isoformat(),
        "seconds": max(end - record.started, 0.0), "where": record.host,
        "message": record.waits or record.reason or at,
    }  # fmt: skip


def _server_rows(limit: int) -> tuple[list[dict[str, Any]], list[FlowRun]]:
    """Return the newest runs of the server as rows, and the next one that is scheduled."""
    with prefect_server("rlhf runs") as client:
        from prefect.client.schemas.sorting import FlowRunSort

        started = _runs(client, sort=FlowRunSort.START_TIME_DESC, limit=limit)
        scheduled = _runs(client, future=True, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=1)
        deployments = _deployments(client, started)
    rows = [
        {
            "name": run.name, "id": str(run.id), "state": run.state and run.state.name,
            "started": run.start_time and run.start_time.isoformat(),
            "seconds": _seconds_of(run), "message": _message_of(run.state),
            "where": deployments.get(run.deployment_id, "local"),
        }
        for run in started
    ]  # fmt: skip
    return rows, scheduled


def status(
    run: str, *, watch: bool = False, wide: WideOption = False, json: JsonOption = False
) -> None:
    """Show a run's stages: their state, progress and key metric, and where they ran.

    Parameters
    ----------
    run
        Its name, its id, or the beginning of one of them.
    watch
        Show it anew every 2 s until the run has ended.
    """
    if watch and json:
        raise ConfigError("--watch and --json are both given; give one of them")
    with prefect_server(run) as client:
        shown = find_run(client, run)
        if json:
            show_json(_status_values(client, shown))
            return
        picture, table = _status(client, shown, wide)
        if not watch:
            print_listing(picture, table, wide=wide)
            return
        with Live(picture, console=console, auto_refresh=False) as live:
            while shown.state is None or not (shown.state.is_final() or shown.state.is_paused()):
                time.sleep(WATCH_EVERY)
                shown = client.read_flow_run(shown.id)
                live.update(_status(client, shown, wide)[0], refresh=True)


def _runs(
    client: SyncPrefectClient,
    *,
    future: bool = False,
    flows: Sequence[str] = PIPELINES,
    **query: Any,
) -> list[FlowRun]:
    """Return the due runs of these flows, or those scheduled for the future."""
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
        **query,
    )


def _deployments(client: SyncPrefectClient, runs: Sequence[FlowRun]) -> dict[UUID | None, str]:
    """Return the runs' deployments by id, each as `<deployment> on <work pool>`."""
    from prefect.client.schemas.filters import DeploymentFilter, DeploymentFilterId

    ids = sorted({run.deployment_id for run in runs if run.deployment_id})
    if not ids:
        return {}
    by_id = DeploymentFilter(id=DeploymentFilterId(any_=ids))
    deployments = client.read_deployments(deployment_filter=by_id, limit=PAGE)
    return {d.id: f"{d.name} on {d.work_pool_name or 'no pool'}" for d in deployments}


def find_run(client: SyncPrefectClient, text: str) -> FlowRun:
    """Return the one run with this name, id, or prefix of one of them.

    Raises:
        ArtifactMissing: No run matches.
        ConfigError: Several match.
    """
    from prefect.client.schemas.sorting import FlowRunSort
    from prefect.exceptions import ObjectNotFound

    try:
        return client.read_flow_run(UUID(text))
    except (ValueError, ObjectNotFound):
        pass
    listed: list[FlowRun] = []
    while page := _runs(
        client, flows=[*PIPELINES, *STAGE_NAMES], sort=FlowRunSort.START_TIME_DESC, limit=PAGE,
        offset=len(listed),
    ):  # fmt: skip
        listed += page
    exact = [run for run in listed if run.name == text]
    prefix = [run for run in listed if run.name.startswith(text) or str(run.id).startswith(text)]
    matches = exact or (prefix if text else [])
    if not matches:
        newest = ", ".join(run.name for run in listed[:5]) or "none"
        raise ArtifactMissing(f"{text!r}: no run is called that; the newest are: {newest}")
    if len(matches) > 1:
        some = ", ".join(f"{run.name} ({str(run.id)[:8]})" for run in matches[:5])
        raise ConfigError(f"{text!r}: {len(matches)} runs are meant; give more of one: {some}")
    return matches[0]


def read_run(
    client: SyncPrefectClient, run: FlowRun
) -> tuple[list[TaskRun], list[FlowRun], list[Artifact]]:
    """Return a run's tasks, its stages' runs elsewhere, and the artifacts of all, newest first."""
    from prefect.client.schemas.filters import (
        ArtifactFilter,
        ArtifactFilterFlowRunId,
        FlowRunFilter,
        FlowRunFilterId,
        FlowRunFilterParentFlowRunId,
    )
    from prefect.client.schemas.sorting import ArtifactSort, FlowRunSort

    this_run = FlowRunFilter(id=FlowRunFilterId(any_=[run.id]))
    tasks = client.read_task_runs(flow_run_filter=this_run, limit=PAGE)
    has_parent = FlowRunFilter(parent_flow_run_id=FlowRunFilterParentFlowRunId(any_=[run.id]))
    children = client.read_flow_runs(
        flow_run_filter=has_parent, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=PAGE
    )
    ids = ArtifactFilterFlowRunId(any_=[run.id, *(child.id for child in children)])
    artifacts = client.read_artifacts(
        artifact_filter=ArtifactFilter(flow_run_id=ids), sort=ArtifactSort.UPDATED_DESC, limit=PAGE
    )
    return tasks, children, artifacts


def _status(client: SyncPrefectClient, run: FlowRun, wide: bool) -> tuple[Group, Table]:
    """Return the whole display of `rlhf status`, read anew from the server, and its table."""
    told = _status_values(client, run)
    columns = (
        Column("stage", "stage"),
        Column("state", "state", show=_state_name),
        Column("time", "seconds", show=duration),
        Column("progress", "progress"),
        Column("where", "where", wide=True),
        Column("key metric", "message"),
    )
    table = listing_table(told["stages"], columns, wide=wide)
    head = styled((one_line(run.name), "bold"), f" {run.id}  ", _state_text(run.state))
    started = f"started {_local_time(run.start_time)}, {duration(told['seconds'])}"
    parts: list[Any] = [head, one_line(f"{started}, {told['where']}"), table]
    if told["message"]:
        parts.insert(1, one_line(told["message"]))
    parts += [*map(one_line, told["report"])]
    parts += [styled((one_line(line), "bold")) for line in told["next"]]
    return Group(*parts), table


def _status_values(client: SyncPrefectClient, run: FlowRun) -> dict[str, Any]:
    """Return what `rlhf status` shows of a run and its stages as plain values."""
    from tasks.stages import STAGES

    tasks, children, artifacts = read_run(client, run)
    deployments = _deployments(client, [run, *children])
    stages: list[dict[str, Any]] = []
    for stage in STAGES:
        last, child, progress = stage_run(stage, tasks, children, artifacts)
        row: dict[str, Any] = {"stage": stage, "state": "not run"}
        if last is not None:
            row |= {
                "state": last.state.name if last.state else "Unknown",
                "seconds": _seconds_of(last), "progress": _progress_of(progress, child or last),
                "message": _message_of(last.state) or (_message_of(child.state) if child else ""),
                "where": _location(child, deployments),
            }  # fmt: skip
        stages.append(row)
    return {
        "name": run.name, "id": str(run.id), "state": run.state and run.state.name,
        "message": _message_of(run.state), "seconds": _seconds_of(run),
        "started": run.start_time and run.start_time.isoformat(),
        "where": deployments.get(run.deployment_id, "local"), "stages": stages,
        "report": _report(artifacts), "next": next_step(client, run),
    }  # fmt: skip


def stage_run(
    stage: str, tasks: Sequence[TaskRun], children: Sequence[FlowRun],
    artifacts: Sequence[Artifact],
) -> tuple[TaskRun | None, FlowRun | None, Artifact | None]:  # fmt: skip
    """Return the last try of a stage, its run elsewhere, and its progress, each if there is one."""
    tries = sorted(
        (task for task in tasks if task.name == stage),
        key=lambda task: task.expected_start_time or datetime.min.replace(tzinfo=UTC),
    )
    if not tries:
        return None, None, None
    last, of_stage = tries[-1], {task.id for task in tries}
    # A retried parent may wait for a child that an earlier try has created.
    created = [child for child in children if child.parent_task_run_id in of_stage]
    child = created[-1] if created else None
    progress = next((a for a in artifacts if _is_progress(a, stage, child or last)), None)
    return last, child, progress


def _is_progress(artifact: Artifact, stage: str, run: FlowRun | TaskRun) -> bool:
    """Return whether an artifact is the progress of this stage in this run."""
    ids = (artifact.flow_run_id, artifact.task_run_id)
    return artifact.key == f"{stage}-progress" and run.id in ids


def _location(child: FlowRun | None, deployments: dict[UUID | None, str]) -> str:
    """Return the deployment, name and state of a stage's child run, or `inline`."""
    if child is None:
        return "inline"
    state = child.state.name if child.state else "Unknown"
    deployment = deployments.get(child.deployment_id, "local")
    return f"{deployment}: {child.name} {str(child.id)[:8]} {state}"


def _report(artifacts: Sequence[Artifact]) -> list[str]:
    """Return the last part of the newest report's summary: its path and pull command."""
    newest = next((a for a in artifacts if a.key == "report"), None)
    if newest is None:
        return []
    last = str(newest.data).rpartition("\n\nReport:")[2]
    return [f"report: {' '.join(last.split())}"]


def next_step(client: SyncPrefectClient, run: FlowRun) -> list[str]:
    """Return what goes on from a suspended or lost run, if it is one: a command, or a new run."""
    from tasks.lost_runs import NEVER_STARTED, RESTARTED, successor

    name = run.state.name if run.state else ""
    if name == "Suspended":
        # Other runs may have its name, and a shell reads names with blanks otherwise.
        command = f"rlhf approve {str(run.id)[:8]}"
        return [f"waits for you: {command}, or {command} --refuse"]
    if name in ("Crashed", NEVER_STARTED):
        following = successor(client, run) if RESTARTED in run.tags else None
        if following is not None:
            return [f"was lost, and started again: rlhf status {str(following.id)[:8]}"]
        return [f"goes on from what is done: prefect flow-run retry {run.id}"]
    return []


def _progress_of(progress: Artifact | None, run: FlowRun | TaskRun) -> str:
    """Return the percentage of a progress artifact, with the ETA of a running `run`.

    A stage that does not tell its ETA is taken to go on at its mean speed so far.
    """
    if progress is None:
        return ""
    percent = float(cast("float", progress.data))
    text = f"{percent:.0f} %"
    is_running = run.state is not None and run.state.is_running()
    if not (is_running and run.start_time and progress.updated and percent > 0):
        return text
    elapsed = (progress.updated - run.start_time).total_seconds()
    since_update = (datetime.now(UTC) - progress.updated).total_seconds()
    told = seconds_left(progress)  # by the stage itself, which knows at which step it began
    left = elapsed * (100 - percent) / percent if told is None else told
    return f"{text}, ETA {duration(max(left - since_update, 0))}"


def seconds_left(progress: Artifact) -> float | None:
    """Return the seconds left that a stage told with its progress, or None."""
    found = re.search(r", (\d{1,9}) s left", progress.description or "")
    return float(found[1]) if found else None


def _state_text(state: State[Any] | None) -> Text:
    """Return a state's name, coloured by name or else by type."""
    if state is None:
        return styled(("Unknown", "dim"))
    return _state_name(state.name or state.type.value, state.type.value)


def _state_name(name: str, type_of_state: str = "") -> Text:
    """Return the name of a state of Prefect's or of this machine's records, coloured."""
    style = style_of(name) or _TYPE_STYLES.get(type_of_state or name.upper(), "dim")
    return styled((one_line(name), style))


def _message_of(state: State[Any] | None) -> str:
    """Return a state's message as one line."""
    return one_line(state.message or "") if state else ""


def _seconds_of(run: FlowRun | TaskRun) -> float | None:
    """Return a run's time so far; None before its start."""
    if run.start_time is None:
        return None
    spent = run.estimated_run_time or run.total_run_time or timedelta()
    return spent.total_seconds()


def duration(seconds: float | None) -> str:
    """Format seconds: `3.2 s`, `3 min 05 s`, `2 h 14 min`; empty for None."""
    from rlhf.report.text import minutes

    if seconds is None:
        return ""
    return f"{seconds:.1f} s" if seconds < 60 else minutes(int(seconds))


def _local_time(moment: datetime | None) -> str:
    """Format a time in the local time zone; empty for None."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M") if moment else ""
