"""Atomic checkpoints: whole or absent after a kill at any point of the save."""

from __future__ import annotations

import logging
import re
import resource
import shutil
import signal
import threading

import pytest
import torch

from rlhf.checkpoints import folder as folders
from rlhf.checkpoints.folder import checkpoints_in, exclusive
from rlhf.data.rows import PROMPTS_TRAIN, PromptRow, read_rows
from rlhf.errors import CheckpointError, ConfigError, TrainingError, is_retriable
from rlhf.files import read_json
from rlhf.ppo.checkpoint import TrainState, load_checkpoint, save_checkpoint
from rlhf.ppo.frontier import Frontier, Look
from rlhf.ppo.train import build_trainer, prompts_of_update
from tests.library import toys
from tests.library.kills import in_child, kill_points
from tests.library.ppo_runs import EVERYTHING

pytestmark = pytest.mark.device
CONFIG = toys.changed(toys.PPO, **EVERYTHING)
WHO = {"base": "one"}


@pytest.fixture(scope="module")
def trainer(data, sft, approved):
    rows = read_rows(data / PROMPTS_TRAIN, PromptRow)
    return build_trainer(CONFIG, sft, approved, 0, toys.DEVICE, rows)


@pytest.fixture(scope="module")
def saved(trainer, data, tmp_path_factory):
    """Folders with the checkpoints of updates 1, 2 and 3; the trainer is left at update 3."""
    rows, folder = read_rows(data / PROMPTS_TRAIN, PromptRow), tmp_path_factory.mktemp("saved")
    for number in (1, 2, 3):
        trainer.update(number - 1, prompts_of_update(rows, number - 1, CONFIG, 0))
        save(trainer, folder / str(number), number)
    return folder


@pytest.fixture
def folder(saved, tmp_path):
    """A run's folder with the checkpoints of updates 1 and 2."""
    for number in (1, 2):
        shutil.copytree(saved / str(number), tmp_path / "c", dirs_exist_ok=True)
    return tmp_path / "c"


def save(trainer, folder, number):
    """With a look of the watchdog, whose weights are others than the present ones."""
    policy = trainer.models.parameters["policy"]
    state = TrainState(
        number, [{"kl": 1.0}] * number, [], trainer.state_dict(),
        frontier=Frontier([Look(0, kl=0.0, entropy=1.0, tokens=3.0, eos_rate=1.0)]),
        retained={name: torch.full_like(p, number + 0.5) for name, p in policy.items()},
    )  # fmt: skip
    return save_checkpoint(folder, state, trainer.models, WHO)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def names(folder):
    return [path.name for path in checkpoints_in(folder)]


def spoil(path, text):
    path.write_bytes(text)


# --- kills ------------------------------------------------------------------------------------


@pytest.mark.cpu_only("a forked process has no accelerator")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_kill_at_any_point_of_a_save_leaves_the_newest_checkpoint_whole(
    trainer, saved, folder, tmp_path
):
    (folder / ".partial-update-000002").mkdir()  # an earlier kill's, to be cleared away
    (folder / ".partial-update-000002" / "state.json").write_text("{")
    wanted = {n: contents(saved / str(n) / f"update-{n:06d}") for n in (1, 2, 3)}
    counted = shutil.copytree(folder, tmp_path / "counted")
    with kill_points() as points:
        save(trainer, counted, 3)
    assert len(points) > 40
    halves = ("state.json", "optimizer-critic.safetensors", "retained.safetensors")
    assert {f"half of {name}" for name in halves} < {*points}
    ends = []
    for at in range(len(points)):
        killed = shutil.copytree(folder, tmp_path / str(at))

        def work(at=at, killed=killed):
            with kill_points(at):
                save(trainer, killed, 3)

        assert in_child(work) == -signal.SIGKILL
        left = checkpoints_in(killed)
        assert len(left) >= 2 or left[-1].name == "update-000003"
        for path in left:
            assert contents(path) == wanted[int(path.name[-1])], points[at]
        ends.append(left[-1].name)
        save(trainer, killed, 3)  # what the resumed run does
        assert names(killed) == ["update-000002", "update-000003"]
        assert not list(killed.glob(".partial-*"))
    # The new one is there from one point on, and for good.
    assert ends == sorted(ends)
    assert {*ends} == {"update-000002", "update-000003"}


def test_everything_is_on_the_disk_before_the_name_is(trainer, saved, folder):
    """After a power cut a folder may be there whose files are empty: the order forbids it."""
    with kill_points() as points:
        save(trainer, folder, 3)
    partial = str(folder / ".partial-update-000003")
    synced = {p.removeprefix("open ") for p in points[: points.index(f"replace {partial}")]}
    files = {f"{partial}/{path.name}" for path in (folder / "update-000003").iterdir()}
    assert {*files, partial} < synced
    assert f"open {folder}" in points[points.index(f"replace {partial}") :]


# --- a disk that is full, or spoils what it holds -------------------------------------------------


