"""Commands that name a run open its store with the options that the run had."""

from __future__ import annotations

import io

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.champions import approve
from flows.compare_runs import compare_runs
from flows.run_lookup import read_pull
from flows.samples import samples
from rlhf.config.pipeline import StoreConfig
from rlhf.errors import ConfigError, StoreError
from tasks.board import board
from tasks.console import PlainConsole
from tasks.run_record import Awaiting, read_records, write_record
from tests.store.answers import SECRET, answering, error

URI = "s3://bucket/store"


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server that refuses; where the options are lost, requests go elsewhere."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_WORK_DIR", str(tmp_path))
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "key")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", SECRET)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    with answering() as answer, temporary_settings(restore_defaults={PREFECT_API_URL}):
        answer.status, answer.body = 403, error("AccessDenied")
        yield answer


@pytest.fixture
def folder(server, tmp_path):
    """The records' folder after a run that waits for an approval."""
    options = StoreConfig(endpoint_url=server.endpoint, region="eu-1")
    board.show_on(PlainConsole(file=io.StringIO()))
    try:
        with board.running("weekly-1", [], tmp_path, URI, options):
            waiting = Awaiting(policy="ab" * 32, store=URI, line="default")
            board.end("AwaitingApproval", awaiting=waiting)
    finally:
        board.show_on(None)
    return tmp_path / "runs"


@pytest.mark.parametrize(
    "command",
    [samples, approve, lambda run: compare_runs(run, run)],
    ids=["samples", "approve", "compare-runs"],
)
def test_a_named_run_is_looked_for_at_its_own_endpoint(command, server, folder):
    with pytest.raises(StoreError):
        command("weekly-1")
    assert server.requests
    (record,) = read_records(folder)
    assert record.store_options == StoreConfig(endpoint_url=server.endpoint, region="eu-1")
    (file,) = folder.glob("*.json")
    assert SECRET not in file.read_text()


def test_a_record_without_options_is_refused_with_the_cure(server, folder):
    (record,) = read_records(folder)
    write_record(record.model_copy(update={"store_options": None}), folder)
    for command in (samples, approve):
        with pytest.raises(
            ConfigError, match=r"weekly-1: .*store_options of s3://bucket/store; gi"
        ):
            command("weekly-1")
    assert server.requests == []


def test_a_summary_says_that_the_store_has_options():
    pull = f"    rlhf artifacts pull 0123456789ab report --store {URI}"
    assert read_pull("w", f"Report: or\n\n{pull}") == ("0123456789ab", URI)
    with pytest.raises(ConfigError, match=r"w: its store s3://bucket/store has store_options.*012"):
        read_pull("w", f"{pull} --config <the configuration of the run>")
