"""`rlhf samples`, `rlhf history` and `rlhf compare-runs` on the finished run."""

from __future__ import annotations

import json

import pytest
from prefect import flow
from prefect.artifacts import create_markdown_artifact

from flows.run_lookup import open_for_run

pytestmark = pytest.mark.prefect


@pytest.fixture
def run(rlhf, finished, tmp_path, monkeypatch):
    """Runs a command on the finished store."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_WORK_DIR", str(tmp_path / "work"))

    def call(*words, code: int = 0) -> str:
        done = rlhf(*words, "--store", finished)
        assert done.returncode == code, done.stderr
        return done.stderr if code else done.stdout

    return call


def test_replies_history_and_listing_of_a_real_run(run, first_run):
    result = first_run.result
    rows = json.loads(run("samples", result.name, "--json"))
    assert len(rows) == 12 * 4  # held-out prompts, and samples to each
    assert [row["gain"] for row in rows] == sorted(row["gain"] for row in rows)
    assert all(row["gold_after"] is not None for row in rows)
    worst = json.loads(run("samples", "champion", "--sort", "gold", "--n", "1", "--json"))
    assert worst[0]["gold_after"] - worst[0]["gold_before"] <= 0
    (entry,) = json.loads(run("history", "--json"))
    assert (entry["run"], entry["outcome"], entry["is_champion"]) == (result.name, "Promoted", True)
    assert entry["policy"] == result.refs["train-policy"].digest
    assert entry["metrics"]["pairs"] == 64
    assert entry["seconds"] == pytest.approx(sum(r.seconds for r in result.rows), abs=1)
    assert {"win_rate", "win_rate_low", "kl", "eos_rate", "accuracy"} <= entry["metrics"].keys()
    assert entry["policy"][:8] in run("history")
    assert "disk: store" in run("artifacts", "ls")
    assert "are the same run" in run("compare-runs", result.name, result.name, code=2)
    assert "no run with a report" in run("samples", "nope", code=2)
    page = result.report.read_text()
    assert "held-out replies, to sort" in page
    index = (result.report.parent / "index.html").read_text()
    assert f'href="{result.report.name}"' in index
    assert result.name in index


def test_the_servers_summary_names_the_store_of_a_run(finished, first_run, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("RLHF_WORK_DIR", str(tmp_path / "work"))

    @flow(name="rlhf-pipeline", flow_run_name="elsewhere-1")
    def elsewhere():
        command = f"    rlhf artifacts pull 0123456789ab report --store {finished}"
        create_markdown_artifact(f"**Promoted**\n\nReport: or\n\n{command}", key="report")

    elsewhere()
    store, text = open_for_run("elsewhere", None, None)
    assert (store.uri, text) == (finished.as_uri(), "0123456789ab")
