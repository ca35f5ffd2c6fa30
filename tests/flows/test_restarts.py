"""Lost runs of the pipeline are started again once, and no others; on Prefect's own server."""

from __future__ import annotations

import asyncio
import time
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowRunFilter,
    FlowRunFilterTags,
    LogFilter,
    LogFilterFlowRunId,
)
from prefect.states import (
    Cancelled,
    Cancelling,
    Completed,
    Crashed,
    Failed,
    Paused,
    Pending,
    Running,
    Scheduled,
    Suspended,
)

from flows.pipeline import pipeline
from flows.restarts import restarts
from flows.stages import STAGE_FLOWS
from rlhf.config.pipeline import RetryConfig
from tasks.lost_runs import NEVER_STARTED, RESTART_OF, RESTARTED, Limits, give_up
from tasks.restarts import (
    NOT_RESTARTED,
    cancel_overdue,
    restart_delay,
    restart_lost_runs,
    restarts_before,
)
from tests.flows.test_asking import Run

pytestmark = pytest.mark.prefect
UNSTARTED = Cancelled(name=NEVER_STARTED)


async def _deploy(flow_name):
    async with get_client() as client:
        flow_id = await client.create_flow_from_name(flow_name)
        return await client.create_deployment(flow_id, f"lost-{uuid4().hex[:8]}", tags=["rlhf"])


@pytest.fixture(scope="module")
def client(prefect_api):
    with get_client(sync_client=True) as client:
        yield client


@pytest.fixture(scope="module")
def made(client):
    """A deployment of the pipeline."""
    return asyncio.run(_deploy("rlhf-pipeline"))


def submitted(client, deployment, *states, **options):
    """A run that went through these states."""
    run = client.create_flow_run_from_deployment(
        deployment, parameters={"preset": "quickstart"}, **options
    )
    for state in states:
        client.set_flow_run_state(run.id, state.model_copy(update={"id": uuid4()}), force=True)
    return client.read_flow_run(run.id)


def restart(client, limit=3, pending_seconds=900.0, **options):
    return restart_lost_runs(client, limit=limit, pending_seconds=pending_seconds, **options)


def successors(client, run):
    tags = FlowRunFilterTags(all_=[f"{RESTART_OF}{run.id}"])
    return client.read_flow_runs(flow_run_filter=FlowRunFilter(tags=tags))


def logs(client, run):
    lines = client.read_logs(LogFilter(flow_run_id=LogFilterFlowRunId(any_=[run.id])))
    return " ".join(line.message for line in lines)


@pytest.mark.parametrize(
    ("states", "lost"),
    [
        ([Running(), Crashed()], True),
        ([Pending(), Crashed()], True),
        ([Running(), Crashed(), Crashed()], True),  # the worker reports it twice
        ([Pending(), UNSTARTED], True),
        ([Running(), Paused(), Scheduled(name="Resuming"), Running(), Crashed()], True),
        ([Running(), Cancelling(), Cancelled(), Scheduled(), Running(), Crashed()], True),
        ([Running(), Cancelling(), Crashed()], False),
        ([Running(), Cancelling(), Crashed(), Cancelled()], False),
        ([Running(), Crashed(), Cancelled()], False),
        ([Pending(), UNSTARTED, Cancelled()], False),
        ([Cancelled()], False),
        ([Running(), Suspended()], False),
        ([Running(), Paused()], False),
        ([Running(), Failed()], False),
        ([Running(), Failed(name="Refused")], False),
        ([Running(), Completed(name="AwaitingApproval")], False),
        ([Running(), Completed()], False),
        ([Running()], False),
        ([Pending()], False),
        ([Running(), Crashed(), Scheduled(name="AwaitingRetry")], False),  # by hand
        ([Running(), Crashed(), Scheduled(), Pending(), Running()], False),
    ],
    ids=lambda value: "-".join(s.name for s in value) if isinstance(value, list) else None,
)  # fmt: skip
def test_lost_runs_and_no_others_are_started_again(client, made, states, lost):
    run = submitted(client, made, *states, tags=["mine", "auto-scheduled"])
    restart(client)
    restart(client)
    found = successors(client, run)
    assert len(found) == lost
    for successor in found:
        assert successor.deployment_id == made
        assert successor.parameters == run.parameters
        assert {"mine", "rlhf"} < {*successor.tags}
        assert "auto-scheduled" not in successor.tags
        assert successor.state.is_scheduled()
        assert f"started again as {successor.name}" in logs(client, run)
    assert (RESTARTED in client.read_flow_run(run.id).tags) == lost


