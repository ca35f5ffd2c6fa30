"""The pipeline as a Prefect flow: stages run, stages cached, and final states."""

import json
from dataclasses import replace
from html import unescape
from io import StringIO
from types import SimpleNamespace

import pytest
from prefect import tags
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    ArtifactFilter,
    ArtifactFilterFlowRunId,
    FlowRunFilter,
    FlowRunFilterId,
)
from prefect.utilities.collections import visit_collection

from flows import stages
from flows.cli import app
from flows.pipeline import pipeline
from flows.stages import STAGE_FLOWS
from flows.terminal import show_run
from rlhf.champions import Promotion, promote
from rlhf.config import load_config
from rlhf.config.pipeline import STAGE_NAMES
from rlhf.errors import GateRejected, StoreError
from rlhf.report import RunOutcome, StageState
from rlhf.report.samples import shown_samples
from rlhf.store import Store
from tasks import prefect_tasks
from tasks.console import PlainConsole
from tasks.parameters import NO_PRESET, configuration_name, resolve
from tasks.preflight import preflight_command
from tasks.remote import WORK_TAG
from tasks.report import first_answers, reward_model_facts
from tasks.stage import store_of
from tasks.stages import STAGES

pytestmark = pytest.mark.prefect
NAMES = list(STAGES)


def run(config):
    state = pipeline(overrides=config, return_state=True)
    return state, state.result(raise_on_failure=False)


def states(result):
    return {row.name: row.state for row in result.rows}


def test_stages_flows_and_help_have_the_same_names(capsys):
    assert tuple(STAGES) == tuple(STAGE_FLOWS) == STAGE_NAMES
    with pytest.raises(SystemExit):
        app(["stage", "--help"])
    words = " ".join(capsys.readouterr().out.replace("│", " ").split())
    assert f"{', '.join(NAMES[:-1])} or {NAMES[-1]}." in words


def test_the_flow_of_a_command_does_not_check_again(tiny, monkeypatch):
    checks, check = [], Store.check
    monkeypatch.setattr(Store, "check", lambda store: checks.append(store) or check(store))
    config = tiny()
    preflight_command(config)
    STAGE_FLOWS["prepare-data"](overrides=config)
    assert len(checks) == 1
    STAGE_FLOWS["prepare-data"](overrides=tiny(seed=1))
    assert len(checks) == 2


def digests(result):
    """What was made; a reference also says where it lies, and a copied store lies elsewhere."""
    return {name: ref.digest for name, ref in result.refs.items()}


def artifacts(config):
    return {artifact.ref for artifact in store_of(config).list()}


def test_runs_to_promotion_and_never_twice(first_run):
    config, first = first_run.config, first_run.result
    assert first_run.state.is_completed(), first_run.state.message
    assert list(states(first).items()) == [(name, "Completed") for name in NAMES]
    assert "Promoted" in first.report.read_text()
    champion = store_of(config).history.latest("champion/default")
    assert champion["policy"] == first.refs["train-policy"].digest
    assert champion["run"] == first.name

    _, second = run(config)
    assert set(states(second).values()) == {"Cached"}
    assert second.refs == first.refs
    assert second.report == first.report
    assert len(store_of(config).history.entries("champion/default")) == 1

    # Another policy was promoted since: it is champion again, as the run says.
    before = Promotion(**champion, number=1)
    promote(store_of(config), "default", "0" * 64, verdict=None, expected=before, why="a trial")
    _, third = run(config)
    assert [name for name, state in states(third).items() if state != "Cached"] == ["promote"]
    assert third.refs == first.refs
    again = store_of(config).history.latest("champion/default")
    assert (again["policy"], again["previous"]) == (champion["policy"], "0" * 64)


def test_unusual_values_are_recorded_with_the_run(tiny, finished):
    config = tiny(rl_kl_coef=0.9, gates__reward_model=[{"metric": "accuracy", "min": "n"}])
    before = artifacts(config)
    _, result = run(config)
    line = "ppo.kl_coef = 0.9 is outside the advised 0.01–0.5; keep it only if you mean it"
    assert result.advice == (line,)
    assert line in result.report.read_text()
    store = store_of(config)
    (report,) = [ref for ref in artifacts(config) - before if ref.kind == "report"]
    folder = store.fetch(report)
    recorded = json.loads((folder / "report.json").read_text())
    assert (recorded["advice"], recorded["outcome"]) == ([line], "GateRejected")
    assert (folder / "report.html").read_text() == result.report.read_text()


