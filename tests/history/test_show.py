"""`rlhf show` of runs that share a report: it says whose it is."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from flows.overview import show
from rlhf.errors import ArtifactMissing
from rlhf.report import RunOutcome
from tasks.run_record import RunRecord, write_record
from tests.report import demo


@pytest.fixture
def page(made, tmp_path) -> Path:
    """The page that run-a and then run-b have written."""
    report = demo.rejected_report().model_copy(
        update={"run_name": "run-b", "outcome": RunOutcome.FAILED, "reason": "out of memory"}
    )
    page = tmp_path / "same.html"
    page.write_text("<html>")
    page.with_suffix(".json").write_text(report.model_dump_json())
    for name, state, reason in (
        ("run-a", "Failed", "disk is full"), ("run-b", "Failed", "out of memory"),
        ("run-c", "Promoted", "it met every gate"),
    ):  # fmt: skip
        record = RunRecord(name=name, state=state, reason=reason, started=1.0, report=str(page))
        write_record(record, tmp_path / "work/runs")
    return page


def test_whose_report_it_is(page, capsys):
    show("run-a")
    first = capsys.readouterr().out.splitlines()[0]
    assert first == (
        "run-a has the same result as run-b, whose report this is; its own reason: disk is full"
    )
    show("run-b")
    assert capsys.readouterr().out.startswith("run-b  Failed")
    show(str(page))
    assert capsys.readouterr().out.startswith("run-b  Failed")


def test_both_names_as_json(page, capsys):
    show("run-a", json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["run_name"]) == ("run-a", "run-b")
    assert found["note"].startswith("run-a has the same result as run-b")
    show("run-b", json=True)
    found = json.loads(capsys.readouterr().out)
    assert (found["run"], found["run_name"], found["note"]) == ("run-b", "run-b", "")


def test_a_report_of_another_outcome_is_not_shown(page, capsys):
    with pytest.raises(ArtifactMissing, match=r"run-c: .*ended as Promoted.*rlhf show run-b"):
        show("run-c")
    assert capsys.readouterr().out == ""
