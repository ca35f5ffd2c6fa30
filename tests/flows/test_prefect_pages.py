"""Pages, tables and the approval's form in Prefect's UI: no text of a stranger acts there."""

from __future__ import annotations

import json
import re

import pytest
from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.runtime import flow_run

from rlhf.markdown import Markdown, escape
from rlhf.report import StageRow, StageState
from tasks.approvals import Decision
from tasks.prefect_pages import show_table
from tasks.report import PipelineRun, write_report
from tasks.stages import EVALUATE_POLICY, SAMPLES
from tests.test_plain_text import acts, structure, text_of

pytestmark = pytest.mark.prefect
EVIL = (
    "`</code> **b** [x](javascript:alert(1)) ![](https://evil.example/p.png) |\x1b[31m\r\u202e\n\n"
    "# heading\n\n---\n<script>alert(1)</script>\n```\n> out\n1. one\nwww.evil.example"
)
#: The same lines without a character that could act.
PLAIN = "\n".join(re.sub(r"\\S", "x", line) for line in EVIL.replace("\r", "\n").split("\n"))


def artifacts_of(made) -> list:
    """What a flow shows in Prefect's UI."""
    ids = []

    @flow(name="pages")
    def pages():
        ids.append(flow_run.id)
        made()

    pages()
    with get_client(sync_client=True) as client:
        by_run = ArtifactFilterFlowRunId(any_=ids)
        return client.read_artifacts(artifact_filter=ArtifactFilter(flow_run_id=by_run))


def test_a_run_s_summary_and_form_show_text_as_text(tiny):
    def summary(text: str) -> Markdown:
        run = PipelineRun(tiny(), {}, text, "2026-01-01T00:00:00+00:00", reason=text)
        run.rows = [StageRow(name="train-sft", state=StageState.FAILED, message=text)]
        return write_report(run)

    found = []
    shown = artifacts_of(lambda: found.extend(map(summary, (EVIL, PLAIN))))
    evil, plain = found
    assert {artifact.data for artifact in shown} == {evil, plain}
    assert structure(evil) == structure(plain)
    assert acts(evil) == []
    assert "](javascript:alert(1))" in " ".join(text_of(evil))
    form = Decision.with_initial_data(description=evil)
    assert isinstance(evil, Markdown)
    assert form._description == evil


def test_replies_stay_in_their_quotations(tiny, tmp_path):
    def page(text: str) -> Markdown:
        saved = [{"prompt": text, "before": text, "after": text}] * 2
        (tmp_path / SAMPLES).write_text(json.dumps(saved))
        assert EVALUATE_POLICY.show is not None
        shown = EVALUATE_POLICY.show(tmp_path, tiny())["samples"]
        assert isinstance(shown, Markdown)
        return shown

    assert structure(page(EVIL)) == structure(page(PLAIN))
    assert acts(page(EVIL)) == []
    assert text_of(page("  indented\n\ncode"))[:3] == ["Prompt", "indented", "code"]


def test_the_cells_of_a_table_are_escaped(prefect_api):
    rows = [{"reason": EVIL, "rows": 3, "none": None}]
    (table,) = artifacts_of(lambda: show_table("left-out", rows, escape(EVIL)))
    (cells,) = json.loads(table.data)
    assert cells == {"reason": escape(EVIL), "rows": 3, "none": None}
    assert table.description == escape(EVIL)