def test_a_child_run_leaves_advice_to_its_parent(tiny, finished, monkeypatch):
    """It gets all values without their sources: a preset's own would be taken for the user's."""
    lines = []
    monkeypatch.setattr(stages, "get_run_logger", lambda: SimpleNamespace(warning=lines.append))
    config = tiny(rl_kl_coef=0.9)
    with tags(f"{WORK_TAG}0123"):
        STAGE_FLOWS["prepare-data"](overrides=config)
    assert lines == []
    STAGE_FLOWS["prepare-data"](overrides=config)
    assert [line.partition(" is ")[0] for line in lines] == ["ppo.kl_coef = 0.9"]


def test_a_changed_setting_reruns_its_stage_and_what_follows(tiny, first_run, finished):
    first = first_run.result
    _, second = run(tiny(ppo__kl_coef=0.3))
    cached = [name for name, state in states(second).items() if state == "Cached"]
    assert cached == NAMES[: NAMES.index("train-policy")]
    assert digests(second)["train-policy"] != digests(first)["train-policy"]


def test_a_deleted_artifact_is_made_again(tiny, first_run, finished):
    config, first = tiny(), first_run.result
    store_of(config).delete(first.refs["train-reward-model"])
    _, second = run(config)
    assert states(second)["train-reward-model"] == "Completed"
    assert states(second)["train-sft"] == "Cached"
    # Training is reproducible, so the same bytes come back and what follows stays valid.
    assert digests(second)["train-reward-model"] == digests(first)["train-reward-model"]
    assert states(second)["train-policy"] == "Cached"


def test_a_lost_blob_is_noticed(tiny, first_run, finished):
    config, first = tiny(), first_run.result
    weights = next(
        f for f in store_of(config).manifest(first.refs["train-policy"]).files
        if f.path == "model.safetensors"
    )  # fmt: skip
    (finished / "blobs/sha256" / weights.sha256[:2] / weights.sha256).unlink()
    _, second = run(config)
    assert states(second)["train-policy"] == "Completed"


@pytest.mark.parametrize("gate", ["reward_model", "policy"])
def test_a_rejection_ends_as_rejected_with_its_reason(tiny, finished, gate):
    metric = {"reward_model": "accuracy", "policy": "sampled.win_rate"}[gate]
    rule = {f"gates__{gate}": [{"metric": metric, "min": "n"}]}
    config = tiny(promotion={"name": "line"}, **rule)
    before = artifacts(config)
    state, result = run(config)
    assert state.is_failed()
    assert state.name == "GateRejected"
    assert metric in state.message
    assert "needs ≥ n (" in state.message
    name = f"gate-{gate.replace('_', '-')}"
    after = NAMES[NAMES.index(name) + 1 :]
    assert states(result)[name] == "GateRejected"
    assert all(states(result)[later] == "NotRun" for later in after)
    assert store_of(config).history.latest("champion/line") is None
    page = result.report.read_text()
    assert "≥ n (" in page
    assert "Rejected" in page or "rejected" in page
    # The verdict was published before anything was raised.
    assert [ref.kind for ref in artifacts(config) - before].count("verdict") == 1


def test_a_rejection_is_not_retried_and_says_the_same_again(tiny, finished):
    config = tiny(gates__reward_model=[{"metric": "accuracy", "min": "n"}])
    pages = []
    for _ in range(2):
        _, result = run(config)
        assert isinstance(result.error, GateRejected)
        pages.append((result.report, result.report.read_bytes()))
    (first, content), (second, _) = pages
    assert first != second
    assert first.read_bytes() == content, "the page of the run that did the work was overwritten"
    assert task_run_counts(config, "gate-reward-model") == [1, 1]


def test_a_store_error_is_retried_and_a_bad_value_is_not(tiny, finished, monkeypatch):
    real, calls = prefect_tasks.run_stage, []

    def flaky(stage, *args, **kwargs):
        calls.append(stage.name)
        if stage.name == "train-sft" and calls.count("train-sft") < 3:
            raise StoreError("s3://x: the server answered 503; try again later")
        if stage.name == "train-reward-model":
            raise ValueError("a bug, not a fault")
        return real(stage, *args, **kwargs)

    monkeypatch.setattr(prefect_tasks, "run_stage", flaky)
    state, result = run(tiny())
    assert calls.count("train-sft") == 3
    assert calls.count("train-reward-model") == 1
    assert state.is_failed()
    assert state.name == "Failed"
    assert "a bug, not a fault" in state.message
    assert result.outcome == "Failed"


