"""Training stages on two machines with a common store."""

from __future__ import annotations

import logging
import os
import shutil
import signal
from pathlib import Path
from types import MappingProxyType

import pytest

from rlhf.config import PipelineConfig
from rlhf.errors import StoreError
from tasks import stages
from tasks.runner import run_stage, store_of
from tasks.stages import STAGES
from tests.flows.conftest import tiny_tree
from tests.library.kills import in_child
from tests.library.upload_runs import until

NAME = "train-policy"


def configured(folder, store, work, changes=MappingProxyType({}), **runtime):
    # One thread: a forked process can't use the threads of its parent.
    runtime = {"work_dir": str(folder / work), "device": "cpu", "threads": 1, **runtime}
    tree = {**tiny_tree(folder), "store": str(store), "runtime": runtime}
    for section in ("sft", "reward_model"):
        tree[section] |= changes
    return PipelineConfig.model_validate(tree)


@pytest.fixture(scope="module")
def ready(tmp_path_factory):
    """A store with all that PPO needs, the inputs, and the artifacts of the stages before."""
    folder = tmp_path_factory.mktemp("ready")
    config, refs = configured(folder, folder / "store", "work"), {}
    for name, stage in STAGES.items():
        inputs = {role: refs[producer] for role, producer in stage.needed_inputs(config).items()}
        if name == NAME:
            return folder / "store", inputs, refs
        refs[name] = run_stage(stage, config, inputs).ref
    raise AssertionError


@pytest.fixture
def machine(ready, tmp_path):
    """Configurations of machines with one store, a copy of that one."""
    store = shutil.copytree(ready[0], tmp_path / "store")
    return lambda name, **runtime: configured(tmp_path, store, name, **runtime)


def train(config, inputs, progress=lambda *_: None):
    return run_stage(STAGES[NAME], config, inputs, progress)


def below(config):
    """The folders of the stores for checkpoints."""
    return [*Path(config.store).glob("checkpoints/*")]


def files(folder):
    return [path for path in folder.rglob("*") if path.is_file()]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_run_whose_machine_is_gone_ends_elsewhere_with_the_same_artifact(
    ready, machine, tmp_path, caplog
):
    alone = machine("alone", upload_checkpoints=False)
    wanted = train(alone, ready[1]).ref
    shutil.rmtree(tmp_path / "store")
    shutil.copytree(ready[0], tmp_path / "store")
    first, second = machine("first"), machine("second")

    def work():
        def progress(step, total, metrics):
            if step == total:
                until(lambda: [*Path(first.store).glob("checkpoints/*/refs/checkpoints/*.json")])
                os.kill(os.getpid(), signal.SIGKILL)

        train(first, ready[1], progress)

    assert in_child(work) == -signal.SIGKILL
    (stored,) = below(first)
    local = next((tmp_path / "first" / "checkpoints").iterdir())
    assert stored.name == local.name
    steps = []
    with caplog.at_level(logging.INFO, "rlhf"):
        outcome = train(second, ready[1], lambda step, *_: steps.append(step))
    assert not outcome.cached
    assert outcome.ref == wanted
    assert steps[0] > 1
    assert f"checkpoint of update {steps[0] - 1} comes from {stored.as_uri()}" in caplog.messages
    # Only the best is left in the store, and nothing on this machine, nor, after its next run, on
    # the first.
    assert len([*stored.glob("manifests/*")]) == 1
    left = {path.name for path in (tmp_path / "second").iterdir() if path.suffix != ".lock"}
    assert left == {"cache", "checkpoints"}
    assert files(tmp_path / "second" / "checkpoints") == []
    assert local.exists()
    assert train(first, ready[1]).cached
    assert not local.exists()


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("name", ["train-sft", "train-reward-model", "train-judge"])
def test_so_does_every_other_training(ready, tmp_path, name):
    """From where it was killed; another rate than that of the recorded work trains anew."""
    stage, places = STAGES[name], ("first", "second", "alone")
    changes = {"learning_rate": 2e-3, "checkpoint_minutes": 0}
    stores = [Path(shutil.copytree(ready[0], tmp_path / to)) for to in ("shared", "other")]
    first, second, alone = (
        configured(tmp_path, stores[place == "alone"], place, changes) for place in places
    )
    inputs = {role: ready[2][of] for role, of in stage.needed_inputs(first).items()}

    def work():
        def progress(step, total, metrics):
            if step == 2:
                until(lambda: [*stores[0].glob("checkpoints/*/refs/checkpoints/*.json")])
                os.kill(os.getpid(), signal.SIGKILL)

        run_stage(stage, first, inputs, progress)

    assert in_child(work) == -signal.SIGKILL
    (stored,) = below(first)
    assert stored.name.startswith(f"{name}-")
    steps = []
    outcome = run_stage(stage, second, inputs, lambda step, *_: steps.append(step))
    assert steps[0] > 1
    assert outcome.ref.digest == run_stage(stage, alone, inputs).ref.digest
    # A finished training leaves no checkpoint.
    assert [*stored.glob("manifests/*")] == []
    assert files(tmp_path / "second" / "checkpoints") == []


def test_a_training_that_may_not_save_does_not(ready, tmp_path):
    changes = {"learning_rate": 3e-3, "checkpoint_minutes": None}
    config = configured(tmp_path, ready[0], "none", changes)
    there, inputs = [], {"data": ready[2]["prepare-data"]}
    run_stage(
        STAGES["train-sft"], config, inputs,
        lambda *_: there.append((tmp_path / "none" / "checkpoints").exists()),
    )  # fmt: skip
    assert {*there} == {False}


def test_without_uploads_nothing_is_sent(ready, machine):
    config = machine("m", upload_checkpoints=False)
    seen = []
    train(config, ready[1], lambda *_: seen.append(below(config)))
    assert seen == [[]] * 4


def test_what_can_not_be_wiped_is_a_warning(ready, machine, monkeypatch, caplog):
    def fail(store):
        raise StoreError("busy")

    monkeypatch.setattr(stages, "keep_best", fail)
    config = machine("m")
    assert store_of(config).exists(train(config, ready[1]).ref)
    assert "are no longer needed, but stay (busy)" in caplog.text
