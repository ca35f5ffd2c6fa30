"""How a run's state, times and progress read in a line."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, cast

from rich.text import Text

if TYPE_CHECKING:
    from prefect.client.schemas.objects import Artifact, FlowRun, State, TaskRun

#: Styles of states: by name, and of those that are not here by type.
STYLES = {
    "Cached": "cyan", "GateRejected": "yellow", "Refused": "yellow", "AwaitingApproval": "yellow",
    "COMPLETED": "green", "RUNNING": "blue", "FAILED": "red", "CRASHED": "bold red",
    "PAUSED": "yellow",
}  # fmt: skip


def state_text(state: State[Any] | None) -> Text:
    """A state's name, coloured."""
    if state is None:
        return Text("Unknown", "dim")
    name = state.name or state.type.value
    return Text(name, STYLES.get(name) or STYLES.get(state.type.value, "dim"))


def message_of(state: State[Any] | None) -> str:
    """A state's message in one line."""
    return " ".join((state.message or "").split()) if state else ""


def seconds_of(run: FlowRun | TaskRun) -> float | None:
    """How long it has run; None before it does."""
    if run.start_time is None:
        return None
    spent = run.estimated_run_time or run.total_run_time or timedelta()
    return spent.total_seconds()


def duration(seconds: float | None) -> str:
    """Seconds as people read them; nothing for None."""
    if seconds is None:
        return ""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{seconds:.1f} s"


def clock(moment: datetime | None) -> str:
    """Local time."""
    return moment.astimezone().strftime("%Y-%m-%d %H:%M") if moment else ""


def progress_of(told: Artifact | None, at_work: FlowRun | TaskRun) -> str:
    """Percent, and while it runs the time that is left if it goes on as fast."""
    if told is None:
        return ""
    percent = float(cast("float", told.data))
    text = f"{percent:.0f} %"
    running = at_work.state is not None and at_work.state.is_running()
    if not (running and at_work.start_time and told.updated and percent > 0):
        return text
    took = (told.updated - at_work.start_time).total_seconds()
    since = (datetime.now(UTC) - told.updated).total_seconds()
    left = max(took * (100 - percent) / percent - since, 0)
    return f"{text}, ETA {duration(left)}"


def next_step(run: FlowRun) -> list[str]:
    """What a person has to do."""
    name = run.state.name if run.state else ""
    if name == "Suspended":
        return [f"waits for you: rlhf approve {run.name}, or rlhf approve {run.name} --refuse"]
    if name == "Crashed":
        return [f"goes on from what is done: prefect flow-run retry {run.id}"]
    return []
