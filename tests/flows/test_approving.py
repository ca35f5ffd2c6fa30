"""`rlhf approve` without a server; tests/production has the rest."""

import io
import json

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.pipeline import pipeline
from rlhf.errors import ConfigError
from tasks.board import board
from tasks.console import PlainConsole
from tasks.remote import check_placement

pytestmark = pytest.mark.prefect


def no_server():
    """Settings of a user who has not set PREFECT_API_URL."""
    return temporary_settings(restore_defaults={PREFECT_API_URL})


def test_without_a_server_a_run_can_t_be_approved(rlhf):
    with no_server():
        done = rlhf("approve", "some-run")
    assert done.returncode == 2
    assert "set PREFECT_API_URL" in " ".join(done.stderr.split())


def test_a_run_without_a_deployment_is_approved_by_its_policy(rlhf, tiny, finished):
    config = tiny(promotion={"name": "line", "approval": "manual"})
    board.show_on(PlainConsole(file=io.StringIO()))  # as a command does; else no record is written
    try:
        waiting = pipeline(overrides=config, return_state=True)
    finally:
        board.show_on(None)
    assert (waiting.name, waiting.is_completed()) == ("AwaitingApproval", True)
    run = waiting.result()
    assert "waits for a person" in run.reason
    command = run.reason.split("`")[1]
    assert command.startswith(f"rlhf approve {run.refs['train-policy'].digest[:12]} --name line ")
    assert "Waits for a person" in run.report.read_text()
    policy = run.refs["train-policy"].digest
    line = ("--name", "line", "--store", config.store)
    with no_server():
        no = rlhf("approve", policy[:10], "--refuse", "--why", "dull", "--by", "bob", *line)
    assert no.returncode == 0, no.stderr
    refused = pipeline(overrides=config, return_state=True)
    assert refused.name == "Refused"
    assert "bob" in refused.message
    work = ("--work-dir", config.runtime.work_dir)
    with no_server():
        others = rlhf("approve", "no-such-run", *work)
        other = rlhf("approve", run.name, "--name", "other", *work)
        yes = rlhf("approve", run.name, "--by", "ann", *work)
        listed = rlhf("runs", "--json", *work)
    assert f"that wait: {run.name};" in " ".join(others.stderr.split())
    assert "waits with a policy of model line line" in " ".join(other.stderr.split())
    assert "approved by ann" in " ".join(yes.stdout.split())
    (row,) = [row for row in json.loads(listed.stdout) if row["name"] == run.name]
    assert (row["state"], row["message"]) == (
        "Approved", "approved by ann; the same command goes on",
    )  # fmt: skip
    assert pipeline(overrides=config, return_state=True).name == "Completed"


def test_a_placement_needs_a_server_and_its_deployment(tiny):
    elsewhere = tiny(placement={"train-sft": "gpu"})
    wrong = (
        "placement.train-sft = 'train-sft/{}': no such deployment .* "
        r"\(gpu alone means train-sft/train-sft-gpu\)"
    )
    with pytest.raises(ConfigError, match=wrong.format("train-sft-gpu")):
        check_placement(elsewhere)
    # As deployments were named before.
    with pytest.raises(ConfigError, match=wrong.format("gpu")):
        check_placement(tiny(placement={"train-sft": "train-sft/gpu"}))
    with no_server(), pytest.raises(ConfigError, match="needs a Prefect server"):
        check_placement(elsewhere)
