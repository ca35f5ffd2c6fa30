"""The table of costs in the report and the terminal, on made figures."""

from __future__ import annotations

from flows import costs as costs_command
from rlhf.config.pipeline import STAGE_NAMES
from rlhf.costs import Cost, Forecast
from rlhf.report import RunReport, StageRow, StageState, render
from rlhf.report.costs import UNKNOWN, cost_view
from rlhf.report.render import watchdog_finding
from rlhf.store import open_store
from tasks.console import console
from tasks.run_costs import RunCosts, StageCosts
from tests.report import demo
from tests.report.test_render import Tree

GPU = Cost(
    seconds=4210, attempts=3, device="NVIDIA H200", devices=4, processes=4, memory=61_000_000_000,
    reserved=120_000_000_000, device_memory=131_000_000_000, energy=9.1e6, price=3.4, money=15.9,
    currency="EUR",
)  # fmt: skip
CPU = Cost(seconds=61, device="cpu", memory=900_000_000, price=0.2, money=0.0034, currency="EUR")
ROWS = (
    StageRow(name="prepare-data", state=StageState.CACHED, seconds=0.2, made=CPU),
    StageRow(
        name="train-policy", state=StageState.COMPLETED, seconds=4000, cost=GPU,
        forecast=Forecast(seconds=3600, source="as last time on this machine"),
    ),
    StageRow(name="evaluate-policy", state=StageState.COMPLETED, seconds=61, cost=CPU),
    StageRow(name="promote", state=StageState.NOT_RUN),
)  # fmt: skip


def table(rows):
    view = cost_view(rows)
    return {row.stage: dict(zip(view.columns, row.cells, strict=True)) for row in view.rows}


def test_what_ran_and_what_was_cached():
    rows = table(ROWS)
    assert [*rows] == ["prepare-data", "train-policy", "evaluate-policy", "Sum of this run"]
    assert rows["prepare-data"]["Time"] == "0 s"
    assert not any(value for key, value in rows["prepare-data"].items() if key != "Time")
    assert rows["train-policy"] == {
        "Time": "1 h 10 min", "Expected": "1 h 00 min", "Memory": "61.0 GB",
        "Device": "131.0 GB", "Energy": "2.5 kWh", "Money": "15.90 EUR",
    }  # fmt: skip
    assert rows["evaluate-policy"]["Expected"] == UNKNOWN
    assert rows["Sum of this run"] == {
        "Time": "1 h 11 min", "Expected": UNKNOWN, "Memory": "61.0 GB",
        "Device": "131.0 GB", "Energy": "at least 2.5 kWh", "Money": "15.90 EUR",
    }  # fmt: skip
    notes = {row.stage: row.note for row in cost_view(ROWS).rows}
    assert notes["prepare-data"] == "cached; when it was made: 1 min 01 s, 900 MB, 0.0034 EUR"
    assert notes["train-policy"] == (
        "4 × NVIDIA H200; 3 attempts; expected as last time on this machine"
    )
    assert "3.40 EUR an hour of NVIDIA H200" in cost_view(ROWS).notes[1]


def test_what_is_not_known_has_no_column():
    plain = [StageRow(name="a", state=StageState.COMPLETED, cost=Cost(seconds=5))]
    assert cost_view(plain).columns == ["Time"]
    assert cost_view(ROWS[:1]).columns == ["Time"]  # all cached
    assert cost_view(ROWS[3:]).rows == []


def test_the_page_has_the_table_and_says_what_the_budget_stopped():
    line = "PPO was stopped by the budget after 120 of 400 updates"
    report = demo.full_report()
    full = {**dict(report), "stages": ROWS, "stopped": line, "budget": "2 h, 10 EUR"}
    page = render(RunReport.model_validate(full))
    texts = [text.strip() for text in Tree(page).texts]
    assert "Sum of this run" in texts
    assert "at\u00a0least\u00a02.5\u00a0kWh" in texts
    assert f"{line}." in texts
    assert any("The budget of this run was 2 h, 10 EUR." in text for text in texts)
    assert "Nothing stopped PPO" not in page
    assert watchdog_finding({"chosen": 4}, line).headline == "The watchdog found no reason to stop."
    assert watchdog_finding({"chosen": 4}).headline == "Nothing stopped PPO before its end."
    assert "Sum of this run" not in render(report)


def test_the_command_fits_80_columns(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(console, "_width", 80)
    longest = GPU.model_copy(update={"seconds": 3599, "money": 1234.56})
    stages = [
        StageCosts(name=name, state="Completed", cost=longest, forecast=Forecast(seconds=3599))
        for name in STAGE_NAMES
    ]
    made = RunCosts(
        run="weekly-20261129-101500", started="2026-11-29T10:15:00+00:00", outcome="Promoted",
        stages=stages, stopped="PPO was stopped", budget="2 h",
    )  # fmt: skip
    costs_command._show_run(made)
    lines = capsys.readouterr().out.splitlines()
    rows = [line for line in lines if line.startswith(STAGE_NAMES)]
    assert len(rows) == len(STAGE_NAMES)  # a row for each, none of two lines
    assert all(len(line) <= 80 for line in lines[1:-2])
    assert all("1,234.56 EUR" in row for row in rows)
    store = open_store(str(tmp_path / "store"), cache_dir=tmp_path)
    costs_command._show_line(store, "default", [made, made], json=False)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 4
    assert all(len(line) <= 80 for line in lines[:3])
