"""A resumed PPO run equals an uninterrupted one."""

from __future__ import annotations

import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from rlhf.checkpoints.folder import checkpoints_in
from rlhf.data.rendering import load_renderer
from rlhf.errors import ConfigError, Interrupted, is_retriable
from rlhf.files import read_json, write_json
from rlhf.modeling.reward import META
from tests.library import toys
from tests.library.ppo_runs import EVERYTHING, Stopped, assert_same_run

pytestmark = pytest.mark.device
ROOT = Path(__file__).parents[2]


def names(checkpoints):
    return [path.name for path in checkpoints_in(checkpoints)]


@pytest.mark.parametrize("stop_at", [1, 2, 4])
def test_a_resumed_run_is_the_same_run(train, straight, tmp_path, stop_at):
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(Stopped):
        train("stopped", checkpoints=checkpoints, stop_at=stop_at)
    torch.manual_seed(12345)  # no global generator may matter
    assert_same_run(train("resumed", checkpoints=checkpoints), straight)


def test_it_really_resumes(train, tmp_path):
    """Were everything done again, this progress would be told of update 1."""
    checkpoints = tmp_path / "checkpoints"
    with pytest.raises(Stopped):
        train("stopped", checkpoints=checkpoints, stop_at=3)
    train("resumed", checkpoints=checkpoints, stop_at=2)


def test_a_finished_run_is_only_written_again(train, straight, tmp_path):
    train("first", checkpoints=tmp_path / "c")
    assert_same_run(train("second", checkpoints=tmp_path / "c", stop_at=4), straight)


def interrupted(data, sft, reward_model, folder, name, **options):
    """PPO in a process of its own that sends itself a signal in its third update."""
    script = f"""
import os, signal
from pathlib import Path
from rlhf.ppo.train import train_policy
from tests.library import toys

def progress(step, total, metrics):
    if step == 3:
        os.kill(os.getpid(), signal.{name})

train_policy(
    toys.changed(toys.PPO, **{options!r}), Path({str(data)!r}), Path({str(sft)!r}),
    toys.approve(Path({str(reward_model)!r})), Path({str(folder)!r}), runtime=toys.RUNTIME,
    checkpoints=Path({str(folder / "c")!r}), progress=progress,
)
"""
    return subprocess.run([sys.executable, "-c", script], cwd=ROOT, check=False)


def test_kill_9(straight, data, sft, reward_model, train, tmp_path):
    done = interrupted(data, sft, reward_model, tmp_path, "SIGKILL")
    assert done.returncode == -signal.SIGKILL
    assert names(tmp_path / "c")[-1] == "update-000002"
    assert_same_run(train("resumed", checkpoints=tmp_path / "c"), straight)


def test_half_written_checkpoints_are_ignored(train, straight, tmp_path):
    checkpoints = tmp_path / "c"
    with pytest.raises(Stopped):
        train("stopped", checkpoints=checkpoints, stop_at=3)
    for name in (".partial-update-000003", ".partial-update-000099"):
        (checkpoints / name).mkdir()
        (checkpoints / name / "state.json").write_text("{")
    assert_same_run(train("resumed", checkpoints=checkpoints), straight)


def test_the_newest_two_are_kept(train, tmp_path):
    train(checkpoints=tmp_path / "c")
    assert names(tmp_path / "c") == ["update-000003", "update-000004"]
    files = sorted(p.name for p in (tmp_path / "c" / "update-000003").iterdir())
    assert files == [
        "critic.safetensors", "optimizer-critic.safetensors", "optimizer-policy.safetensors",
        "policy.safetensors", "state.json",
    ]  # fmt: skip


def test_how_often_is_free(train, straight, tmp_path):
    train("a", checkpoints=tmp_path / "c", checkpoint_every=3)
    assert names(tmp_path / "c") == ["update-000003"]
    # how often to save changes nothing that is learnt, so another value may resume
    assert_same_run(train("b", checkpoints=tmp_path / "c", checkpoint_every=1), straight)