def test_any_number_of_supervisors_at_once_start_it_once(client, made):
    run = submitted(client, made, Running(), Crashed())

    def supervise(_):
        with get_client(sync_client=True) as own:
            return restart(own)

    with ThreadPoolExecutor(6) as pool:
        list(pool.map(supervise, range(6)))
    # The last one died before it could note what it did.
    client.update_flow_run(run.id, tags=["rlhf"])
    restart(client)
    assert len(successors(client, run)) == 1


def test_the_status_of_a_lost_run_names_its_successor(client, made, rlhf):
    run = submitted(client, made, Running(), Crashed())
    restart(client)
    (following,) = successors(client, run)
    said = rlhf("status", run.id).stdout
    assert f"started again: rlhf status {str(following.id)[:8]}" in " ".join(said.split())
    assert "retry" not in said


def test_a_retry_by_hand_of_a_run_that_was_started_again_is_not_restarted(client, made):
    run = submitted(client, made, Running(), Crashed())
    restart(client)
    for state in (Scheduled(), Pending(), Running(), Crashed()):
        client.set_flow_run_state(run.id, state, force=True)
    restart(client)
    assert len(successors(client, run)) == 1


def test_a_run_that_always_crashes_is_given_up_and_says_so(client, made):
    first = run = submitted(client, made, Running(), Crashed())
    for number in range(1, 4):
        restart(client)
        (run,) = successors(client, run)
        assert restarts_before(run) == number
        client.set_flow_run_state(run.id, Crashed(), force=True)
    (line,) = [line for line in restart(client) if str(run.id) in line]
    assert "after 3 restarts, which is the limit" in line
    assert "submit it anew" in logs(client, run)
    assert NOT_RESTARTED in client.read_flow_run(run.id).tags
    assert not [line for line in restart(client, limit=9) if run.name in line]
    assert successors(client, run) == []
    assert len(successors(client, first)) == 1


def test_the_wait_before_a_restart_grows_to_ten_minutes():
    assert [restart_delay(n).total_seconds() for n in (0, 1, 2, 6, 7, 50)] == [
        5, 10, 20, 320, 600, 600,
    ]  # fmt: skip


def test_runs_of_the_command_and_of_stages_are_left_alone(client, prefect_api):
    stage = asyncio.run(_deploy("train-sft"))
    child = submitted(client, stage, Running(), Crashed())
    local = client.create_flow_run(pipeline, state=Running())
    client.set_flow_run_state(local.id, Crashed(), force=True)
    lines = restart(client)
    assert not [line for line in lines if str(child.id) in line or str(local.id) in line]


def test_old_losses_are_left_alone(client, made):
    run = submitted(client, made, Running(), Crashed())
    restart(client, since=datetime.now(UTC) + timedelta(minutes=1))
    assert successors(client, run) == []


def test_one_run_that_is_refused_does_not_keep_the_others(client, made):
    gone = asyncio.run(_deploy("retraining"))
    orphan = submitted(client, gone, Running(), Crashed())
    client.request("DELETE", "/deployments/{id}", path_params={"id": gone})
    run = submitted(client, made, Running(), Crashed())
    restart(client)
    restart(client)
    assert len(successors(client, run)) == 1
    assert successors(client, orphan) == []


