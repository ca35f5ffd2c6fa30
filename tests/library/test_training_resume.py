"""Resumed SFT and reward-model training equal uninterrupted ones, file by file."""

from __future__ import annotations

import itertools
import shutil
import signal
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from transformers import trainer as trainer_module
from transformers.trainer_pt_utils import LengthGroupedSampler

from rlhf.checkpoints import trainer as module
from rlhf.checkpoints.folder import checkpoints_in
from rlhf.config import LoraConfig
from rlhf.errors import ConfigError, Interrupted, TrainingError
from rlhf.reward import train_reward_model
from rlhf.sft import train_sft
from tests.library import toys
from tests.library.kills import in_child, kill_points
from tests.library.ppo_runs import Stopped
from tests.library.upload_runs import Machine, left_behind, stored, until

pytestmark = pytest.mark.cpu_only("bit-equality is promised on CPUs")
LORA = LoraConfig(r=4, alpha=16.0, dropout=0.3)
#: 6 steps an epoch: three whole ones, and the last of both stages in the midst of an epoch.
SFT = toys.changed(toys.SFT, epochs=2.5, checkpoint_minutes=0)
REWARD = toys.changed(toys.REWARD, epochs=1.5, checkpoint_minutes=0)


@dataclass
class Stage:
    """A training stage on the toy task."""

    name: str
    data: Path
    sft: Path
    folder: Path

    def train(
        self, name="out", *, stop_at=None, sigterm_at=None, told=None, seed=0, data=None, **given
    ):
        """Train, and return the folder of the result."""
        out = self.folder / name
        out.mkdir(parents=True)

        def progress(step, total, metrics):
            # Called before the step is saved, so checkpoint `stop_at - 1` is the last.
            if told and not metrics:
                told(step)
            if step == stop_at:
                raise Stopped
            if step == sigterm_at and not metrics:
                signal.raise_signal(signal.SIGTERM)

        keep = {k: given.pop(k) for k in ("checkpoints", "uploads", "identity") if k in given}
        keep |= {"runtime": toys.RUNTIME, "progress": progress, "seed": seed}
        data = data or self.data
        if self.name == "sft":
            config: Any = toys.changed(SFT, **given)
            train_sft(config, toys.BASE, data, out, **keep)
        else:
            config = toys.changed(REWARD, **given)
            train_reward_model(config, data, self.sft, out, **keep)
        return out

    @property
    def steps(self) -> int:
        return 15 if self.name == "sft" else 9


@pytest.fixture(params=["sft", "reward_model"])
def stage(request, data, sft, tmp_path) -> Stage:
    return Stage(request.param, data, sft, tmp_path)


@pytest.fixture(autouse=True)
def _sigterm_is_survived():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


def names(folder):
    return [path.name for path in checkpoints_in(folder)]


def files(folder):
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in folder.rglob("*.*")}


def assert_same(one, two):
    first, second = files(one), files(two)
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []
    assert "curve.json" in first


def test_a_run_resumed_after_any_step_is_the_same_run(stage):
    """A step within an epoch and between logs, the last of an epoch, the last of all."""
    straight = stage.train("straight")
    checkpoints = stage.folder / "c"
    for stop in (2, 4, 7, 9):
        with pytest.raises(Stopped):
            stage.train(f"stopped-{stop}", checkpoints=checkpoints, stop_at=stop)
        torch.manual_seed(12345)  # no global generator may matter
        assert names(checkpoints)[-1] == f"update-{stop - 1:06d}"
    steps = []
    assert_same(stage.train("resumed", checkpoints=checkpoints, told=steps.append), straight)
    assert steps == [*range(9, stage.steps + 1)]
    assert names(checkpoints) == [f"update-{stage.steps - i:06d}" for i in (1, 0)]
    # A finished run is only written again.
    assert_same(stage.train("again", checkpoints=checkpoints, stop_at=1), straight)


