"""Fixtures of the library's tests: toy models and data, PPO runs, machines."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from rlhf.data.rendering import Renderer, load_renderer
from rlhf.gates import Approved
from rlhf.modeling.base import load_policy
from rlhf.ppo.train import train_policy
from rlhf.store import Store
from rlhf.store.cache import Cache
from tests.library import toys
from tests.library.ppo_runs import Stopped
from tests.library.toy_models import toy_model
from tests.library.upload_runs import Machine, Watched
from tests.store.conftest import BUCKET, Bucket, Folder, Place


@pytest.fixture(autouse=True, scope="session")
def _one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def toy(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """Function that returns the folder of a toy model, by its name in `MAKERS`."""
    shared = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        shared = shared.parent  # common to all workers
    folder = shared / "toys"
    folder.mkdir(exist_ok=True)

    def make(name: str) -> Path:
        with FileLock(folder / "lock"):
            return toy_model(folder, name)

    return make


@pytest.fixture(scope="session")
def data(toy: Callable[[str], Path]) -> Path:
    """A dataset folder of the toy task."""
    return toy("data")


@pytest.fixture(scope="session")
def fresh(toy: Callable[[str], Path]) -> Path:
    """An untrained policy and its tokenizer: broad distributions, all kinds of tokens."""
    return toy("fresh")


@pytest.fixture
def policy(fresh: Path) -> torch.nn.Module:
    """The untrained policy, loaded."""
    return load_policy(fresh).eval().to(toys.DEVICE)


@pytest.fixture(scope="session")
def renderer(fresh: Path) -> Renderer:
    """The untrained policy's renderer; do not change it."""
    return load_renderer(fresh)


@pytest.fixture(scope="session")
def sft(toy: Callable[[str], Path]) -> Path:
    """A policy fine-tuned on good and bad replies alike."""
    return toy("sft")


@pytest.fixture(scope="session")
def reward_model(toy: Callable[[str], Path]) -> Path:
    """A reward model that likes "good" and dislikes "bad"."""
    return toy("reward")


@pytest.fixture(scope="session")
def approved(reward_model: Path) -> Approved[Path]:
    """The reward model, approved by a gate."""
    return toys.approve(reward_model)


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[Path], Path]:
    """Function that copies a model folder, for a test that damages it."""

    def copy(folder: Path) -> Path:
        return Path(shutil.copytree(folder, tmp_path / f"copy-{folder.name}"))

    return copy


@pytest.fixture
def train(data, sft, approved, tmp_path):
    """Function that runs PPO on the toy task and returns its folder."""

    def run(
        name="out",
        reward=approved,
        folder=data,
        start=sft,
        stop_at=None,
        sigterm_at=None,
        told=None,
        **options,
    ):
        out = tmp_path / name
        out.mkdir(exist_ok=True)

        def progress(step, total, metrics):
            # Called before the update is saved, so checkpoint `stop_at - 1` is the last.
            if told:
                told(step)
            if step == stop_at:
                raise Stopped
            if step == sigterm_at:
                signal.raise_signal(signal.SIGTERM)

        others = ("seed", "identity", "checkpoints", "uploads", "judge", "deadline", "clock")
        keep = {k: options.pop(k) for k in others if k in options}
        config = toys.changed(toys.PPO, **options)
        train_policy(
            config, folder, start, reward, out, runtime=toys.RUNTIME, progress=progress, **keep
        )
        return out

    return run


@pytest.fixture(scope="session")
def two_updates(data, sft, approved, tmp_path_factory):
    """Two updates of PPO on the toy task."""
    out = tmp_path_factory.mktemp("two")
    config = toys.changed(toys.PPO, total_episodes=32)
    train_policy(config, data, sft, approved, out, runtime=toys.RUNTIME)
    return out


@pytest.fixture(scope="session")
def straight(data, sft, approved, tmp_path_factory):
    """Four updates without interruption or checkpoints."""
    out = tmp_path_factory.mktemp("straight")
    train_policy(toys.PPO, data, sft, approved, out, runtime=toys.RUNTIME)
    return out


@pytest.fixture(params=["folder", pytest.param("s3", marks=pytest.mark.s3)])
def place(request, tmp_path, monkeypatch) -> Iterator[Place]:
    """A store for a run's checkpoints, with direct access to its objects."""
    if request.param == "folder":
        yield Folder(tmp_path)
        return
    for name, value in request.getfixturevalue("s3_server").environment.items():
        monkeypatch.setenv(name, value)
    import boto3  # not on a bare GPU machine

    client = boto3.client("s3")
    client.create_bucket(Bucket=BUCKET)
    yield Bucket(tmp_path, client)
    client.close()


@pytest.fixture
def machine(place, tmp_path) -> Callable[[str], Machine]:
    """Function that makes machines with a work folder each, and that store."""
    return lambda name: Machine(tmp_path / name, place.uri)


@pytest.fixture
def watched(tmp_path) -> Machine:
    """A machine whose store a test can delay."""
    machine = Machine(tmp_path / "watched", str(tmp_path / "held"))
    machine.store = Store(Watched(tmp_path / "held"), Cache(tmp_path / "watched"))
    return machine
