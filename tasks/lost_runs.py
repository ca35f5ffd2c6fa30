"""Flow runs whose process was lost, or never came: what is known of them, and their end.

A run that is Pending belongs to a worker that is about to start its process. If that worker dies,
nobody ends the run: no process sends heartbeats that could stay away.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from uuid import UUID

from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import FlowRunFilter, FlowRunFilterTags
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.client.schemas.objects import State as PrefectState
from prefect.runtime import deployment, flow_run
from prefect.states import Cancelled

from rlhf.config.numbers import doubled
from rlhf.config.pipeline import RetryConfig
from tasks.retries import asked_server

log = logging.getLogger("rlhf.tasks")
#: State of a run that was given up before its process started. It is of the type CANCELLED, from
#: which the server lets no worker take a run up.
NEVER_STARTED = "NeverStarted"
#: Prefix of the tag of a run that took the place of a lost one, before that one's id.
RESTART_OF = "restart-of:"
#: Tag of a lost run whose place another has taken.
RESTARTED = "restarted"

State = PrefectState[Any]


@dataclass(frozen=True)
class Limits:
    """Most seconds that a run may be in a state without a process; none has no limit."""

    scheduled: float | None = None
    pending: float | None = None
    cancelling: float | None = None

    @classmethod
    def of(cls, retries: RetryConfig, unstarted: int = 0) -> Limits:
        """Return the configured limits, after so many runs of the same work never started.

        A machine that needs longer than the first limit gets there, as each run has twice the time.
        """
        pending = doubled(retries.pending_seconds, unstarted)
        return cls(retries.scheduled_seconds, pending, retries.cancelling_seconds)

    def exceeded(self, state: State, seconds: float) -> str | None:
        """Return what is wrong with a run that has been in a state so long, else None."""
        limit, cause = {
            StateType.SCHEDULED: (self.scheduled, "no worker of its pool has taken it up"),
            StateType.PENDING: (self.pending, "its worker is gone, or its machine does not start"),
            StateType.CANCELLING: (self.cancelling, "its worker is gone"),
        }.get(state.type, (None, ""))
        if limit is None or seconds <= limit:
            return None
        return f"{state.name} for more than {limit:g} s: {cause}."


def give_up(client: SyncPrefectClient, run: FlowRun, reason: str) -> FlowRun:
    """End a run unless its state has changed meanwhile, and return it as it is then.

    It is NeverStarted, NoWorker if no worker accepted it, or Cancelled if it was to be.
    """
    now = asked_server(lambda: client.read_flow_run(run.id))
    if run.state is None or now.state is None or now.state.id != run.state.id:
        return now
    names = {StateType.SCHEDULED: "NoWorker", StateType.PENDING: NEVER_STARTED}
    ended = Cancelled(name=names.get(run.state.type, "Cancelled"), message=reason)
    asked_server(lambda: client.set_flow_run_state(run.id, ended))
    return asked_server(lambda: client.read_flow_run(run.id))


def given_up() -> State | None:
    """Return the final state of this flow run if it was given up before it started, else None.

    Its process came late: another run does its work. A worker may have reported a crash of a
    machine that starts all the same.
    """
    states = since_scheduled(states_of(str(flow_run.id))) if deployment.id else []
    if not any(s.name == NEVER_STARTED or s.type == StateType.CRASHED for s in states):
        return None
    log.warning("this run was given up before its process started; another run does its work")
    return Cancelled(name=NEVER_STARTED, message="Another run has taken its place.")


def is_cancelled(states: Sequence[State]) -> bool:
    """Return whether a person or a flow has cancelled a run, which may be Crashed all the same."""
    return has_cancellation(since_scheduled(states))


def has_cancellation(states: Sequence[State]) -> bool:
    """Return whether one of these states is a cancellation; one that was given up has none."""
    return any(
        state.type in (StateType.CANCELLING, StateType.CANCELLED) and state.name != NEVER_STARTED
        for state in states
    )


def states_of(run: str) -> list[State]:
    """Return the states that a flow run was in, in order."""
    with get_client(sync_client=True) as client:
        states = asked_server(lambda: client.read_flow_run_states(UUID(run)))
    return sorted(states, key=lambda state: state.timestamp)


def since_scheduled(states: Sequence[State]) -> Sequence[State]:
    """Return the states since the run was last scheduled: it may have been retried."""
    last = max((n for n, s in enumerate(states) if s.type == StateType.SCHEDULED), default=0)
    return states[last:]


def predecessor(tags: Sequence[str]) -> str | None:
    """Return the id of the lost run whose place a run with these tags took, or None."""
    found = (tag.removeprefix(RESTART_OF) for tag in tags if tag.startswith(RESTART_OF))
    return next(found, None)


def successor(client: SyncPrefectClient, run: FlowRun) -> FlowRun | None:
    """Return the run that took a lost run's place, or None."""
    tags = FlowRunFilterTags(all_=[f"{RESTART_OF}{run.id}"])
    return next(iter(client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=tags))), None)
