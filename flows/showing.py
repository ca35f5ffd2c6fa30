"""State, times and progress of a Prefect run as text, for `rlhf runs` and `rlhf status`."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

from rich.text import Text

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Artifact, FlowRun, State, TaskRun

#: Colours of Prefect's types of states.
TYPE_STYLES = {
    "COMPLETED": "green", "RUNNING": "blue", "FAILED": "red", "CRASHED": "bold red",
    "PAUSED": "yellow",
}  # fmt: skip


def state_text(state: State[Any] | None) -> Text:
    """Return a state's name, coloured by name or else by type."""
    from rlhf.report import STATES

    if state is None:
        return Text("Unknown", "dim")
    name = state.name or state.type.value
    styles = TYPE_STYLES | {word.value: look.style for word, look in STATES.items()}
    return Text(name, styles.get(name) or styles.get(state.type.value, "dim"))


def message_of(state: State[Any] | None) -> str:
    """Return a state's message as one line."""
    return " ".join((state.message or "").split()) if state else ""


def seconds_of(run: FlowRun | TaskRun) -> float | None:
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


def local_time(moment: datetime | None) -> str:
    """Format a time in the local time zone; empty for None."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M") if moment else ""


def progress_of(progress: Artifact | None, run: FlowRun | TaskRun) -> str:
    """Return the percentage of a progress artifact, with the ETA of a running `run`.

    The ETA extrapolates the mean speed since the run's start.
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
    left = max(elapsed * (100 - percent) / percent - since_update, 0)
    return f"{text}, ETA {duration(left)}"


def next_step(run: FlowRun) -> list[str]:
    """Return the command that continues a suspended or crashed run, if it is one."""
    name = run.state.name if run.state else ""
    if name == "Suspended":
        return [f"waits for you: rlhf approve {run.name}, or rlhf approve {run.name} --refuse"]
    if name == "Crashed":
        return [f"goes on from what is done: prefect flow-run retry {run.id}"]
    return []