def test_a_loaded_configuration_is_taken_as_it_is_and_shown_as_its_values():
    loaded = load_config("configs/quickstart.yaml", ["--rl-gamma=0.9"])
    for given in (loaded, loaded.config, loaded.config.model_dump(mode="json")):
        shown = pipeline.serialize_parameters({"overrides": given})
        assert shown == {"overrides": loaded.config.model_dump(mode="json")}
        parameters = visit_collection({"overrides": given}, lambda value: value, return_data=True)
        valid = pipeline.validate_parameters(parameters)
        assert configuration_name(valid) == "quickstart"
        resolved = resolve(valid.get("preset", NO_PRESET), valid["overrides"])
        assert resolved.config == loaded.config
        assert (resolved is loaded) is (given is loaded)
        assert resolved.sources["ppo.gamma"] == ("command line" if given is loaded else "override")


def test_the_first_screen_and_the_page_give_the_same_answers(first_run):
    result = first_run.result
    answers = first_answers(result)
    assert [answer.question for answer in answers] == [
        "better than SFT", "better than the champion", "over-optimised",
    ]  # fmt: skip
    assert answers[1].line == "better than the champion: not compared (gates.champion is none)"
    console = PlainConsole(record=True, width=200, file=StringIO())
    show_run(console, result)
    lines = console.export_text().splitlines()
    page = unescape(result.report.read_text())
    for answer in answers:
        assert answer.line in lines
        assert f"<b>{answer.answer}</b>" in page
        assert answer.evidence in page
    told = [line for line in lines if line.startswith("reward model: ")]
    assert told == [f"reward model: {line}" for line in reward_model_facts(result)]
    assert told[0].startswith("reward model: accuracy ")
    assert "worst probe" in told[1]
    # The last lines of a terminal are those that are seen.
    assert lines.index(answers[0].line) > len(lines) - 10


def test_the_first_screen_shows_each_stage_whole_at_80_columns(first_run):
    console = PlainConsole(record=True, width=80, file=StringIO())
    show_run(console, first_run.result)
    lines = console.export_text().splitlines()
    rows = first_run.result.rows
    for row in rows:
        (at,) = (i for i, line in enumerate(lines) if line.startswith(f"{row.name} "))
        assert row.state in lines[at]
        assert lines[at].endswith(row.artifact[:10])
        assert row.metric in " ".join(" ".join(lines[at + 1 : at + 4]).split())
    rejected = rows[4].model_copy(
        update={
            "state": StageState.GATE_REJECTED,
            "metric": "",
            "message": "no: a",
            "artifact": None,
        }
    )
    left = [row.model_copy(update={"state": StageState.NOT_RUN}) for row in rows[5:]]
    run = replace(
        first_run.result, outcome=RunOutcome.GATE_REJECTED, reason="gate-reward-model: no: a",
        error=GateRejected("gate-reward-model: no: a"), rows=[rejected, *left],
    )  # fmt: skip
    show_run(console, run)
    told = console.export_text()
    assert "not run: train-judge, train-policy, evaluate-policy, gate-policy, promote" in told
    assert f"rlhf chat {first_run.result.refs['train-sft'].short} --store " in told
    assert "--gates.reward_model=none" in told
    assert "no: a" not in told, "the error is printed by the command, at the very end"


def test_samples_of_every_kind_are_shown_and_no_more():
    kinds = [[], ["lost"], [], ["lost", "changed"], [], ["lost"], ["changed"], ["changed"]]
    texts = {"before": "b", "after": "a"}
    rows = [{"prompt": str(i), "kinds": kind, **texts} for i, kind in enumerate(kinds)]
    # Two without a kind, two that lost, and of those that changed one more than prompt 3.
    assert [sample.prompt for sample in shown_samples(rows, 2)] == ["0", "1", "2", "3", "6"]
    assert shown_samples(rows, 0) == []
    # Evaluations from before there were kinds.
    assert len(shown_samples([{"prompt": "a", **texts}] * 5, 2)) == 2


def test_prefect_shows_stages_states_and_results(tiny, finished):
    state, _ = run(tiny())
    flow_run_id = state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        own = FlowRunFilter(id=FlowRunFilterId(any_=[flow_run_id]))
        task_runs = client.read_task_runs(flow_run_filter=own)
        mine = {t.name: t.state.name for t in task_runs}
        artifacts = client.read_artifacts(
            artifact_filter=ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[flow_run_id]))
        )
        flow_run = client.read_flow_run(flow_run_id)
    assert mine == dict.fromkeys(NAMES, "Cached")
    keys = {a.key for a in artifacts}
    (summary,) = (a.data for a in artifacts if a.key == "report")
    assert "\n- better than SFT: " in summary
    assert "\n- over-optimised: " in summary
    assert {f"{name}-result" for name in NAMES} <= keys
    assert {"samples", "gate-policy-verdict"} <= keys
    assert flow_run.name.startswith("tiny-")


def task_run_counts(config, name):
    with get_client(sync_client=True) as client:
        task_runs = client.read_task_runs(limit=100)
    return [t.run_count for t in task_runs if t.name == name][:2]
