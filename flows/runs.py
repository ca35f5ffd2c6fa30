"""The commands `rlhf runs` and `rlhf status`: runs on Prefect's server."""

from __future__ import annotations

import re
import time
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from json import dumps
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


def runs(*, limit: int = 20, work_dir: Path | None = None, json: bool = False) -> None:
    """List the runs that Prefect's server knows, if one is set, and this machine's, newest first.

    Parameters
    ----------
    limit
        Most runs to list.
    work_dir
        Work folder with the records of this machine's runs; as configured by default.
    json
        Print JSON.
    """
    if not 1 <= limit <= PAGE:
        raise ConfigError(f"--limit {limit}: give a number from 1 to {PAGE}")
    check_settings()
    from prefect.settings import PREFECT_API_URL

    local = read_records(records_folder(work_dir))
    if PREFECT_API_URL.value():
        _list_server_runs(limit, local, json)
    else:
        _list_local_runs(local[:limit], records_folder(work_dir), json)


def records_folder(work_dir: Path | None) -> Path:
    """Return the folder with the records of this machine's runs."""
    configured = apply_machine_settings(PipelineConfig()).runtime.work_dir
    return expand_home(work_dir or configured) / "runs"


def _list_local_runs(records: Sequence[RunRecord], folder: Path, json: bool) -> None:
    if json:
        _print_json([_local_row(record) for record in records])
        return
    if not records:
        say(f"no runs in {folder}; for those of a Prefect server set PREFECT_API_URL")
        return
    console.print(_local_table(records))


def _local_table(records: Sequence[RunRecord]) -> Table:
    table = Table("run", "state", "started", "time", expand=True)
    table.add_column("message", no_wrap=True, overflow="ellipsis", ratio=1)
    for record in records:
        row = _local_row(record)
        table.add_row(
            one_line(record.name), styled((one_line(record.state), style_of(record.state))),
            _local_time(datetime.fromtimestamp(record.started, UTC)), duration(row["seconds"]),
            one_line(row["message"]),
        )  # fmt: skip
    return table


def _local_row(record: RunRecord) -> dict[str, Any]:
    at = next((stage.name for stage in record.stages if stage.state == RUNNING), "")
    end = record.updated if record.is_over else time.time()
    return {
        "name": record.name, "id": None, "state": record.state,
        "started": datetime.fromtimestamp(record.started, UTC).isoformat(),
        "seconds": max(end - record.started, 0.0), "where": record.host,
        "message": record.waits or record.reason or at,
    }  # fmt: skip


def _print_json(rows: Sequence[dict[str, Any]]) -> None:
    console.print(dumps(rows, indent=1, ensure_ascii=True), soft_wrap=True)


def _list_server_runs(limit: int, local: Sequence[RunRecord], json: bool) -> None:
    from prefect.client.schemas.sorting import FlowRunSort

    with prefect_server("rlhf runs") as client:
        from prefect.client.schemas.sorting import FlowRunSort

        started = _runs(client, sort=FlowRunSort.START_TIME_DESC, limit=limit)
        scheduled = _runs(client, future=True, sort=FlowRunSort.EXPECTED_START_TIME_ASC, limit=1)
        deployments = _deployments(client, started)
    known = {run.name for run in started}
    local = [record for record in local if record.name not in known][:limit]
    if json:
        rows = [
            {
                "name": run.name, "id": str(run.id), "state": run.state and run.state.name,
                "started": run.start_time and run.start_time.isoformat(),
                "seconds": _seconds_of(run), "message": _message_of(run.state),
                "where": deployments.get(run.deployment_id, "local"),
            }
            for run in started
        ]  # fmt: skip
        _print_json([*rows, *map(_local_row, local)])
        return
    table = Table("run", "id", "state", "started", "time", "where", expand=True)
    # The message gets the width that the other columns leave.
    table.add_column("message", no_wrap=True, overflow="ellipsis", ratio=1)
    for run in started:
        table.add_row(
            one_line(run.name), str(run.id)[:8], _state_text(run.state),
            _local_time(run.start_time), duration(_seconds_of(run)),
            one_line(deployments.get(run.deployment_id, "local")), _message_of(run.state),
        )  # fmt: skip
    if started:
        console.print(table)
    else:
        say(f"no runs on {client.api_url}")
    if local:
        say("runs of this machine that this server does not know:")
        console.print(_local_table(local))
    for run in scheduled:
        say(f"next: {run.name} {str(run.id)[:8]} at {_local_time(run.expected_start_time)}")


def status(run: str, *, watch: bool = False) -> None:
    """Show a run's stages: their state, progress and key metric, and where they ran.

    Parameters
    ----------
    run
        Its name, its id, or the beginning of one of them.
    watch
        Show it anew every 2 s until the run has ended.
    """
    with prefect_server(run) as client:
        shown = find_run(client, run)
        if not watch:
            console.print(_status(client, shown), soft_wrap=not console.is_terminal)
            return
        with Live(_status(client, shown), console=console, auto_refresh=False) as live:
            while shown.state is None or not (shown.state.is_final() or shown.state.is_paused()):
                time.sleep(WATCH_EVERY)
                shown = client.read_flow_run(shown.id)
                live.update(_status(client, shown), refresh=True)


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


def _status(client: SyncPrefectClient, run: FlowRun) -> Group:
    """Return the whole display of `rlhf status`, read anew from the server."""
    tasks, children, artifacts = read_run(client, run)
    deployments = _deployments(client, [run, *children])
    parts: list[Any] = [
        styled(
            (one_line(run.name), "bold"),
            f" {run.id}  ",
            _state_text(run.state),
            f"  {_message_of(run.state)}",
        ),
        one_line(
            f"started {_local_time(run.start_time)}, {duration(_seconds_of(run))}, "
            f"{deployments.get(run.deployment_id, 'local')}"
        ),
        _stages(tasks, children, artifacts, deployments),
        *map(one_line, _report(artifacts)),
        *(styled((one_line(line), "bold")) for line in next_step(client, run)),
    ]
    return Group(*parts)


def _stages(
    tasks: Sequence[TaskRun], children: Sequence[FlowRun], artifacts: Sequence[Artifact],
    deployments: dict[UUID | None, str],
) -> Table:  # fmt: skip
    from tasks.stages import STAGES

    table = Table("stage", "state", "time", "progress", "key metric", "where")
    for stage in STAGES:
        last, child, progress = stage_run(stage, tasks, children, artifacts)
        if last is None:
            table.add_row(stage, styled(("not run", "dim")), "", "", "", "")
            continue
        worker = child or last
        message = _message_of(last.state) or (_message_of(child.state) if child else "")
        table.add_row(
            stage, _state_text(last.state), duration(_seconds_of(last)),
            _progress_of(progress, worker), message, _location(child, deployments),
        )  # fmt: skip
    return table


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


def _location(child: FlowRun | None, deployments: dict[UUID | None, str]) -> Text:
    """Return the deployment, name and state of a stage's child run, or `inline`."""
    if child is None:
        return styled("inline")
    deployment = deployments.get(child.deployment_id, "local")
    name = one_line(f"{deployment}: {child.name} {str(child.id)[:8]}")
    return styled(f"{name} ", _state_text(child.state))


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
    from rlhf.report import STATES

    if state is None:
        return styled(("Unknown", "dim"))
    name = state.name or state.type.value
    styles = _TYPE_STYLES | {word.value: look.style for word, look in STATES.items()}
    return styled((one_line(name), styles.get(name) or styles.get(state.type.value, "dim")))


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
