"""The Python API: runs, stages and models as objects; pages of docs/ and a notebook, executed."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import signal
import subprocess
import sys
import warnings
from html import unescape
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from prefect.settings import PREFECT_API_URL

import rlhf
from rlhf.config import load
from rlhf.errors import ArtifactMissing, ConfigError, NoPreferences
from tasks.stages import STAGES
from tests.flows.python_project import DOCS, make_project, run_page

pytestmark = pytest.mark.prefect
ROOT = DOCS.parent
NOTEBOOK = DOCS / "notebooks" / "quickstart.ipynb"
#: Stages that a run with another KL coefficient takes from the first run's store.
BEFORE_PPO = [*STAGES][: [*STAGES].index("train-policy")]


@pytest.fixture(scope="session")
def notebook(first_run, tmp_path_factory):
    """The example notebook, executed by a kernel of its own in a user's folder."""
    folder = tmp_path_factory.mktemp("notebook")
    policy = first_run.result.refs["train-policy"].digest
    presets = make_project(folder, first_run.store, policy)
    whole = nbformat.read(NOTEBOOK, as_version=4)
    tiny = (
        "from pathlib import Path\nimport rlhf.config.load as load\n"
        f"load.PRESETS = Path({str(presets)!r})"
    )
    whole.cells.insert(0, nbformat.v4.new_code_cell(tiny))
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", str(ROOT))
        patch.setenv("IPYTHONDIR", str(folder / "ipython"))
        patch.setenv("JUPYTER_RUNTIME_DIR", str(folder / "jupyter"))
        patch.setenv("PREFECT_API_URL", PREFECT_API_URL.value())
        client = NotebookClient(whole, timeout=900, resources={"metadata": {"path": str(folder)}})
        try:
            client.execute()
        finally:
            nbformat.write(whole, folder / "executed.ipynb")  # to look at after a failure
    return folder, whole.cells[1:]


@pytest.fixture
def project(notebook, monkeypatch):
    """The notebook's folder, as the current one of this process."""
    folder, _ = notebook
    monkeypatch.setattr(load, "PRESETS", folder / "presets")
    monkeypatch.chdir(folder)
    return folder


def outputs(cells, source):
    (cell,) = [c for c in cells if c.cell_type == "code" and source in c.source]
    return cell.outputs


def test_the_notebook_runs_in_its_kernels_event_loop(notebook):
    _, cells = notebook
    (made,) = outputs(cells, "pipeline = Pipeline")
    assert made.data["text/plain"].startswith("<Pipeline quickstart: store .rlhf/store")
    progress = outputs(cells, "pipeline.run()")
    assert {(out.output_type, out.name) for out in progress} == {("stream", "stdout")}
    text = "".join(out.text for out in progress)
    assert "\x1b" not in text
    assert "\r" not in text
    lines = text.splitlines()
    for name in STAGES:
        state = "Cached" if name in BEFORE_PPO else "Completed"
        assert [line for line in lines if line.startswith(f"{name}: {state}")], (name, text)
    assert "train-policy: 4/4" in text
    assert lines[-1].startswith("Promoted: ")


def test_the_notebook_shows_report_figures_and_replies(notebook):
    _, cells = notebook
    (shown,) = outputs(cells, "run.report")
    frame = shown.data["text/html"]
    assert re.match(r"<iframe sandbox [^>]*srcdoc=", frame)
    assert frame.count("<") == 2  # no tag of the page leaves the attribute
    page = unescape(frame)
    assert "<h1" in page
    assert "Promoted" in page
    assert "<script" not in page
    (rate,) = outputs(cells, "sampled.win_rate")
    assert 0 <= float(rate.data["text/plain"]) <= 1
    replies = "".join(out.text for out in outputs(cells, "policy.generate"))
    assert len(replies.splitlines()) == 2


def test_the_notebook_is_committed_without_outputs():
    for cell in json.loads(NOTEBOOK.read_text())["cells"]:
        assert not cell.get("outputs")
        assert cell.get("execution_count") is None


def test_the_page_of_the_api_does_what_it_says(project):
    names = run_page("python.md")
    run = names["run"]
    # The notebook's run of the same configuration: nothing is done twice.
    assert {end.state for end in run.stages.values()} == {"Cached"}
    assert run.report.path.is_relative_to(project)
    assert (
        run.metrics["reward_model"]["accuracy"]
        == run.stages["evaluate-reward-model"].metrics["accuracy"]
    )
    assert len(run.samples) >= 2
    assert str(run).splitlines()[-1] == f"Promoted: {run.reason}"
    rejected = names["rejected"]
    assert [*rejected.stages][-1] == "promote"
    assert rejected.stages["promote"].artifact is None
    with pytest.raises(ArtifactMissing, match="promote made nothing: NotRun"):
        _ = rejected.stages["promote"].folder
    # A rejected policy may be looked at.
    assert rejected.policy.digest == rejected.stages["train-policy"].artifact
    assert [len(reply) > 0 for reply in names["replies"]] == [True, True]


