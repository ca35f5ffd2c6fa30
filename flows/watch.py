"""The command `rlhf watch`: a run as it goes on, from another terminal or another machine."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING

from rich.live import Live

from flows.runs import find_run, next_step, read_run, records_folder, seconds_left, stage_run
from rlhf.report.model import GREEN, RunOutcome, StageState
from tasks.console import console, say
from tasks.prefect_server import prefect_server
from tasks.run_record import (
    RUNNING,
    RunRecord,
    StageProgressRecord,
    find_record,
    no_such_run,
    read_records,
)
from tasks.screen import length, picture, progress_text

if TYPE_CHECKING:
    from prefect.client.orchestration import SyncPrefectClient
    from prefect.client.schemas.objects import FlowRun

#: Seconds between two looks.
EVERY = 2.0
#: Seconds between two lines of progress of a stage.
LINE_EVERY = 30.0
#: States that end with exit code 0.
_GOOD = {*(outcome.value for outcome in GREEN), "Completed", "Cached", "Suspended"}


def watch(
    run: str = "", *, plain: bool = False, once: bool = False, json: bool = False,
    work_dir: Path | None = None,
) -> int:  # fmt: skip
    """Watch a run until it ends: 0 ended well, 3 a gate rejected, 2 wrong input, 1 failed.

    Parameters
    ----------
    run
        Its name, or how it begins; of a run on Prefect's server its id too. Default: this machine's
        newest run.
    plain
        Print a line per event, as in pipes and logs, instead of the live display.
    once
        Show it as it is now, and end.
    json
        Print its state as JSON, and end.
    work_dir
        Work folder with the records of this machine's runs; as configured by default.
    """
    with _reader(run, records_folder(work_dir)) as read:
        record = read()
        if json:
            console.print(record.model_dump_json(indent=1), soft_wrap=True)
        elif once:
            console.print(picture(record, console.width, 1000))
        elif console.is_terminal and not plain:
            record = _show_live(read, record)
        else:
            record = _print_lines(read, record)
    if (once or json) and not record.is_over:
        return 0
    if not (once or json):
        say(f"{record.name}: {record.state}{'  ' if record.reason else ''}{record.reason}")
    return exit_code(record)


def exit_code(record: RunRecord) -> int:
    """Return the exit code of a run's command, or what it would be."""
    if record.code is not None:
        return record.code
    if record.state in _GOOD:
        return 0
    return 3 if record.state == RunOutcome.GATE_REJECTED else 1


@contextmanager
def _reader(text: str, folder: Path) -> Iterator[Callable[[], RunRecord]]:
    """Give a function that reads the run anew: from this machine's record, else from the server.

    Raises:
        ArtifactMissing: No run is called that.
        ConfigError: Several are, or the server does not answer.
    """
    from prefect.settings import PREFECT_API_URL

    records = read_records(folder)
    found = find_record(records, text) if text else next(iter(records), None)
    if found is not None:
        name, last = found.name, found

        def again() -> RunRecord:
            nonlocal last
            last = find_record(read_records(folder), name) or last
            return last

        yield again
        return
    if not (text and PREFECT_API_URL.value()):
        raise no_such_run(records, text, folder)
    with prefect_server(text) as client:
        flow_run = find_run(client, text)
        yield lambda: server_record(client, client.read_flow_run(flow_run.id))


def server_record(client: SyncPrefectClient, run: FlowRun) -> RunRecord:
    """Return the record of a run on Prefect's server; it has no sparklines and no sample."""
    from tasks.stages import STAGES

    tasks, children, artifacts = read_run(client, run)
    stages, waits, updated = [], "", time.time()
    for name in STAGES:
        last, child, progress = stage_run(name, tasks, children, artifacts)
        stage = StageProgressRecord(name=name)
        stages.append(stage)
        if last is None or last.state is None:
            continue
        stage.state = last.state.name or ""
        stage.text = last.state.message or ""
        if last.state.is_final():
            stage.seconds = last.total_run_time.total_seconds()
            continue
        stage.state = RUNNING if last.state.is_running() else stage.state
        stage.began = _epoch(last.start_time)
        if child is not None and child.state is not None and not child.state.is_running():
            waits = f"{child.name} is {child.state.name}"
            if child.work_pool_name:
                waits += f" on pool {child.work_pool_name}"
        elif not last.state.is_running():
            waits = f"{name} is {last.state.name}"
        if progress is not None and progress.updated is not None:
            about = progress.description or ""
            steps = about.partition(" ")[2].partition(",")[0].partition(" ")[0].split("/")
            if len(steps) == 2 and all(part.isdecimal() for part in steps):
                stage.step, stage.total = map(int, steps)
            stage.text = about.partition("  ")[2]
            left = seconds_left(progress)
            if left is not None:
                stage.left = max(left - (updated - progress.updated.timestamp()), 0.0)
    state = run.state
    name = (state.name if state else "") or "Unknown"
    is_over = state is not None and (state.is_final() or state.is_paused())
    reason = (state.message or "") if state and is_over else ""
    return RunRecord(
        name=run.name, started=_epoch(run.start_time) or updated, updated=updated,
        state=_outcome(name) if is_over else RUNNING,
        reason="; ".join(filter(None, (reason, *next_step(client, run)))),
        waits=waits or ("" if is_over or name == "Running" else f"the run is {name}"),
        stages=stages,
    )  # fmt: skip


def _outcome(state: str) -> str:
    return RunOutcome.PROMOTED.value if state == StageState.COMPLETED else state


def _epoch(moment: datetime | None) -> float | None:
    return moment.timestamp() if moment else None


def _show_live(read: Callable[[], RunRecord], record: RunRecord) -> RunRecord:
    def shown() -> object:
        return picture(record, console.width, console.height)

    with Live(
        get_renderable=shown, console=console, refresh_per_second=1, vertical_overflow="crop"  # pyright: ignore[reportArgumentType]
    ):  # fmt: skip
        while not record.is_over:
            time.sleep(EVERY)
            record = read()
    return record


def _print_lines(read: Callable[[], RunRecord], record: RunRecord) -> RunRecord:
    """Print what changes: the states of stages, what the run waits for, progress now and then."""
    states: dict[str, str] = {}
    told: dict[str, float] = {}
    waits = ""
    while True:
        now = time.time()
        for stage in record.stages:
            if stage.state == RUNNING:
                if now - told.get(stage.name, 0.0) >= LINE_EVERY:
                    told[stage.name] = now
                    steps = progress_text(stage, now, record.updated) or "Running"
                    say(f"{stage.name}: {steps}  {stage.text}")
            elif states.get(stage.name, "Pending") != stage.state:
                took = f" in {length(stage.seconds)}" if stage.seconds else ""
                say(f"{stage.name}: {stage.state}{took}  {stage.text}")
            states[stage.name] = stage.state
        if record.waits and record.waits != waits:
            say(f"waits: {record.waits}")
        waits = record.waits
        if record.is_over:
            return record
        time.sleep(EVERY)
        record = read()
