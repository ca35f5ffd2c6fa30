"""A challenger that is not better than the champion, in real runs of the pipeline."""

import io
from html import unescape

import pytest

import flows.pipeline
import tasks.challenge
import tasks.drift
import tasks.gate_check
import tasks.report
from flows.pipeline import pipeline
from flows.stages import STAGE_FLOWS
from flows.terminal import show_run
from rlhf.champions import champion as champion_of
from rlhf.champions import promote
from rlhf.errors import StoreError
from rlhf.files import read_json
from rlhf.gates import read_verdict
from tasks.console import PlainConsole
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
    assert first.gates.power.startswith("40 gate prompts × 2 replies: ")

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
    console = PlainConsole(file=io.StringIO(), width=200)
    show_run(console, second)
    shown = console.file.getvalue()
    assert "NotBetter: keep the champion: " in shown
    assert "gates: 40 gate prompts × 2 replies: a policy that truly wins " in shown
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

    verdict_ref = parents_verdict(store, second)
    verdict = read_verdict(store.fetch(verdict_ref))
    assert verdict.keeps_champion
    assert (verdict.champion, verdict.look, verdict.looks) == (champion, 1, 10)

    # A person decides otherwise: then the same run says whose policy is the champion.
    policy = second.refs["train-policy"].digest
    promote(
        store, "default", policy, verdict=verdict_ref.digest, why="a trial", by="ann",
        expected=champion_of(store, "default"), unapproved=True,
    )  # fmt: skip
    state, promoted = run(other)
    assert (state.name, promoted.outcome) == ("Completed", "Promoted")
    assert state.message.startswith("The policy is the champion of default by ann at ")
    said = f"(a trial); the gate did not find it better than {champion[:12]}: champion."
    assert said in state.message
    assert states(promoted)["gate-policy"] == "NotBetter"
    assert states(promoted)["promote"] == "NotRun"
    assert states(promoted)["evaluate-policy"] == "Cached"
    assert said in unescape(promoted.report.read_text())
    ended = STAGE_FLOWS["gate-policy"](overrides=other, return_state=True)
    assert (ended.name, said in ended.message) == ("NotBetter", True)


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


def test_the_champions_own_configuration_runs_again(tiny, first_run, finished):
    """Its 12 gate prompts can show nothing at so many looks, and it has nobody to meet."""
    _, again = run(tiny(gates__champion={"looks": 1000}))
    first = first_run.result.refs["train-policy"].digest
    assert again.refs["train-policy"].digest == first
    assert again.outcome == "Promoted", again.reason
    assert states(again)["evaluate-policy"] == "Cached"
    # Another policy would meet it.
    _, other = run(tiny(gates__champion={"looks": 1000}, ppo__kl_coef=0.3))
    assert "can't be met with 12 gate prompts" in other.reason
    assert states(other)["train-sft"] == "NotRun"


def test_a_rejected_policy_that_is_the_champion_is_still_rejected(tiny, finished):
    rule = [{"metric": "sampled.win_rate", "min": "n"}]
    state, result = run(tiny(gates__policy=rule))
    assert (state.is_failed(), result.outcome) == (True, "GateRejected")
    assert "; it is the champion of default by " in state.message
    assert state.message.endswith(" all the same")


def failing(monkeypatch, module, name, times, error):
    """Let a function of the product fail a few times; return the list of its calls."""
    real, calls = getattr(module, name), []

    def flaky(*args, **kwargs):
        calls.append(name)
        if len(calls) <= times:
            raise error
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, flaky)
    return calls


@pytest.mark.parametrize(
    "error", [OSError(5, "Input/output error"), StoreError("s3://x: the server answered 503")]
)
@pytest.mark.parametrize(
    ("module", "name"),
    [
        (tasks.gate_check, "find_challenge"), (tasks.drift, "champion"),
        (tasks.challenge, "find_challenge"), (flows.pipeline, "is_waiting"),
    ],
)  # fmt: skip
def test_between_stages_the_store_is_tried_again(
    tiny, finished, monkeypatch, module, name, error
):  # fmt: skip
    calls = failing(monkeypatch, module, name, 2, error)
    _, result = run(tiny())
    assert result.outcome == "Promoted", result.reason
    assert len(calls) >= 3


def test_a_store_that_stays_away_ends_with_a_report(tiny, finished, monkeypatch):
    config = tiny()
    error = OSError(5, "Input/output error")
    calls = failing(monkeypatch, tasks.challenge, "find_challenge", 99, error)
    state, result = run(config)
    assert (state.is_failed(), result.outcome) == (True, "Failed")
    assert len(calls) == 3 + 1  # the forecast of what it costs, which may fail, asks once more
    said = (
        f"{config.store}: finding what evaluate-policy needs failed ([Errno 5] Input/output "
        "error); mend that, and run the same again"
    )
    assert state.message == said
    assert states(result)["evaluate-policy"] == "Failed"
    assert said in unescape(result.report.read_text())
    # A fault of the program is no reason to try again, and none to end without a report.
    calls = failing(monkeypatch, tasks.challenge, "find_challenge", 99, ValueError("a bug"))
    state, result = run(config)
    assert len(calls) == 1 + 1
    bug = state.message
    assert bug.startswith("ValueError: a bug (tasks/challenge.py:")
    assert "a bug" in result.report.read_text()
    # Not even the report's parts are there.
    failing(monkeypatch, tasks.report, "read_summary", 99, StoreError("s3://x: it is gone"))
    state, result = run(config)
    assert state.message == bug
    page = unescape(result.report.read_text())
    gone = "(all that the store holds is missing from this report: s3://x: it is gone)"
    assert f"{bug} {gone}" in page
