"""A person's decision in a run of a deployment, on Prefect's own server in this process."""

from __future__ import annotations

import asyncio
import contextlib
import copy
import json

import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from jsonschema import Draft202012Validator
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.exceptions import Pause
from prefect.flow_engine import run_flow
from prefect.states import Cancelled, Crashed, Pending, Scheduled

from flows import champions as command
from flows.pipeline import pipeline
from rlhf.champions import LONGEST, approval_of, record_approval
from rlhf.errors import StoreError
from rlhf.store import ArtifactRef, Store, open_store
from tasks import promotion
from tasks.approvals import Decision, ask
from tasks.lost_runs import NEVER_STARTED, RESTART_OF
from tests.examples import examples

pytestmark = pytest.mark.prefect
POLICY = ArtifactRef(kind="policy", digest="a" * 64, size=1, uri="file:///nowhere")
GOOD = {"decision": "approve", "by": "ann", "why": "reads well"}


@flow(name="asking", persist_result=False)
def asking(tree: dict) -> str:
    """What the pipeline does before the promotion, of a policy that was never trained."""
    from rlhf.config import PipelineConfig

    config = PipelineConfig.model_validate(tree)
    if promotion.is_waiting(config, POLICY, "run"):
        ask(POLICY.digest, "the summary")
        return "not asked"
    return "decided"


class Run:
    """A flow run of a deployment, which this process takes up as a worker does."""

    def __init__(self, which, parameters) -> None:
        self.flow, self.parameters = which, parameters
        with get_client(sync_client=True) as client:
            flow_id = client.create_flow_from_name(which.name)
            deployment = asyncio.run(_deployment(flow_id, which.name))
            self.id = client.create_flow_run_from_deployment(deployment).id

    def replaced(self, *states):
        """The run that takes the place of this one, which is lost."""
        for state in states or (Crashed(),):
            self.set(state)
        made = copy.copy(self)
        with get_client(sync_client=True) as client:
            lost = client.read_flow_run(self.id)
            tags = [f"{RESTART_OF}{self.id}"]
            made.id = client.create_flow_run_from_deployment(lost.deployment_id, tags=tags).id
        return made

    def take_up(self):
        """Run it until it ends or is suspended, and return its state."""
        with get_client(sync_client=True) as client:
            flow_run = client.read_flow_run(self.id)
        with contextlib.suppress(Pause):
            run_flow(self.flow, flow_run=flow_run, parameters=self.parameters, return_type="state")
        return self.state

    @property
    def state(self):
        with get_client(sync_client=True) as client:
            return client.read_flow_run(self.id).state

    def answer(self, **run_input):
        with get_client(sync_client=True) as client:
            return client.resume_flow_run(self.id, run_input=run_input)

    def set(self, state):
        with get_client(sync_client=True) as client:
            client.set_flow_run_state(self.id, state, force=True)


async def _deployment(flow_id, name):
    async with get_client() as client:
        return await client.create_deployment(flow_id, name)


@pytest.fixture
def run(tmp_path):
    tree = {
        "store": str(tmp_path / "store"), "promotion": {"name": "line", "approval": "manual"},
        "runtime": {"work_dir": str(tmp_path / "work")},
    }  # fmt: skip
    made = Run(asking, {"tree": tree})
    made.store = open_store(tree["store"], cache_dir=tmp_path / "cache")
    return made


def recorded(run):
    return run.store.history.entries(f"approvals/line/{POLICY.digest}")


def test_an_answer_is_recorded_once_as_claimed(run):
    assert run.take_up().name == "Suspended"
    assert run.answer(**GOOD).status.value == "ACCEPT"
    assert run.take_up().name == "Completed"
    (entry,) = recorded(run)
    assert (entry["by"], entry["why"], entry["identity"]) == ("ann", "reads well", "claimed")
    run.set(Scheduled())  # the machine was lost after that: nobody is asked, nothing is repeated
    assert run.take_up().name == "Completed"
    assert recorded(run) == [entry]


def test_the_last_decision_holds_wherever_it_was_made(run):
    """Approved in the store while the run waited, and then refused in its form."""
    run.take_up()
    record_approval(run.store, "line", POLICY.digest, approved=True, by="bob")
    run.answer(decision="refuse", by="ann", why="no")
    run.take_up()
    assert not approval_of(run.store, "line", POLICY.digest).approved


def test_after_a_cancellation_a_person_is_asked_again(run):
    run.take_up()
    run.set(Cancelled())
    run.set(Scheduled())
    assert run.take_up().name == "Suspended"
    run.answer(**GOOD)
    run.set(Cancelled())  # after the answer, before a worker took the run up
    run.set(Scheduled())
    assert run.take_up().name == "Suspended"
    assert recorded(run) == []
    run.answer(**{**GOOD, "why": "third"})
    assert run.take_up().name == "Completed"
    assert [entry["why"] for entry in recorded(run)] == ["third"]


def test_an_answer_that_no_one_recorded_outlives_a_crash(run, monkeypatch):
    run.take_up()
    run.answer(**GOOD)
    monkeypatch.setattr(promotion, "record_approval", _broken)
    assert run.take_up().type.value == "FAILED"
    monkeypatch.undo()
    run.set(Scheduled())
    assert run.take_up().name == "Completed"
    assert len(recorded(run)) == 1