def test_a_full_disk_is_said_and_spares_the_earlier_checkpoints(trainer, saved, folder):
    before = {path.name: contents(path) for path in checkpoints_in(folder)}
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    for size in (100, 4096):  # state.json is longer than the one, the weights than the other
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, limits[1]))
        try:
            with pytest.raises(CheckpointError) as caught:
                save(trainer, folder, 3)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        said = r"update-000003: can't be written \(.*too large.*update-000002 is whole; mend"
        assert re.search(said, str(caught.value)), caught.value
        assert is_retriable(caught.value)
        assert {path.name: contents(path) for path in checkpoints_in(folder)} == before
    save(trainer, folder, 3)
    assert names(folder) == ["update-000002", "update-000003"]


@pytest.mark.parametrize(
    ("file", "damage", "said"),
    [
        ("policy.safetensors", lambda b: b[:-1], "policy.safetensors: "),
        ("critic.safetensors", lambda b: b"", "critic.safetensors: "),
        ("optimizer-critic.safetensors", lambda b: b[: len(b) // 2], "optimizer-critic.saf"),
        ("optimizer-policy.safetensors", None, "optimizer-policy.safetensors"),
        ("retained.safetensors", lambda b: b[:-1], "retained.safetensors: "),
        ("state.json", lambda b: b[: len(b) // 2], ""),
        ("state.json", lambda b: b"\xff\x00", ""),
        ("state.json", lambda b: b"[]", ""),
        ("state.json", lambda b: b.replace(b'"update": 2', b'"update": 1'), "is of update 1"),
        ("state.json", lambda b: b.replace(b'"curve"', b'"curves"'), "curves"),
        ("state.json", None, "state.json"),
    ],
)
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    trainer, saved, folder, caplog, file, damage, said
):
    path = folder / "update-000002" / file
    spoil(path, damage(path.read_bytes())) if damage else path.unlink()
    with caplog.at_level(logging.WARNING, "rlhf"):
        state = load_checkpoint(folder, trainer.models, WHO)
    assert state.update == 1
    assert f"{folder / 'update-000002'} is damaged (" in caplog.text
    assert "taking the one before it" in caplog.text
    assert said in caplog.text
    trainer.load_state_dict(state.trainer)
    again = save(trainer, folder, 1)
    assert contents(again) == contents(saved / "1" / "update-000001")
    # The damaged one is gone, so that it takes the place of no whole one.
    assert names(folder) == ["update-000001"]


def test_weights_of_another_model_are_damage(trainer, saved, folder, caplog):
    two = folder / "update-000002"
    shutil.copy(two / "critic.safetensors", two / "policy.safetensors")
    assert load_checkpoint(folder, trainer.models, WHO).update == 1
    assert "policy.safetensors holds other tensors than the model" in caplog.text


def test_with_no_whole_checkpoint_it_does_not_start_afresh_unasked(trainer, saved, folder):
    for path in checkpoints_in(folder):
        spoil(path / "state.json", b"{")
    before = [p.detach().clone() for p in trainer.models.parameters["policy"].values()]
    with pytest.raises(TrainingError, match=rf"update-000002: damaged.*delete {folder} to start"):
        load_checkpoint(folder, trainer.models, WHO)
    after = trainer.models.parameters["policy"].values()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))


# --- a folder's other inhabitants -----------------------------------------------------------------


def test_only_checkpoints_are_taken_for_checkpoints_and_by_number(tmp_path):
    for name in ("update-999999", "update-1000000", "update-000002", "update-000002.bak",
                 "update-notes", "update-", ".partial-update-000003"):  # fmt: skip
        (tmp_path / name).mkdir()
    assert names(tmp_path) == ["update-000002", "update-999999", "update-1000000"]


def test_two_processes_on_one_folder_are_one_too_many(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LOCK_TIMEOUT", 0.1)
    folder, inside, done = tmp_path / "c", threading.Event(), threading.Event()

    def other():
        with exclusive(folder):
            inside.set()
            done.wait(900)

    thread = threading.Thread(target=other)
    thread.start()
    assert inside.wait(900)
    try:
        with (
            pytest.raises(ConfigError, match="another process trains with this folder"),
            exclusive(folder),
        ):
            pass
    finally:
        done.set()
        thread.join()
    with exclusive(folder):
        pass


def test_training_takes_the_folder_for_itself(train, tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "LOCK_TIMEOUT", 0.1)
    with exclusive(tmp_path / "c"), pytest.raises(ConfigError, match="another process"):
        train("a", checkpoints=tmp_path / "c")


def test_what_is_loaded_is_what_was_saved(trainer, saved, folder):
    """State, weights and optimisers, byte for byte."""
    state = load_checkpoint(folder, trainer.models, WHO)
    trainer.load_state_dict(state.trainer)
    assert state.trainer["kl_controller"]
    assert state.trainer == read_json(folder / "update-000002" / "state.json")["trainer"]
    again = save_checkpoint(folder.with_name("again"), state, trainer.models, WHO)
    assert contents(again) == contents(folder / "update-000002")
