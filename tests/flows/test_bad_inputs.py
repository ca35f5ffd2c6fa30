"""A seeded sample of `python -m benchmarks.bad_inputs`, and what the campaign found."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from uuid import uuid4

import pytest
from prefect.client.orchestration import get_client
from prefect.flows import flow
from prefect.states import Suspended

from benchmarks.bad_inputs import commands, folders, worker
from benchmarks.bad_inputs.cases import Case, Outcome, problems
from flows import champions, cli
from rlhf.config import load_preset
from rlhf.errors import ArtifactMissing, RLHFError, UnexpectedError
from tasks import prefect_tasks
from tasks.prefect_tasks import TASKS

pytestmark = pytest.mark.prefect
#: Cases of each kind in the sample.
SAMPLE = {"argument": 40, "preset": 12, "value": 12, "data": 8, "store": 12}
COMMANDS = [*commands.commands()]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The campaign's folder, with smaller bombs, as the working folder of this process."""
    base = tmp_path_factory.mktemp("bad")
    original, folder = base / "original", base / "here"
    original.mkdir()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(folders, "BOMB", 70 * 2**20)
        patch.setattr(cli, "prepare_prefect", cli.prepare_prefect)  # `call` replaces it
        folders.make_folder(original)
        worker.copy_tree(original, folder)
        for name in [*os.environ]:
            if name.startswith(("PREFECT_", "AWS_", "RLHF_")) and name != "RLHF_CHECK_SHAPES":
                patch.delenv(name)
        patch.setenv("HOME", str(base / "home"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        patch.setenv("RLHF_WORK_DIR", str(base / "home" / "work"))
        patch.chdir(folder)
        yield folder


def wrong(folder, cases) -> list[str]:
    """What is wrong with the ends of cases."""
    found = []
    for case in cases:
        outcome = worker.call(folder, list(case.arguments))
        # Time and memory are the campaign's: this process is shared.
        outcome = Outcome(**{**vars(outcome), "seconds": 0.0, "megabytes": 0.0})
        found += [
            f"{case.shown}: {text}: {outcome.errors[-300:]}" for text in problems(case, outcome)
        ]
    return found


def test_a_sample_of_each_kind_ends_rightly(here):
    chance = random.Random(18)
    kinds = {
        "argument": commands.argument_cases(chance, 4), "preset": commands.preset_cases(),
        "value": commands.value_cases(chance, 2), "data": commands.data_cases(),
        "store": commands.store_cases(chance, 4),
    }  # fmt: skip
    cases = [c for kind, made in kinds.items() for c in chance.sample([*made], SAMPLE[kind])]
    assert wrong(here, cases) == []


def test_every_command_is_tried_by_itself():
    names = {command.name for command in COMMANDS}
    listed = {name for name in cli.app if not name.startswith("-")}
    assert listed <= {name.split()[0] for name in names}
    assert {"artifacts gc", "data inspect", "config show", "run", "approve"} <= names
    tried = {(c.kind, a) for c in commands.argument_cases(random.Random(0), 1) for a in c.arguments}
    assert ("arguments of approve", "--refuse=") not in tried
    assert {kind for kind, _ in tried} >= {f"arguments of {name}" for name in names}


@pytest.mark.parametrize("value", ["", " "])
def test_no_argument_may_be_empty(here, value):
    """A variable of the shell that is not set must not mean the default store or line."""
    cases = [
        Case("empty", command.line(argument.name, value), refused=True, says=(" is empty",))
        for command in COMMANDS
        for argument in command.arguments
        if argument.name != "why" and not argument.is_flag
    ]
    assert len(cases) > 80
    assert wrong(here, cases) == []
    equals = [("artifacts", "gc", "--delete", f"--store={value}"), ("champion", f"--name={value}")]
    cases = [Case("empty", words, refused=True, says=(" is empty",)) for words in equals]
    assert wrong(here, cases) == []
    # A value of the configuration may be: an empty system prompt, or pair of lists.
    kept = Case("", ("config", "show", "plain.yaml", "--data.prompt_column", value))
    assert "is empty; give a value" not in worker.call(here, list(kept.arguments)).errors


def test_of_a_store_that_is_none_nothing_is_said(here):
    chance = random.Random(0)
    cases = [c for c in commands.argument_cases(chance, 0) if c.kind == "stores that are none"]
    assert len(cases) > 20
    assert wrong(here, cases) == []


@pytest.mark.parametrize("words", ["config show", "run", "preflight", "stage train-sft"])
def test_overrides_without_a_preset_are_told_where_they_stand(here, words):
    command = words.replace("train-sft", "<stage>")
    for option in ("--ppo.kl_coef=0.2", "--rl-kl-coef=0.2"):
        said = worker.call(here, [*words.split(), option])
        assert said.code == 2
        assert (
            f"stand behind the file: rlhf {command} configs/quickstart.yaml {option}" in said.errors
        )
    said = worker.call(here, [*words.split(), "--nonsense=1"])
    assert "Unknown option: --nonsense=1; see rlhf --help" in said.errors
    said = worker.call(here, ["artifacts", "ls", "--ppo.kl_coef=0.2"])
    assert "see rlhf --help" in said.errors


def test_closed_streams_are_no_errors(tmp_path):
    """Closed, they would be the next file that is opened, and get what is printed."""
    text = (
        "import sys\nfrom flows.cli import _open_streams\n_open_streams()\n"
        "with open('made', 'w') as file:\n    print('words', flush=True)\n"
        "    print(file.fileno(), file=file)\n"
    )
    for closed in ("<&- >&- 2>&-",):
        command = f'"{sys.executable}" -c "$0" {closed}'
        done = subprocess.run(
            ["/bin/bash", "-c", command, text], cwd=tmp_path, capture_output=True, text=True,
            check=False, env={**os.environ, "PYTHONPATH": ":".join(filter(None, sys.path))},
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
        assert int((tmp_path / "made").read_text()) > 2


@flow(name="rlhf-pipeline")
def empty():
    """A pipeline that only has to be known to the server."""


def test_only_a_run_that_is_named_is_approved():
    with get_client(sync_client=True) as client:
        name = f"r{uuid4().hex[:8]}"
        run = client.create_flow_run(empty, name=name)
        client.set_flow_run_state(run.id, Suspended(message="for ann"), force=True)
        for text in ("", str(run.id)[:1], str(run.id)[: champions.LEAST_ID - 1], name[:4]):
            with pytest.raises(ArtifactMissing, match="waits for an approval") as caught:
                champions._suspended(text)
            assert f"{name} ({str(run.id)[:8]})" in str(caught.value)
        for text in (name, str(run.id)[:8], str(run.id)[:8].upper()):
            assert champions._suspended(text).id == run.id


@pytest.mark.parametrize(
    ("raised", "kind", "text"),
    [
        (ValueError("a\nb"), UnexpectedError, "ValueError: a b"),
        (MemoryError(), UnexpectedError, "lower batch sizes"),
        (OSError(28, "No space left", "/x"), UnexpectedError, "/x: No space left"),
        (RLHFError("mend x"), RLHFError, "mend x"),
    ],
)
def test_a_stages_task_says_what_is_wrong_in_one_line(monkeypatch, raised, kind, text):
    def fail(*_, **__):
        raise raised

    monkeypatch.setattr(prefect_tasks, "run_stage", fail)
    config = load_preset(None, {"retries": {"attempts": 0}}).config
    stage = next(iter(TASKS))

    ended = []

    @flow(name="one-stage")
    def whole():
        ended.append(TASKS[stage](config, {}, {}, return_state=True))

    whole()
    error = ended[0].result(raise_on_failure=False)
    assert isinstance(error, kind)
    assert text in str(error)
    assert text in ended[0].message
    assert "\n" not in ended[0].message
