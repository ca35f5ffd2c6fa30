"""Weights in several files: read by everything that loads a model or a checkpoint."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file

from rlhf.config import EvaluationConfig, LoraConfig
from rlhf.data.rows import PROMPTS_TRAIN, PromptRow, read_rows
from rlhf.errors import ConfigError
from rlhf.evaluation import evaluate_policy
from rlhf.modeling import weights
from rlhf.modeling.base import load_policy
from rlhf.modeling.reward import Scorer
from rlhf.modeling.source import ExternalModel
from rlhf.modeling.weights import save_tensors, shards_of, weights_digest
from rlhf.ppo.checkpoint import TrainState, load_checkpoint, save_checkpoint
from rlhf.ppo.train import build_trainer
from rlhf.ready_reward_model import publish_ready_reward_model
from tests.library import toys
from tests.library.ppo_runs import EVERYTHING, LORA, Stopped

pytestmark = pytest.mark.device


WHOLE = "model.safetensors"


INDEX = f"{WHOLE}.index.json"


WHO = {"base": "one"}


SMALL = 5000


PROMPTS, REPLIES = ["tea or cup?", "jar or mug?"], ["good", "bad bad"]


@pytest.fixture
def small(monkeypatch):
    monkeypatch.setattr(weights, "MAX_SHARD", SMALL)


def split(folder):
    """Whether a model's folder has it in shards alone, each within the limit or of one tensor."""
    files = [load_file(path) for path in folder.glob("model-*-of-*.safetensors")]
    for tensors in files:
        assert sum(t.nbytes for t in tensors.values()) <= SMALL or len(tensors) == 1
    return len(files) > 1 and (folder / INDEX).is_file() and not (folder / WHOLE).exists()


def logits(folder):
    with torch.no_grad():
        ids = torch.arange(20, device=toys.DEVICE)[None]
        return load_policy(folder).eval().to(toys.DEVICE)(ids).logits


def scores(folder):
    return Scorer(folder, toys.DEVICE, 48)(PROMPTS, REPLIES)


@pytest.fixture
def trainings():
    """The stages that TRL trains: SFT and reward model."""
    pytest.importorskip("trl")
    from rlhf.reward import train_reward_model
    from rlhf.sft import train_sft

    return train_sft, train_reward_model


def test_every_stage_writes_and_reads_shards(
    small, trainings, data, sft, reward_model, two_updates, tmp_path, train
):
    """Trained alike and only written otherwise, so all that is computed from them is equal."""
    train_sft, train_reward_model = trainings
    ours = {name: tmp_path / name for name in ("sft", "reward", "adopted", "a", "b")}
    for folder in ours.values():
        folder.mkdir()
    train_sft(toys.SFT, toys.BASE, data, ours["sft"], runtime=toys.RUNTIME)
    assert split(ours["sft"])
    assert torch.equal(logits(ours["sft"]), logits(sft))
    train_reward_model(toys.REWARD, data, ours["sft"], ours["reward"], runtime=toys.RUNTIME)
    assert split(ours["reward"])
    assert torch.equal(scores(ours["reward"]), scores(reward_model))
    ready = ExternalModel("ppo.reward_model_path", str(ours["reward"]), ready=True)
    ready.check()
    publish_ready_reward_model(
        ready, ready.fetch(tmp_path).folder, ours["adopted"], runtime=toys.RUNTIME
    )
    assert split(ours["adopted"])
    assert torch.equal(scores(ours["adopted"]), scores(reward_model))
    policy = train(start=ours["sft"], reward=toys.approve(ours["adopted"]), total_episodes=32)
    assert split(policy)
    assert torch.equal(logits(policy), logits(two_updates))
    config = EvaluationConfig(judge="none", samples=1)
    for out, (start, end, judge) in (
        (ours["a"], (ours["sft"], policy, ours["adopted"])),
        (ours["b"], (sft, two_updates, reward_model)),
    ):
        evaluate_policy(config, toys.PPO, data, start, end, judge, out, runtime=toys.RUNTIME)
    written = [(ours[name] / "evaluation.json").read_bytes() for name in "ab"]
    assert written[0] == written[1]


def test_a_shared_base_may_be_sharded(small, trainings, data, sft, tmp_path):
    """The adapter knows its base by all of its shards."""
    train_reward_model = trainings[1]
    base, reward = shutil.copytree(sft, tmp_path / "base"), tmp_path / "reward"
    weights.save_model(load_policy(sft), base)
    (base / WHOLE).unlink()
    assert split(base)
    config = toys.changed(toys.REWARD, lora=LoraConfig(r=2, alpha=8.0))
    reward.mkdir()
    train_reward_model(config, data, base, reward, runtime=toys.RUNTIME)
    assert split(reward)
    shared = toys.changed(toys.PPO, shared_base=True, lora=LORA)
    build_trainer(shared, base, toys.approve(reward), 0, toys.DEVICE)
    last = sorted(base.glob("model-*"))[-1]
    tensors = load_file(last)
    next(iter(tensors.values())).view(-1)[0] += 1
    before = weights_digest(base)
    save_file(tensors, last, {"format": "pt"})
    assert weights_digest(base) != before
    with pytest.raises(ConfigError, match="is for a base with weights"):
        build_trainer(shared, base, toys.approve(reward), 0, toys.DEVICE)


