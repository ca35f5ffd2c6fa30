"""A user's own preference data: the same flow, a measured accuracy, a rejection."""

import io
import json
import random

import pytest
from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId

from flows.pipeline import pipeline
from flows.terminal import show_run
from rlhf.config import load_config
from rlhf.errors import ConfigError
from rlhf.files import read_json
from tasks.console import PlainConsole
from tasks.runner import store_of

pytestmark = pytest.mark.prefect

WORDS = [
    "the",
    "a",
    "river",
    "stone",
    "bright",
    "quiet",
    "walks",
    "over",
    "under",
    "seldom",
    "often",
    "green",
    "old",
    "new",
    "house",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """One store for the module: what the tests have in common is done once."""
    return tmp_path_factory.mktemp("own-data")


@pytest.fixture(scope="module")
def source(folder):
    """Rows as people have them: several pairs a prompt, lengths that vary, the longer one chosen
    in about 70 %, a chat prompt, and a few rows that can't be used.
    """
    rng = random.Random(7)
    rows = []
    for i in range(150):
        replies = [" ".join(rng.choices(WORDS, k=rng.randint(5, 40))) for _ in range(2)]
        replies.sort(key=len, reverse=rng.random() < 0.7)
        rows.append({"prompt": f"Say {i % 60}", "chosen": replies[0], "rejected": replies[1]})
    rows.append({"prompt": "Same", "chosen": "x", "rejected": "x"})
    rows.append({"prompt": " ", "chosen": "a", "rejected": "b"})
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def config(source, folder):
    def make(*overrides):
        small = [
            f"--data.source={source}", f"--store={folder / 'store'}",
            f"--runtime.work_dir={folder / 'work'}",
            f"--runtime.report_dir={folder / 'reports'}", "--runtime.threads=1",
            f"--tracking.log_dir={folder / 'logs'}",
            "--base.architecture.hidden_size=16", "--base.architecture.layers=1",
            "--base.architecture.heads=2", "--base.architecture.vocab_size=400",
            "--ppo.total_episodes=16", "--ppo.chunk_size=8", "--ppo.mini_batch_size=8",
            "--ppo.max_new_tokens=8", "--data.eval_fraction=0.3",
        ]  # fmt: skip
        return load_config("configs/preferences.yaml", [*small, *overrides]).config

    return make


def test_completes_and_tells_the_truth(config):
    free = '[{"metric": "%s", "min": 0}]'
    chosen = config(
        "--gates.reward_model", free % "accuracy", "--gates.policy", free % "sampled.eos_rate"
    )
    state = pipeline(overrides=chosen, return_state=True)
    assert state.is_completed(), state.message
    run = state.result()
    store = store_of(chosen)
    summary = read_json(store.fetch(run.refs["prepare-data"]) / "summary.json")
    assert summary["left_out"] == {"both replies are the same": 1, "prompt is empty": 1}
    assert summary["rows"] == summary["rows_used"] + 2
    (finding,) = summary["findings"]
    assert finding.startswith("The longer reply is preferred in")
    found = read_json(store.fetch(run.refs["evaluate-reward-model"]) / "evaluation.json")
    assert found["accuracy_low"] < found["accuracy"] < found["accuracy_high"]
    assert found["baseline_longer"] == pytest.approx(0.7, abs=0.15)
    assert "ceiling" not in found
    page = run.report.read_text()
    assert f"{100 * found['accuracy']:.1f}" in page
    assert f"{100 * found['baseline_longer']:.1f}" in page
    # The data card: in the page, in the terminal, and in Prefect's summary and table.
    assert finding in page
    assert "Rows left out, by reason" in page
    console = PlainConsole(file=io.StringIO(), width=60)
    show_run(console, run)
    assert f"data: {finding}" in console.file.getvalue().splitlines()
    run_id = state.state_details.flow_run_id
    with get_client(sync_client=True) as client:
        own = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run_id]))
        # Other tests share the server.
        shown = {a.key: a.data for a in client.read_artifacts(artifact_filter=own)}
    assert f"\n- Data: {finding}\n" in shown["report"]
    assert json.loads(shown["data"])[0] == {"fact": "finding", "value": finding}


def test_a_reward_model_no_better_than_length_is_rejected_when_asked(config):
    rule = (
        '[{"metric": "accuracy", "min": "baseline_longer"}, {"metric": "accuracy_low", "min": 0.6}]'
    )
    state = pipeline(overrides=config("--gates.reward_model", rule), return_state=True)
    assert state.name == "GateRejected"
    assert "accuracy_low" in state.message
    run = state.result(raise_on_failure=False)
    assert "train-policy" not in run.refs
    assert run.report.is_file()


def test_a_gate_that_so_few_pairs_can_not_pass_is_refused_before_training(config):
    rule = '[{"metric": "accuracy", "on": "low", "min": 0.9}]'
    state = pipeline(overrides=config("--gates.reward_model", rule), return_state=True)
    run = state.result(raise_on_failure=False)
    assert (state.name, isinstance(run.error, ConfigError)) == ("Failed", True)
    assert "lower end of accuracy ≥ 0.9 can't be met with 31 held-out pairs" in state.message
    assert "raise data.eval_fraction = 0.3" in state.message
    assert "train-sft" not in run.refs
    assert [row.name for row in run.rows if row.state == "Failed"] == ["check-gates"]
