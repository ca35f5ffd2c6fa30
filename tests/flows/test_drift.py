"""Drift in runs of the pipeline: a veto before training, a warning, a retraining that it starts."""

import io
import json
import random

import pytest

from flows.pipeline import pipeline
from flows.terminal import show_run
from rlhf.config import PipelineConfig
from rlhf.gates import read_verdict
from tasks.console import PlainConsole
from tasks.drift import GATE, check_drift, trigger_reason
from tasks.stage import store_of
from tests.flows.conftest import tiny_tree

pytestmark = pytest.mark.prefect

OLD = [
    "the", "river", "stone", "bright", "quiet", "walks", "over",
    "under", "seldom", "often", "green", "old", "house",
]  # fmt: skip
NEW = [
    "fluss", "stein", "hell", "ruhig", "geht", "selten", "oft",
    "gruen", "alt", "haus", "wald", "feld", "weg",
]  # fmt: skip


def write(path, words, seed):
    rng = random.Random(seed)
    with path.open("w") as file:
        for i in range(120):
            text = [" ".join(rng.choices(words, k=rng.randint(5, 20))) for _ in range(3)]
            row = {"prompt": f"{i} {text[0]}", "chosen": text[1], "rejected": text[2]}
            file.write(json.dumps(row) + "\n")
    return str(path)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("drift")


@pytest.fixture(scope="module")
def config(folder):
    """Function that returns the configuration of a source, with limits."""

    def make(source, **drift):
        tree = tiny_tree(folder)
        tree["data"] = {"source": source, "near_duplicates": None, "drift": drift}
        tree["evaluation"] = {"samples": 1}
        return PipelineConfig.model_validate(tree)

    return make


@pytest.fixture(scope="module")
def champion(config, folder):
    """The run that made the champion."""
    run = pipeline(
        overrides=config(write(folder / "old.jsonl", OLD, 1)), return_state=True
    ).result()
    assert run.outcome == "Promoted", run.reason
    return run


def shown(run):
    console = PlainConsole(file=io.StringIO(), width=300)
    show_run(console, run)
    return console.file.getvalue()


def test_a_first_run_says_that_there_is_no_champion(champion):
    assert "drift: not compared: default has no champion yet" in shown(champion)


def test_the_champions_own_data_have_no_drift(champion, config, folder):
    settings = config(str(folder / "old.jsonl"))
    check = check_drift(settings, champion.refs["prepare-data"], store_of(settings))
    assert check.rejection is None
    assert check.drift.notes[0].startswith("none: these are the data of the champion")


def test_a_veto_stops_before_training_with_its_cure(champion, config, folder):
    source = write(folder / "new.jsonl", NEW, 2)
    settings = config(source, veto={"tokens": 0.1})
    state = pipeline(overrides=settings, return_state=True)
    run = state.result(raise_on_failure=False)
    assert run.outcome == "GateRejected"
    assert "tokens of" in run.reason
    assert "data.drift.veto.tokens = 0.1" in run.reason
    assert "--data.drift.veto.tokens=none" in run.reason
    states = {row.name: row.state for row in run.rows}
    assert (states["prepare-data"], states[GATE]) == ("Completed", "GateRejected")
    assert states["train-sft"] == "NotRun"
    verdict = read_verdict(store_of(settings).fetch(run.drift.verdict))
    assert (verdict.approved, verdict.subject) == (False, run.refs["prepare-data"].digest)
    assert "Drift against the champion" in run.report.read_text()


def test_a_warning_lets_the_run_go_on(champion, config, folder):
    settings = config(write(folder / "warned.jsonl", NEW, 3))
    store = store_of(settings)
    before = store.history.latest("champion/default")["policy"]
    settings = settings.model_copy(
        update={"gates": settings.gates.model_copy(update={"reward_model": _never()})}
    )
    run = pipeline(overrides=settings, return_state=True).result(raise_on_failure=False)
    # The reward model's gate rejects, so that the champion stays for the other tests.
    assert store.history.latest("champion/default")["policy"] == before
    assert {row.name: row.state for row in run.rows}["train-reward-model"] == "Completed"
    assert run.drift.warnings[0].startswith("tokens of")
    assert "drift: warning: tokens of" in shown(run)


def _never():
    from rlhf.config import GateRule

    return (GateRule(metric="accuracy", min="n"),)


def test_drift_triggers_a_retraining_and_gives_the_reason(champion, config, folder):
    data = champion.refs["prepare-data"]
    settings = config(str(folder / "old.jsonl"), trigger={"tokens": 0.1})
    store = store_of(settings)
    assert trigger_reason(settings, data, store) is None
    from tasks.runner import run_stage
    from tasks.stages import PREPARE_DATA

    moved = config(write(folder / "new.jsonl", NEW, 2), trigger={"tokens": 0.1})
    ref = run_stage(PREPARE_DATA, moved, {}).ref
    assert "data.drift.trigger.tokens = 0.1" in (trigger_reason(moved, ref, store) or "")
    assert trigger_reason(config(str(folder / "new.jsonl")), ref, store) is None