def test_a_missing_shard_of_a_model_is_said(small, sft, tmp_path):
    weights.save_model(load_policy(sft), tmp_path)
    sorted(tmp_path.glob("model-*"))[0].unlink()
    with pytest.raises(ConfigError, match="of the 4 files in its model"):
        load_policy(tmp_path)


def test_only_what_is_too_large_is_split(monkeypatch, tmp_path):
    tensors = {name: torch.full((n,), float(n)) for name, n in (("a", 2), ("b", 2), ("c", 9))}
    for limit, files in ((1000, 1), (52, 1), (51, 2), (16, 2), (15, 3), (1, 3)):
        monkeypatch.setattr(weights, "MAX_SHARD", limit)
        folder = tmp_path / str(limit)
        folder.mkdir()
        save_tensors(tensors, folder, "x")
        paths = shards_of(folder, "x")
        assert sorted(folder.iterdir()) == paths
        assert len(paths) == files
        assert (paths[0].name == "x.safetensors") == (files == 1)
        loaded = {k: t for path in paths for k, t in load_file(path).items()}
        assert loaded.keys() == tensors.keys()
        assert all(torch.equal(loaded[k], t) for k, t in tensors.items())
    save_tensors({}, tmp_path, "none")
    assert [path.name for path in shards_of(tmp_path, "none")] == ["none.safetensors"]


def test_the_limit_is_2_gb():
    assert weights.MAX_SHARD <= 2 * 10**9


# --- checkpoints ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trainer(data, sft, approved):
    rows = read_rows(data / PROMPTS_TRAIN, PromptRow)
    config = toys.changed(toys.PPO, **EVERYTHING)
    trainer = build_trainer(config, sft, approved, 0, toys.DEVICE, rows)
    for number in (0, 1):
        trainer.update(number, rows[:16])
    return trainer


def save(trainer, folder, number):
    return save_checkpoint(folder, TrainState(number, [], [], {}), trainer.models, WHO)


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def test_a_checkpoint_in_shards_is_the_same_checkpoint(trainer, tmp_path, monkeypatch):
    """And one in single files, as older versions wrote it, can be read with any limit."""
    whole = save(trainer, tmp_path / "whole", 2)
    assert [*whole.glob("*-of-*")] == []
    monkeypatch.setattr(weights, "MAX_SHARD", 500)
    parts = save(trainer, tmp_path / "parts", 2)
    for name in ("policy", "critic", "optimizer-policy", "optimizer-critic"):
        assert len([*parts.glob(f"{name}-0*-of-*")]) > 1
        assert not (parts / f"{name}.safetensors").exists()
    for source, limit, wanted in ((parts, 10**9, whole), (whole, 500, parts)):
        with torch.no_grad():
            for parameters in trainer.models.parameters.values():
                for p in parameters.values():
                    p.zero_()
        load_checkpoint(source.parent, trainer.models, WHO)
        monkeypatch.setattr(weights, "MAX_SHARD", limit)
        again = save(trainer, tmp_path / f"again-{limit}", 2)
        assert contents(again) == contents(wanted)


@pytest.mark.parametrize("name", ["policy", "critic", "optimizer-policy", "optimizer-critic"])
@pytest.mark.parametrize("which", [0, -1])
@pytest.mark.parametrize("damage", ["gone", "cut"])
def test_a_damaged_shard_is_a_damaged_checkpoint(
    trainer, tmp_path, monkeypatch, caplog, name, which, damage
):
    monkeypatch.setattr(weights, "MAX_SHARD", 500)
    save(trainer, tmp_path, 1)
    newest = save(trainer, tmp_path, 2)
    victim = sorted(newest.glob(f"{name}-*"))[which]
    victim.write_bytes(victim.read_bytes()[:-1]) if damage == "cut" else victim.unlink()
    with caplog.at_level(logging.WARNING, "rlhf"):
        assert load_checkpoint(tmp_path, trainer.models, WHO).update == 1
    assert f"{newest} is damaged ({name}" in caplog.text
    assert (victim.name in caplog.text) == (damage == "cut")


def test_a_run_goes_on_with_shards(train, straight, tmp_path, small):
    with pytest.raises(Stopped):
        train("a", checkpoints=tmp_path / "c", stop_at=3)
    assert [*(tmp_path / "c" / "update-000002").glob("policy-*-of-*")]
    resumed = train("b", checkpoints=tmp_path / "c")
    assert split(resumed)
    assert torch.equal(logits(resumed), logits(straight))
    assert (resumed / "curve.json").read_bytes() == (straight / "curve.json").read_bytes()