def test_another_identity_is_refused_by_name(train, sft, reward_model, copy_of, tmp_path):
    checkpoints = tmp_path / "c"
    given = {"data": "one"}
    train("a", checkpoints=checkpoints, identity=given)
    train("b", checkpoints=checkpoints, identity=given)
    base, scorer, words = copy_of(sft), copy_of(reward_model), tmp_path / "words"
    for folder in (base, scorer):
        model = toys.weights(folder)
        model["model.norm.weight"][0] += 1e-6
        save_file(model, folder / "model.safetensors", {"format": "pt"})
    shutil.copytree(sft, words)
    for changes, name in [
        ({"identity": {"data": "two"}}, "its data is one, this run's is two"),
        ({"start": base}, "its base is"),
        ({"reward": toys.approve(scorer)}, "its reward model is"),
        ({"kl_coef": 0.5}, "its config is"),
        ({"seed": 5}, "its seed is 0, this run's is 5"),
    ]:
        with pytest.raises(ConfigError, match=f"{name}.*delete the folder"):
            train("c", checkpoints=checkpoints, **{"identity": given, **changes})
    # only the tokenizer differs: policy and reward model agree on another end of the prompt
    for folder in (words, scorer):
        template = (sft / "chat_template.jinja").read_text()
        (folder / "chat_template.jinja").write_text(template + " ")
    meta = read_json(scorer / META)
    write_json(scorer / META, {**meta, "template_hash": load_renderer(words).template_hash})
    known = {**given, "base": "x", "reward model": "y"}
    train("d", checkpoints=tmp_path / "d", identity=known)
    with pytest.raises(ConfigError, match=r"its tokenizer is.*delete the folder"):
        train("e", checkpoints=tmp_path / "d", identity=known, start=words,
              reward=toys.approve(scorer))  # fmt: skip


def test_sigterm_saves_and_exits(straight, data, sft, reward_model, train, tmp_path):
    done = interrupted(data, sft, reward_model, tmp_path, "SIGTERM", checkpoint_every=100)
    assert done.returncode == -signal.SIGTERM
    assert names(tmp_path / "c") == ["update-000003"]
    again = train("resumed", checkpoints=tmp_path / "c", checkpoint_every=100)
    assert_same_run(again, straight)


def test_whoever_listened_for_sigterm_hears_it_after_the_save(train, tmp_path):
    heard = []
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(names(tmp_path / "c")))
    try:
        with pytest.raises(Interrupted, match="after update 2 of 4: saved; run the same again"):
            train("a", checkpoints=tmp_path / "c", checkpoint_every=100, sigterm_at=2)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [["update-000002"]]
    assert is_retriable(Interrupted("x"))


def test_without_checkpoints_sigterm_is_not_held_back(train):
    class Heard(Exception):
        pass

    def listen(*_):
        raise Heard

    before = signal.signal(signal.SIGTERM, listen)
    try:
        with pytest.raises(Heard):
            train(sigterm_at=2)
    finally:
        signal.signal(signal.SIGTERM, before)


def test_everything_that_changes_is_resumed(train, tmp_path):
    """KL controller, running scales, learning rates, LoRA, a critic's adapter: all at once."""
    straight = train("straight", checkpoints=tmp_path / "s", **EVERYTHING)
    coefs = [row["kl_coef"] for row in read_json(straight / "curve.json")]
    assert len(set(coefs)) > 2
    with pytest.raises(Stopped):
        train("stopped", checkpoints=tmp_path / "c", stop_at=3, **EVERYTHING)
    assert_same_run(train("resumed", checkpoints=tmp_path / "c", **EVERYTHING), straight)
    last = [folder / "update-000004" for folder in (tmp_path / "s", tmp_path / "c")]
    states = [read_json(folder / "state.json")["trainer"] for folder in last]
    assert states[0] == states[1]
    assert states[0]["reward_scale"]
    assert states[0]["environment"]
    for name in ("policy", "critic", "optimizer-policy", "optimizer-critic"):
        file = f"{name}.safetensors"
        assert (last[0] / file).read_bytes() == (last[1] / file).read_bytes(), file
