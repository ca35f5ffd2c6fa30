"""A challenger that is not better than the champion, in real runs of the pipeline."""

import io

import pytest
from rich.console import Console

from flows.pipeline import pipeline
from flows.stages import STAGE_FLOWS
from flows.terminal import show_run
from rlhf.champions import promote
from rlhf.files import read_json
from rlhf.gates import read_verdict
from tasks.stage import store_of

pytestmark = pytest.mark.prefect

#: Enough prompts for ten looks, and no slice of 30.
CHANGES = {
    "gates__champion": {"looks": 10}, "data__world__eval_prompts": 40,
    "evaluation": {"judge": "world", "samples": 2, "samples_per_prompt": 2},
}  # fmt: skip


def run(config):
    state = pipeline(overrides=config, return_state=True)
    return state, state.result(raise_on_failure=False)


def states(result):
    return {row.name: row.state for row in result.rows}


def test_a_challenger_that_is_not_better_leaves_the_champion(tiny):
    """Tiny policies that have learnt next to nothing are no better than each other."""
    config, other = tiny(**CHANGES), tiny(**CHANGES, ppo__kl_coef=0.3)
    state, first = run(config)
    assert state.name == "Completed", state.message
    store = store_of(config)
    champion = first.refs["train-policy"].digest
    (entry,) = store.history.entries("champion/default")
    assert entry["why"] == "it met every gate; first champion"
    assert first.gates.power.startswith("40 gate prompts × 2 samples: ")

    state, second = run(other)
    assert (state.is_completed(), state.name, second.outcome) == (True, "NotBetter", "NotBetter")
    assert state.message.startswith("keep the champion: champion.")
    assert states(second)["gate-policy"] == "NotBetter"
    assert states(second)["promote"] == "NotRun"
    assert len(store.history.entries("champion/default")) == 1
    evaluation = read_json(store.fetch(second.refs["evaluate-policy"]) / "evaluation.json")
    assert evaluation["champion"]["policy"] == champion
    assert evaluation["prompts_from"] == "champion"
    own = read_json(store.fetch(first.refs["evaluate-policy"]) / "evaluation.json")
    assert evaluation["prompts_sha256"] == own["prompts_sha256"]
    parents = store.manifest(second.refs["evaluate-policy"]).parents
    assert parents["champion"] == champion
    assert parents["champion-evaluation"] == first.refs["evaluate-policy"].digest
    console = Console(file=io.StringIO(), width=200)
    show_run(console, second)
    shown = console.file.getvalue()
    assert "NotBetter: keep the champion: " in shown
    assert "gates: 40 gate prompts × 2 samples: a true win rate of " in shown
    assert "Not better than the champion" in second.report.read_text()

    # The same again: nothing runs, and its look counts once.
    state, again = run(other)
    assert state.name == "NotBetter"
    assert states(again)["evaluate-policy"] == "Cached"
    (look,) = store.history.names("looks/default")
    assert [e["policy"] for e in store.history.entries(look)] == [
        second.refs["train-policy"].digest
    ]
    assert "1 of 10 looks at the champion's gate prompts are taken" in again.gates.notes
    # One stage alone ends the same way, and finds the champion itself.
    ended = STAGE_FLOWS["gate-policy"](overrides=other, return_state=True)
    assert (ended.is_completed(), ended.name) == (True, "NotBetter")
    # The champion's own run is compared with nobody, and all of it is in the store.
    _, repeated = run(config)
    assert set(states(repeated).values()) == {"Cached"}

    verdict = read_verdict(store.fetch(parents_verdict(store, second)))
    assert verdict.keeps_champion
    assert (verdict.champion, verdict.look, verdict.looks) == (champion, 1, 10)


def parents_verdict(store, result):
    """The published verdict on the policy of a run."""
    policy = result.refs["train-policy"].digest
    return next(
        a.ref for a in store.list()
        if a.ref.kind == "verdict" and policy in a.manifest.parents.values()
    )  # fmt: skip


def test_a_champion_that_is_gone_stops_before_training(tiny):
    config = tiny(**CHANGES)
    promote(
        store_of(config), "default", "0" * 64, verdict=None, expected=None, why="a trial", by="ann"
    )
    state, result = run(config)
    assert state.is_failed()
    assert "the champion 000000000000 of default is not there, or not whole" in state.message
    assert states(result)["check-gates"] == "Failed"
    assert states(result)["train-sft"] == "NotRun"