OPTIONS = {
    "dropout": {"lora": LORA, "lr_scheduler": "constant"},
    "accumulated": {
        "micro_batch_size": 4,
        "weight_decay": 0.1,
        "batch_size": 20,
        "lr_scheduler": "linear",
        "warmup_ratio": 0.4,
        "max_grad_norm": 0.1,
    },
}


@pytest.mark.parametrize("options", OPTIONS)
def test_whatever_has_a_state_is_resumed(stage, options):
    """Dropout, micro-batches, an epoch whose last batch is a smaller one, schedules."""
    changes = OPTIONS[options]
    straight = stage.train("straight", **changes)
    with pytest.raises(Stopped):
        stage.train("stopped", checkpoints=stage.folder / "c", stop_at=8, **changes)
    torch.manual_seed(12345)
    steps = []
    resumed = stage.train("on", checkpoints=stage.folder / "c", told=steps.append, **changes)
    assert steps[0] == 8
    assert_same(resumed, straight)


def test_the_order_of_rows_does_not_depend_on_dropout(stage, monkeypatch):
    """Otherwise processes with dropout would see other rows in their second epoch."""
    seen = {}
    for rate in (0.0, 0.5):
        orders = seen.setdefault(rate, [])

        class Recorded(LengthGroupedSampler):
            def __iter__(self, orders=orders):
                orders.append([*super().__iter__()])
                return iter(orders[-1])

        monkeypatch.setattr(trainer_module, "LengthGroupedSampler", Recorded)
        lora = LORA.model_copy(update={"dropout": rate})
        stage.train(f"rate-{rate}", lora=lora, epochs=2)
    assert len(seen[0.0]) == 2
    assert seen[0.0][0] != seen[0.0][1]
    assert seen[0.0] == seen[0.5]


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_kill_at_any_point_of_a_save_changes_nothing(stage):
    straight = stage.train("straight")
    begun = stage.folder / "begun"
    with pytest.raises(Stopped):
        stage.train("stopped", checkpoints=begun, stop_at=3)

    def one_save(folder, points=None):
        """Resume, save once, at step 3, and stop."""
        with kill_points(points) as passed, pytest.raises(Stopped):
            stage.train(f"{folder.name}-out", checkpoints=folder, stop_at=4)
        return passed

    points = one_save(Path(shutil.copytree(begun, stage.folder / "counted")))
    first = next(i for i, name in enumerate(points) if ".partial-update-000003" in name)
    last = max(i for i, name in enumerate(points) if "update-000001" in name)
    assert {"half of weights.safetensors", "half of state.json"} < {*points[first:last]}
    # Some of them, for each kill is a training; those of PPO's checkpoints are all tried.
    for at in range(first, last, (last - first) // 3):
        killed = Path(shutil.copytree(begun, stage.folder / f"killed-{at}"))
        assert in_child(lambda at=at, killed=killed: one_save(killed, at)) == -signal.SIGKILL
        assert names(killed)[-1] in ("update-000002", "update-000003"), points[at]
    assert_same(stage.train("resumed", checkpoints=killed), straight)


def test_sigterm_saves_and_whoever_listened_hears_it_then(stage):
    heard, told = [], []
    signal.signal(signal.SIGTERM, lambda *_: heard.append(names(stage.folder / "c")))
    with pytest.raises(Interrupted, match=rf"SIGTERM after step 4 of {stage.steps}: saved; run"):
        stage.train("a", checkpoints=stage.folder / "c", checkpoint_minutes=60, sigterm_at=4)
    assert heard == [["update-000004"]]
    straight = stage.train("straight")
    on = stage.train("on", checkpoints=stage.folder / "c", checkpoint_minutes=60, told=told.append)
    assert told[0] == 5
    assert_same(on, straight)
    # A time that has not come, and an end that needs none: there was no other save.
    assert names(stage.folder / "c") == ["update-000004"]


def test_another_identity_is_refused_by_name(stage, tmp_path):
    checkpoints = tmp_path / "c"
    with pytest.raises(Stopped):
        stage.train("a", checkpoints=checkpoints, stop_at=3)
    other = toys.write_data(tmp_path / "other", seed=1)
    for changes, name in [
        ({"data": other}, "data"), ({"learning_rate": 1e-3}, "config"), ({"seed": 5}, "seed"),
        ({"max_length": 40}, "config"), ({"identity": {"data": "two"}}, "data"),
    ]:  # fmt: skip
        with pytest.raises(ConfigError, match=f"its {name} is .*delete the folder"):
            stage.train(f"b-{len(name)}-{len(str(changes))}", checkpoints=checkpoints, **changes)
    with pytest.raises(Stopped):  # how often it saves changes nothing that is learnt
        stage.train("same", checkpoints=checkpoints, checkpoint_minutes=7, stop_at=4)


DAMAGE = {
    "weights.safetensors": [lambda b: b[:-1], lambda b: b""],
    "optimizer.safetensors": [lambda b: b[: len(b) // 2], None],
    "order.safetensors": [None],
    "trainer_state.json": [lambda b: b[:-9], lambda b: b.replace(b'"global_step": 2', b'"x": 2')],
    "state.json": [
        lambda b: b"[]", lambda b: b.replace(b'"update": 2', b'"update": 1'),
        lambda b: b.replace(b'"rates"', b'"rate"'),
    ],
}  # fmt: skip


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(stage, caplog):
    begun = stage.folder / "begun"
    with pytest.raises(Stopped):
        stage.train("stopped", checkpoints=begun, stop_at=3)
    assert names(begun) == ["update-000001", "update-000002"]
    cases = [(file, damage) for file, damages in DAMAGE.items() for damage in damages]
    for number, (file, damage) in enumerate(cases):
        folder = Path(shutil.copytree(begun, stage.folder / f"c{number}"))
        path = folder / "update-000002" / file
        path.write_bytes(damage(path.read_bytes())) if damage else path.unlink()
        steps = []
        caplog.clear()
        with pytest.raises(Stopped):
            stage.train(f"o{number}", checkpoints=folder, stop_at=2, told=steps.append)
        assert steps == [2], file
        assert f"{folder / 'update-000002'} is damaged (" in caplog.text
    for path in folder.glob("update-*/state.json"):
        path.write_text("{")
    with pytest.raises(TrainingError, match=rf"damaged.*delete {folder} to start"):
        stage.train("none", checkpoints=folder)


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_run_goes_on_on_another_machine(stage, caplog):
    straight = stage.train("straight")
    uri = str(stage.folder / "store")
    first, second = (Machine(stage.folder / name, uri) for name in ("first", "second"))

    def work():
        def die_when_sent(step):
            if step == 5:
                # Not `2 in`: where uploads are fast, later ones have replaced it already.
                until(lambda: max(stored(first.store), default=0) >= 2)
                signal.raise_signal(signal.SIGKILL)

        stage.train("killed", told=die_when_sent, **first.use())

    assert in_child(work) == -signal.SIGKILL
    newest = stored(second.store)[-1]
    steps = []
    assert_same(stage.train("resumed", told=steps.append, **second.use()), straight)
    assert steps[0] == newest + 1
    assert len(stored(second.store)) == 2
    assert left_behind(second) == []
    # SIGTERM: the last save is sent before the process ends.
    third = Machine(stage.folder / "third", str(stage.folder / "other"))
    with pytest.raises(Interrupted):
        stage.train("terminated", sigterm_at=3, checkpoint_minutes=60, **third.use())
    assert stored(third.store) == [3]


def test_a_slow_disk_is_written_to_less_often(stage, monkeypatch):
    """Between two saves passes twenty times as long as one takes."""
    clock = itertools.count(0, 10.0)  # each look at it is ten seconds later
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: next(clock)))
    written = []
    monkeypatch.setattr(
        module, "write_checkpoint", lambda folder, step, write: written.append(step) or folder
    )
    monkeypatch.setattr(module, "PAUSE", 3)
    stage.train("a", checkpoints=stage.folder / "c", checkpoint_minutes=0.2)
    # The first after 12 s; it takes 10 s, so that the next ones come after 30 s.
    assert written == [*range(2, stage.steps + 1, 3)]
