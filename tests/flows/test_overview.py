"""What stands out in a finished run: terminal, page, summary, approval, and `rlhf show`."""

from __future__ import annotations

import json
import shutil
from html import unescape
from io import StringIO
from pathlib import Path

import pytest
import yaml
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    ArtifactFilterKey,
)

from flows import pipeline as pipeline_module
from flows.pipeline import pipeline
from flows.terminal import show_run
from rlhf.config import PipelineConfig
from rlhf.markdown import escape
from tasks.console import PlainConsole
from tasks.report import run_overview
from tasks.run_record import RunRecord, new_record, write_record
from tasks.stage import store_of
from tests.flows.conftest import tiny_tree

pytestmark = pytest.mark.prefect


def words(text):
    """Text without the breaks of its lines."""
    return " ".join(text.split())


def summary_of(flow_run_id):
    own = ArtifactFilter(
        flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]),
        key=ArtifactFilterKey(any_=["report"]),
    )
    with get_client(sync_client=True) as client:
        return str(client.read_artifacts(artifact_filter=own)[0].data)


def test_a_run_shows_what_stands_out_everywhere(first_run):
    result = first_run.result
    shown = run_overview(result)
    symptoms = {finding.symptom for finding in shown.findings}
    # Tiny: 30 held-out pairs, 8 tokens a reply, a rate at which nothing moves.
    assert {"replies_cut", "nothing_learned"} <= symptoms
    assert [figure.name for figure in shown.figures][:2] == ["reward", "training_reward"]

    console = PlainConsole(record=True, width=80, file=StringIO())
    show_run(console, result)
    lines = console.export_text().splitlines()
    box = lines[next(i for i, line in enumerate(lines) if line.startswith("SFT → after PPO")) :]
    end = next(i for i, line in enumerate(box) if line.startswith("better than SFT: "))
    assert max(map(len, box[:end])) <= 80
    text = words("\n".join(box[:end]))
    page = unescape(result.report.read_text())
    summary = summary_of(first_run.state.state_details.flow_run_id)
    assert shown.findings
    for finding in shown.findings:
        for sentence in (finding.text, finding.cure):
            assert sentence in page
            assert escape(sentence) in summary
        assert all(word in text for word in words(finding.text).split())
        assert words(finding.cure) in words("\n".join(_column(box[:end])))
    for figure in shown.figures:
        assert words(" → ".join(figure.texts)) in text
        assert escape(figure.line) in summary
    # Green is for runs in which nothing stands out.
    assert f"What stands out: {shown.alarm}, see above." in "\n".join(lines)
    assert f"What stands out: {shown.alarm}, see below." in summary
    stored = json.loads(result.report.with_suffix(".json").read_text())["overview"]
    assert [f["symptom"] for f in stored["findings"]] == [f.symptom for f in shown.findings]


def _column(box):
    """The lines of the findings' sentences, without the column of their severities."""
    return [line[11:] for line in box]


def test_an_approver_sees_it(tiny, finished, monkeypatch):
    asked = []
    monkeypatch.setattr(pipeline_module, "ask", lambda policy, about: asked.append(about))
    config = tiny(promotion={"approval": "manual", "name": "asked"})
    state = pipeline(overrides=config, return_state=True)
    (about,) = asked
    shown = run_overview(state.result(raise_on_failure=False))
    assert shown.findings
    for finding in shown.findings:
        assert escape(finding.text) in about
        assert escape(finding.cure) in about


@pytest.fixture
def preset(tmp_path, finished):
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(tiny_tree(tmp_path)))
    return path


def test_show_finds_a_run_by_all_that_names_it(rlhf, preset, tmp_path, monkeypatch):
    ran = rlhf("run", preset)
    assert ran.returncode == 0, ran.stderr
    assert "what stands out: " in ran.stdout
    here = ("--work-dir", tmp_path / "work")
    by_default = rlhf("show", *here)
    assert by_default.returncode == 0, by_default.stderr
    facts = json.loads(rlhf("show", "--json", *here).stdout)
    record = RunRecord.model_validate_json(
        next((tmp_path / "work/runs").glob("*.json")).read_text()
    )
    assert facts["page"] == record.report
    assert facts["outcome"] == "Promoted"
    assert facts["answers"][0]["question"] == "better than SFT"
    assert {"symptom", "severity", "text", "cure"} == set(facts["findings"][0])
    assert by_default.stdout.splitlines()[0].startswith(f"{facts['run_name']}  Promoted, ")
    for finding in facts["findings"]:
        assert words(finding["text"]) in words(by_default.stdout)

    page = Path(record.report)
    store = ("--store", tmp_path / "store")
    stored = store_of(PipelineConfig.model_validate(tiny_tree(tmp_path))).list()
    digest = min((a for a in stored if a.ref.kind == "report"), key=lambda a: a.age).ref.digest
    for named in ([record.name, *here], [page], [page.with_suffix(".json")], [digest, *store]):
        again = rlhf("show", *named)
        assert again.returncode == 0, again.stderr
        assert again.stdout.splitlines()[:-1] == by_default.stdout.splitlines()[:-1]
    monkeypatch.setenv("RLHF_REPORT_DIR", str(page.parent))

    # By the server alone, whose summary tells the store.
    away = rlhf("show", record.name, "--work-dir", tmp_path / "another")
    assert away.returncode == 0, away.stderr
    assert away.stdout.splitlines()[:-1] == by_default.stdout.splitlines()[:-1]

    page.with_suffix(".json").unlink()
    gone = rlhf("show", page)
    assert gone.returncode == 2
    assert f"there is no {page.stem}.json beside it" in gone.stderr
    shutil.rmtree(page.parent)
    gone = rlhf("show", record.name, *here)
    assert gone.returncode == 2
    assert "which is gone; run the same command again" in gone.stderr


def test_show_says_what_there_is_instead_of_a_report(rlhf, tmp_path):
    folder = tmp_path / "runs"
    write_record(new_record("going", ["train-sft"]), folder)
    write_record(new_record("killed", []).model_copy(update={"process_start": 1.0}), folder)
    for name, cure in {
        "going": "is Running; rlhf watch going",
        "killed": "ended as Killed without one; run the same command again",
        "none": "'none': no run is called that",
    }.items():
        shown = rlhf("show", name, "--work-dir", tmp_path)
        assert shown.returncode == 2
        assert cure in shown.stderr
        assert len(shown.stderr.splitlines()) == 1