def test_a_pipeline_that_is_pending_for_too_long_is_replaced(client, made):
    stuck = submitted(client, made, Pending())
    cancelled = submitted(client, made, Running(), Cancelling())
    patient = submitted(client, made, Pending(), tags=["restart:40"])
    last = submitted(client, made, Pending(), tags=["restart:50"])
    restart(client, pending_seconds=3600)
    assert client.read_flow_run(stuck.id).state.is_pending()
    assert client.read_flow_run(cancelled.id).state.is_cancelling()
    time.sleep(3)  # the server tells its time in whole seconds, and a busy one late
    restart(client, limit=0, pending_seconds=1e-3)  # it starts none again
    assert client.read_flow_run(stuck.id).state.is_pending()
    restart(client, limit=50, pending_seconds=1e-3)
    ended = client.read_flow_run(stuck.id).state
    assert (ended.name, ended.type.value) == (NEVER_STARTED, "CANCELLED")
    assert "Pending for more than 0.001 s: its worker is gone" in ended.message
    assert len(successors(client, stuck)) == 1
    # Each restart has twice the time.
    assert client.read_flow_run(patient.id).state.is_pending()
    # Nothing would take the place of one that has no restart left.
    assert client.read_flow_run(last.id).state.is_pending()
    assert client.read_flow_run(cancelled.id).state.name == "Cancelled"
    assert successors(client, cancelled) == []


def test_a_worker_can_t_take_up_what_was_given_up(client, made):
    run = submitted(client, made, Pending())
    ended = give_up(client, run, "too late")
    assert ended.state.name == NEVER_STARTED
    refused = client.set_flow_run_state(run.id, Pending())
    assert refused.status.value == "ABORT"


def test_what_has_started_meanwhile_is_not_given_up(client, made):
    seen = submitted(client, made, Pending())
    client.set_flow_run_state(seen.id, Running(), force=True)
    assert give_up(client, seen, "too late").state.is_running()


@pytest.mark.parametrize("which", [pipeline, STAGE_FLOWS["train-sft"]], ids=lambda f: f.name)
@pytest.mark.parametrize("lost", [UNSTARTED, Crashed()], ids=lambda state: state.name)
def test_a_process_that_comes_late_does_nothing(client, which, lost, tmp_path):
    """Given up by the supervisor, or reported as crashed by a worker that was wrong."""
    tree = {"store": str(tmp_path / "store"), "data": {"source": str(tmp_path / "absent.jsonl")}}
    parameters = {"preset": "none", "overrides": tree}
    late = Run(which, parameters)
    late.set(Pending())
    late.set(lost)
    assert late.take_up().name == NEVER_STARTED
    assert [*tmp_path.iterdir()] == []


def test_the_flow_tells_what_it_did(client, made):
    run = submitted(client, made, Running(), Crashed())
    assert "lost runs" in restarts(return_state=True).message
    assert len(successors(client, run)) == 1
    assert restarts(return_state=True).message == "No run was lost."


def test_what_was_due_while_no_worker_was_there_runs_once(client):
    own = asyncio.run(_deploy("restart-lost-runs"))
    now = datetime.now(UTC)
    times = [now + timedelta(minutes=10 * n) for n in range(-3, 3) if n]
    runs = [
        client.create_flow_run_from_deployment(own, state=Scheduled(scheduled_time=time))
        for time in times
    ]
    other = submitted(client, asyncio.run(_deploy("rlhf-pipeline")))
    cancel_overdue(client, own)
    states = [client.read_flow_run(run.id).state.name for run in runs]
    assert states == ["Cancelled"] * 3 + ["Scheduled"] * 2
    assert client.read_flow_run(other.id).state.is_scheduled()


def test_limits_of_states():
    limits = Limits(scheduled=50, pending=150, cancelling=None)
    states = (Scheduled(), Pending(), Running(), Cancelling(), Paused(), Completed())
    assert [limits.exceeded(state, 50) for state in states] == [None] * len(states)
    said = [limits.exceeded(state, 1e9) for state in states]
    assert said[0].startswith("Scheduled for more than 50 s: no worker")
    assert said[1].startswith("Pending for more than 150 s: its worker is gone")
    assert said[2:] == [None] * (len(states) - 2)
    retries = RetryConfig(pending_seconds=10)
    assert [Limits.of(retries, n).pending for n in (0, 1, 3)] == [10, 20, 80]


def test_the_servers_clock_counts(client, made, monkeypatch):
    run = submitted(client, made, Pending())

    class Fast(datetime):
        @classmethod
        def now(cls, tz=None):
            return datetime.now(tz) + timedelta(days=3)

    monkeypatch.setattr("tasks.restarts.datetime", Fast)
    restart(client, pending_seconds=3600)
    assert client.read_flow_run(run.id).state.is_pending()
