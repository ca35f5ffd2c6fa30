"""`rlhf runs` and `rlhf status`: output for runs on Prefect's server."""

from __future__ import annotations

import json
import re
import time
from datetime import UTC, datetime, timedelta
from uuid import UUID, uuid4

import pytest
from prefect import flow, task
from prefect.artifacts import create_markdown_artifact, create_progress_artifact
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, WorkPoolCreate
from prefect.runtime import task_run
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Completed, Crashed, Running, Scheduled, Suspended

import flows.runs
from flows.runs import duration, runs, status
from rlhf.errors import ArtifactMissing, ConfigError
from tests.flows.test_command_line import environment, rlhf_process
from tests.servers import PATIENCE

pytestmark = pytest.mark.prefect
REPORT = "**Promoted**\n\nReport: `/r/x.html`, on the machine that ran this, or\n\n    rlhf pull 1a"


@flow(name="rlhf-pipeline")
def empty():
    """A pipeline that only has to be known to the server."""


@pytest.fixture(autouse=True)
def wide(monkeypatch):
    monkeypatch.setattr(flows.runs.console, "_width", 220)


@pytest.fixture
def client():
    with get_client(sync_client=True) as made:
        yield made


@pytest.fixture
def name():
    return f"r{uuid4().hex[:8]}"


def one_run(name, train):
    """A run of the pipeline that ends after its second stage."""

    @task(name="prepare-data", task_run_name="prepare-data")
    def prepare():
        create_progress_artifact(progress=100.0, key="prepare-data-progress")
        return Completed(name="Cached", message="64 pairs")

    @task(name="train-sft", task_run_name="train-sft")
    def second():
        train()
        return Completed(message="loss 5.7")

    @flow(name="rlhf-pipeline", flow_run_name=name)
    def pipeline():
        prepare(return_state=True)
        second(return_state=True)
        create_markdown_artifact(key="report", markdown=REPORT)
        return Completed(message="The policy is the champion of default.")

    pipeline()


def shown(capsys, run, *words):
    """What `rlhf status` prints once the server has heard of these: tasks reach it by events."""
    give_up = time.monotonic() + PATIENCE
    while True:
        status(run)
        said = capsys.readouterr().out
        if all(word in said for word in words) or time.monotonic() > give_up:
            return said
        time.sleep(0.2)


def values(capsys, run):
    """The rows of a run's stages, by their names."""
    status(run, json=True)
    return {row["stage"]: row for row in json.loads(capsys.readouterr().out)["stages"]}


def line_of(said, first):
    """The line of a listing that begins with this cell."""
    return next(line for line in said.splitlines() if line.startswith(f"{first} "))


def listed(capsys, **options):
    runs(**options)
    return capsys.readouterr().out


def put(client, name, state):
    """A run of the pipeline that is in this state."""
    made = client.create_flow_run(empty, name=name, state=Scheduled())
    client.set_flow_run_state(made.id, state, force=True)
    return made


def test_status_of_a_run_here(capsys, name):
    one_run(name, lambda: create_progress_artifact(progress=40.0, key="train-sft-progress"))
    said = shown(capsys, name, "Cached", "loss 5.7", "40 %")
    assert said.startswith(f"{name} ")
    assert "\nThe policy is the champion of default.\n" in said
    assert re.fullmatch(
        r"prepare-data +Cached +\S+ s +100 % +64 pairs", line_of(said, "prepare-data").strip()
    )
    assert line_of(said, "train-sft").split()[-4:] == ["40", "%", "loss", "5.7"]
    assert line_of(said, "promote").split()[1:] == ["not", "run"]
    status(name, wide=True)
    assert "100 %     inline  64 pairs" in capsys.readouterr().out
    assert "report: `/r/x.html`, on the machine that ran this, or rlhf pull 1a" in said
    assert shown(capsys, name[:7]) == shown(capsys, name)


def test_status_of_a_stage_that_ran_elsewhere(capsys, client, name):
    client.create_work_pool(WorkPoolCreate(name=name, type="process"))
    flow_id = client.create_flow_from_name("train-sft")
    there = client.create_deployment(flow_id, "gpu", work_pool_name=name)
    made = []

    def train():
        parent = UUID(task_run.id)
        give_up = time.monotonic() + PATIENCE
        while not made and time.monotonic() < give_up:
            try:
                client.read_task_run(parent)
            except Exception:  # the server hears of it by events
                time.sleep(0.2)
                continue
            child = client.create_flow_run_from_deployment(
                there, name=f"{name}-child", parent_task_run_id=parent
            )
            client.set_flow_run_state(child.id, Running(), force=True)
            client.create_artifact(
                ArtifactCreate(
                    key="train-sft-progress", type="progress", data=50.0, flow_run_id=child.id
                )
            )
            made.append(child)

    one_run(name, train)
    shown(capsys, name, "loss 5.7", "ETA")
    row = values(capsys, name)["train-sft"]
    assert row["progress"].startswith("50 %, ETA ")
    assert row["message"] == "loss 5.7"
    assert row["where"] == f"gpu on {name}: {name}-child {str(made[0].id)[:8]} Running"