def test_the_page_of_building_blocks_does_what_it_says(project):
    run_page("building-blocks.md")


def test_a_run_inside_an_event_loop_and_what_it_leaves(project, capsys):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    logger = logging.getLogger("rlhf")
    before = [*logger.handlers], logger.level, [*warnings.filters]

    pipeline = rlhf.Pipeline("quickstart", ppo={"kl_coef": 0.05})  # as the notebook has it

    async def cell():
        return pipeline.run()

    run = asyncio.run(cell())
    assert run.ok
    lines = capsys.readouterr().out.splitlines()
    assert "train-sft: Cached" in " ".join(lines)
    assert lines[-1] == f"{run.outcome}: {run.reason}"
    assert ([*logger.handlers], logger.level, [*warnings.filters]) == before
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert pipeline.run(quiet=True).ok
    assert capsys.readouterr().out == ""


def test_a_failed_run_raises_its_error_and_names_the_report(project):
    (project / "bad.jsonl").write_text('{"prompt": "tea?"}\n' * 3)
    own = {"source": "bad.jsonl", "world": {"pairs": 64}}
    with pytest.raises(NoPreferences) as error:
        rlhf.Pipeline("quickstart", data=own, evaluation={"judge": "none"}).run(quiet=True)
    (note,) = error.value.__notes__
    assert Path(note.removeprefix("report: ")).is_file()


def test_a_stage_alone_needs_what_comes_before(project):
    with pytest.raises(ArtifactMissing, match="is no stage; choose one of prepare-data, "):
        rlhf.Pipeline("quickstart").stage("train-sfd")
    with pytest.raises(ArtifactMissing, match="data is missing: prepare-data has not run"):
        rlhf.Pipeline("quickstart", seed=9).stage("train-sft", quiet=True)
    pipeline = rlhf.Pipeline("quickstart")
    data = pipeline.stage("prepare-data", quiet=True)
    assert pipeline.stage("train-sft", inputs={"data": data}, quiet=True).state == "Cached"
    rules = [{"metric": "accuracy", "min": 1.0}]
    strict = rlhf.Pipeline("quickstart", gates={"reward_model": rules})
    end = strict.stage("gate-reward-model", quiet=True)
    assert (end.state, end.artifact) == ("GateRejected", None)
    assert "accuracy" in end.summary


def test_preflight_finds_what_would_stop_a_run(project):
    assert rlhf.Pipeline("quickstart").preflight() == ()
    with pytest.raises(ConfigError, match=r"none\.jsonl"):
        rlhf.Pipeline("quickstart", data={"source": "none.jsonl"}).preflight()


def test_mistakes_in_names_prompts_and_settings(project):
    policy = rlhf.Policy("champion:quickstart")
    greedy = {"temperature": 0, "max_new_tokens": 8}
    same = rlhf.Policy(policy.folder).generate("tea?", **greedy)
    assert same == policy.generate("tea?", **greedy)
    assert policy.generate([]) == []
    for prompt in (
        5,
        "",
        " ",
        {},
        [["a"]],
        [{"role": "user"}],
        [{"role": "user", "content": 1}],
    ):
        with pytest.raises(ConfigError, match="give a text, a list of messages"):
            policy.generate(prompt)
    for settings, said in (
        ({"temprature": 1}, "temprature is no setting of sampling; did you mean temperature?"),
        ({"temperature": -1}, "temperature = -1: must be at least 0"),
        ({"max_new_tokens": 0}, "max_new_tokens = 0: must be at least 1"),
        ({"top_p": 2}, "top_p = 2: must be at most 1"),
    ):
        with pytest.raises(ConfigError) as error:
            policy.generate("tea?", **settings)
        assert str(error.value) == said
    with pytest.raises(ArtifactMissing, match="no champion of the line other"):
        rlhf.Policy(config={"promotion": {"name": "other"}})
    with pytest.raises(ConfigError, match="is a policy, and a score needs a reward model"):
        rlhf.RewardModel(str(policy.digest))


def test_public_names_are_found_and_import_nothing_heavy():
    assert [getattr(rlhf, name).__name__ for name in rlhf.PUBLIC] == [*rlhf.PUBLIC]
    assert {*rlhf.PUBLIC} <= {*dir(rlhf)}
    with pytest.raises(AttributeError, match="no attribute 'Pipelin'"):
        _ = rlhf.Pipelin
    code = (
        "import sys, rlhf; light = {*sys.modules}; from rlhf import Pipeline; "
        "Pipeline('quickstart'); heavy = {'torch', 'prefect', 'transformers', 'trl'}; "
        "print(heavy & {*sys.modules}, 'pydantic' in light)"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, check=True, stdout=subprocess.PIPE
    )
    assert done.stdout == b"set() False\n"
