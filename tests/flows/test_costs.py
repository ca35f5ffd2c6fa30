"""Costs and the budget of whole runs: recorded, shown, expected; PPO stopped, and gone on with."""

from __future__ import annotations

import json

import pytest
import yaml

from flows.pipeline import pipeline
from rlhf.budget import STOPPED_AT
from rlhf.champions import champion
from rlhf.errors import BudgetSpent
from tasks.run_costs import read_line
from tasks.runner import find_inputs
from tasks.stage import store_of
from tasks.stages import EVALUATE_POLICY, STAGES

pytestmark = pytest.mark.prefect
STOPPED = "PPO was stopped by the budget after 1 of 4 updates"


def run(config):
    return pipeline(overrides=config, return_state=True).result(raise_on_failure=False)


def states(result):
    return {row.name: row.state.value for row in result.rows}


def row(result, name):
    return next(row for row in result.rows if row.name == name)


def wide(text):
    return " ".join(text.split())


def test_a_run_that_its_budget_stopped_is_judged_and_shown_and_goes_on(
    tiny, finished, rlhf, tmp_path
):  # fmt: skip
    changes = {"ppo__kl_coef": 0.06, "costs__price_per_hour": {"default": 36.0}}
    cut = run(tiny(**changes, budget__hours=1e-9))
    assert cut.outcome.value == "Promoted"
    names = [*STAGES]
    ran = names[names.index("train-policy") :]
    cached = names[: names.index("train-policy")]
    assert states(cut) == dict.fromkeys(cached, "Cached") | dict.fromkeys(ran, "Completed")

    # It is named everywhere.
    assert cut.stopped.startswith(STOPPED)
    assert "stopped by the budget after 1 of 4 updates" in row(cut, "train-policy").metric
    store = store_of(cut.config)
    manifest = store.manifest(cut.refs["train-policy"])
    assert manifest.metrics[STOPPED_AT] == 1
    page = cut.report.read_text()
    assert f"{STOPPED}; the policy of update" in page
    assert "The watchdog found no reason to stop." in page
    assert "Nothing stopped PPO" not in page

    # What it cost, beside what was expected; cached stages took nothing.
    assert all(row(cut, name).cost is None for name in cached)
    assert row(cut, "train-sft").made.seconds > 0
    ppo = row(cut, "train-policy").cost
    assert ppo.money == pytest.approx(ppo.seconds / 100)
    assert (ppo.attempts, ppo.steps, ppo.device) == (1, 1, "cpu")
    assert ppo.memory > 10**8
    assert row(cut, "train-policy").forecast is None  # another kl_coef
    assert row(cut, "evaluate-policy").forecast.source == "as last time on this machine"
    assert "EUR an hour of cpu" in page
    entry = champion(store, "default")
    made = sum(row(cut, name).made.seconds for name in cached)
    made += sum(row(cut, name).cost.seconds for name in ran[:-1])  # it is promoted in the last
    assert entry.cost.seconds == pytest.approx(made)

    # The same budget finds it again. Without one, training goes on.
    again = run(tiny(**changes, budget__hours=1e-9))
    assert {*states(again).values()} == {"Cached"}
    assert again.refs == cut.refs
    whole = run(tiny(**changes))
    assert states(whole)["train-policy"] == "Completed"
    assert STOPPED_AT not in store.manifest(whole.refs["train-policy"]).metrics
    assert whole.stopped == ""
    later = row(whole, "train-policy").cost
    assert (later.attempts, later.steps) == (2, 4)
    assert later.seconds > ppo.seconds
    # Of both results the whole one is taken, whatever the budget.
    found = find_inputs(EVALUATE_POLICY, tiny(**changes, budget__hours=1e-9), {})
    assert found["policy"] == whole.refs["train-policy"]

    _shown(rlhf, cut, whole, tmp_path)


def _shown(rlhf, cut, whole, tmp_path):
    place = ("--store", str(tmp_path / "store"))
    shown = rlhf("costs", cut.name, *place)
    assert shown.returncode == 0, shown.stderr
    assert f"{STOPPED}; the policy of update" in shown.stdout
    assert "the budget is 1e-09 h: with more the same command goes on" in wide(shown.stdout)
    table = [line for line in shown.stdout.splitlines() if line.startswith("evaluate-policy")]
    assert "EUR" in table[0]
    runs = json.loads(rlhf("costs", "--line", "default", "--json", *place).stdout)
    marks = {each["run"]: each["champion"] for each in runs["runs"]}
    assert marks[cut.name]
    assert marks[whole.name]
    # What PPO took before it was stopped is in the later cost, and in the sum once.
    costs = [s["cost"] for each in runs["runs"] for s in each["stages"] if "cost" in s]
    before = row(cut, "train-policy").cost.seconds
    summed = sum(cost["seconds"] for cost in costs)
    assert runs["total"]["seconds"] == pytest.approx(summed - before)
    lines = rlhf("costs", "--line", "default", *place).stdout
    assert "champion, budget" in lines
    missing = rlhf("costs", "nothing", *place)
    assert missing.returncode == 2
    assert "no run with costs in" in missing.stderr
    assert all(len(line) <= 160 for line in (shown.stdout + lines).splitlines())

    # Before the next run: what is done takes nothing, the rest what it took.
    tree = cut.config.model_dump(mode="json", exclude={"ppo", "budget"})
    tree["ppo"] = {**cut.config.ppo.model_dump(exclude_unset=True), "total_episodes": 64}
    tree["budget"] = {"hours": 1e-9}
    (tmp_path / "my.yaml").write_text(yaml.safe_dump(tree))
    before = rlhf("preflight", tmp_path / "my.yaml")
    assert before.returncode == 0, before.stderr
    lines = {line.split()[0]: wide(line) for line in before.stdout.splitlines() if line.strip()}
    assert lines["train-sft"] == "train-sft 0 s done, its result is in the store"
    assert lines["train-policy"].endswith("EUR from 4 measured steps on this machine")
    assert lines["gate-policy"].endswith("as last time on this machine")
    assert "expected in all:" in before.stdout
    assert "budget: 1e-09 h, less than expected: PPO will stop early" in before.stdout


def test_no_training_begins_when_nothing_is_left(tiny, finished):
    """The data are others, so that they are prepared, which takes all of the budget."""
    config = tiny(budget__hours=1e-9, data__world__pairs=60)
    result = run(config)
    assert result.outcome.value == "Failed"
    assert isinstance(result.error, BudgetSpent)
    assert "before train-sft, which was not begun; raise budget.hours" in result.reason
    assert states(result)["train-sft"] == "Failed"
    (entry,) = [each for each in read_line(store_of(config), "default") if each.run == result.name]
    assert (entry.outcome, entry.budget) == ("Failed", "1e-09 h")
    assert [stage.name for stage in entry.stages if stage.cost] == ["prepare-data"]