def test_what_to_do_next(capsys, client, name):
    waits = put(client, f"{name}-waits", Suspended(message="for ann"))
    assert f"rlhf approve {str(waits.id)[:8]}, or" in shown(capsys, f"{name}-waits")
    crashed = put(client, f"{name}-gone", Crashed(message="killed"))
    assert f"prefect flow-run retry {crashed.id}" in shown(capsys, str(crashed.id)[:13])
    done = put(client, f"{name}-done", Completed())
    said = shown(capsys, str(done.id))
    assert "retry" not in said
    assert "approve" not in said


def test_watching_ends_with_the_run(capsys, client, name):
    put(client, name, Completed(message="all done"))
    status(name, watch=True)
    assert "all done" in capsys.readouterr().out


def test_runs_newest_first_and_the_next_one(capsys, client, name):
    put(client, f"{name}-1", Completed(name="NoNewData", message="Nothing\nto retrain on"))
    put(client, f"{name}-2", Crashed(message="x" * 500))
    client.create_flow_run(
        empty,
        name=f"{name}-3",
        state=Scheduled(scheduled_time=datetime.now(UTC) + timedelta(hours=1)),
    )
    said = listed(capsys)
    assert said.index(f"{name}-2") < said.index(f"{name}-1")
    assert re.fullmatch(
        rf"{name}-1 +NoNewData +2.* s +Nothing to retrain on *", line_of(said, f"{name}-1")
    )
    words = line_of(said, f"{name}-2").split()
    assert (words[1], words[-1]) == ("Crashed", "x" * 500)
    assert f"next: {name}-3" in said
    assert f"\n{name}-3" not in said
    assert f"{name}-1" not in listed(capsys, limit=1)
    rows = {row["name"]: row for row in json.loads(listed(capsys, json=True))}
    assert rows[f"{name}-1"]["message"] == "Nothing to retrain on"
    assert rows[f"{name}-1"]["where"] == "local"
    assert f"{name}-3" not in rows


def test_a_hostile_name_breaks_no_list(capsys, client, name):
    evil = f"{name}[/x]\x1b[31m\r\u202e\nfake"
    put(client, evil, Crashed(name="[/y]", message="[/z] \x1b]0;t\x07\nmore"))
    said = listed(capsys, limit=5)
    assert line_of(said, f"{name}[/x]\\x1b[31m \\u202e fake").split()[3] == "[/y]"
    assert "[/z] \\x1b]0;t\\x07 more" in shown(capsys, name)
    assert not {"\x1b", "\r", "\u202e"} & {*said}


def test_a_run_that_is_not_clear(client, name):
    for number in (1, 2):
        put(client, f"{name}-{number}", Completed())
    with pytest.raises(ConfigError, match=f"'{name}': 2 runs are meant; give more of one: {name}"):
        status(name)
    with pytest.raises(ArtifactMissing, match=f"'nothing': no run is called .* {name}"):
        status("nothing")
    with pytest.raises(ConfigError, match="--limit 0: give a number from 1 to 200"):
        runs(limit=0)


def test_the_command(client, name, tmp_path):
    put(client, name, Completed())
    there = rlhf_process("status", name, env=environment(tmp_path))
    assert there.returncode == 0, there.stderr
    assert there.stdout.startswith(f"{name} ")


def test_the_command_without_a_server(rlhf, tmp_path):
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        none = rlhf("runs", "--work-dir", tmp_path)
    assert none.returncode == 0
    assert f"no runs in {tmp_path}/runs; for those of a Prefect server set" in none.stdout
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:9/api"}):
        away = rlhf("runs")
    assert away.returncode == 2
    assert "does not answer at http://127.0.0.1:9/api" in away.stderr


def test_durations():
    spans = (None, 3.21, 61.0, 3725.0)
    assert [duration(each) for each in spans] == ["", "3.2 s", "1 min 01 s", "1 h 02 min"]