def test_an_answer_goes_to_the_run_that_takes_a_lost_ones_place(run, monkeypatch):
    """Through two losses; and not if the lost run was cancelled after the question."""
    run.take_up()
    run.answer(**GOOD)
    # Resumed, it is accepted by a worker that dies before the process starts.
    second = run.replaced(Pending(), Cancelled(name=NEVER_STARTED))
    third = second.replaced()
    assert third.take_up().name == "Completed"
    (entry,) = recorded(run)
    assert entry["by"] == "ann"
    assert entry["request"].startswith(str(run.id))
    other = Run(asking, {"tree": {**run.parameters["tree"], "store": f"{run.store.uri}-2"}})
    other.take_up()
    other.answer(**GOOD)
    other.set(Cancelled())
    assert other.replaced().take_up().name == "Suspended"


def _broken(*_, **__):
    raise StoreError("the store is away")


def test_an_answer_that_can_t_be_recorded_is_asked_for_again(run):
    """As a form of an earlier version took it, or somebody wrote it past the form."""
    run.take_up()
    for number, answer in enumerate(({**GOOD, "why": "x" * 2001}, {**GOOD, "by": "\u200b"}, {}), 1):
        run.answer(**GOOD)
        key = f"suspended-approve-{POLICY.digest[:12]}-{number}-response"
        with get_client(sync_client=True) as client:
            client.delete_flow_run_input(flow_run_id=run.id, key=key)
            client.create_flow_run_input(flow_run_id=run.id, key=key, value=json.dumps(answer))
        assert run.take_up().name == "Suspended"
        keys = run.state.state_details.run_input_keyset
        with get_client(sync_client=True) as client:
            assert "Asked again: " in client.read_flow_run_input(run.id, keys["description"])
    run.answer(**GOOD)
    assert run.take_up().name == "Completed"


def test_the_form_refuses_what_the_record_would(run):
    run.take_up()
    for bad in ({"why": "x" * 2001}, {"by": "x" * 2001}, {"by": ""}, {"by": " \n"}):
        assert run.answer(**{**GOOD, **bad}).status.value == "REJECT", bad
    assert run.state.name == "Suspended"


def test_the_command_refuses_before_the_run_goes_on(run, rlhf, prefect_api, monkeypatch):
    run.take_up()
    monkeypatch.setattr(command, "_suspended", lambda *_: _read(run))
    for option, value in (("--why", "x" * 2001), ("--by", "y" * 2001), ("--by", " ")):
        done = rlhf("approve", run.id, option, value)
        assert (done.returncode, option in done.stderr) == (2, True), done.stderr
        assert run.state.name == "Suspended"
    done = rlhf("approve", run.id, "--by", "ann", "--why", "x" * 2000 + "\n")
    assert done.returncode == 0, done.stderr
    assert run.take_up().name == "Completed"


def _read(run):
    with get_client(sync_client=True) as client:
        return client.read_flow_run(run.id)


@settings(
    max_examples=examples(200),
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
@given(st.text(max_size=40), st.text(max_size=40))
@example("ann", "x" * LONGEST)
@example("x" * LONGEST, "\ud800\0\x1b[31m")
@example("a\u200b", "\n" * LONGEST)
def test_what_the_form_takes_can_be_recorded(by, why):
    answer = {"decision": "approve", "by": by, "why": why}
    schema = Decision.with_initial_data(description="x").model_json_schema()
    if not Draft202012Validator(schema).is_valid(answer):
        return
    try:
        decision = Decision.model_validate(answer)
    except ValueError:
        return  # asked again
    record_approval(
        _Nowhere(), "line", POLICY.digest, approved=True, by=decision.by, why=decision.why
    )


@pytest.mark.parametrize(
    "by", ["\u200b", " \ufeff\u200d", "\u202e\u2066", "\x00", "\u3164", "\xad"]
)
def test_a_name_that_is_not_seen_is_refused_before_the_run_goes_on(by):
    schema = Draft202012Validator(Decision.model_json_schema())
    assert not schema.is_valid({"decision": "approve", "by": by})
    with pytest.raises(ValueError, match="by"):
        Decision(decision="approve", by=by)
    for name in ("ann", "\u674e", "Jos\xe9", "\u03a9 (team 7)", f"{by}x"):
        assert schema.is_valid({"decision": "approve", "by": name})
        assert Decision(decision="approve", by=name).by == name


class _Nowhere(Store):
    """A store that takes what JSON and UTF-8 take."""

    def __init__(self):
        pass

    @property
    def history(self):
        return self

    def append(self, _, payload):
        json.dumps(payload, ensure_ascii=False).encode()


def test_a_store_that_is_away_while_the_decision_is_recorded(tiny, finished, monkeypatch):
    """Tried again; if that does not help, the report says what happened, and a retry goes on."""
    config = tiny(promotion={"name": "line", "approval": "manual"})
    made = Run(pipeline, {"overrides": config, "preset": "none"})
    assert made.take_up().name == "Suspended"
    made.answer(**{**GOOD, "decision": "refuse"})
    calls = []

    def broken(*arguments, **named):
        calls.append(1)
        if len(calls) <= 3:
            raise StoreError("the store is away")
        return record_approval(*arguments, **named)

    monkeypatch.setattr(promotion, "record_approval", broken)
    failed = made.take_up()
    assert (failed.type.value, len(calls)) == ("FAILED", 3)
    reports = (finished.parent / "reports").rglob("tiny-*.html")
    report = max(reports, key=lambda path: path.stat().st_mtime_ns)
    assert "the store is away" in report.read_text()
    assert "Waits for a person" not in report.read_text()
    made.set(Scheduled())
    assert made.take_up().name == "Refused"
