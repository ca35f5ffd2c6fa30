"""PPO on the toy task: it learns, every parameter arrives, and a resumed run is the same run."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rlhf.ppo.trainer as ppo_module
from rlhf.config import LoraConfig
from rlhf.data.rendering import PLAIN_TEMPLATE, load_renderer
from rlhf.data.rows import PROMPTS_TRAIN, PromptRow, write_rows
from rlhf.environments import ModelReward, Reply
from rlhf.errors import ConfigError, DataError, TrainingError
from rlhf.gates import Approved
from rlhf.modeling.base import load_policy
from rlhf.modeling.reward import META, Scorer
from rlhf.ppo.losses import policy_loss
from rlhf.ppo.rollout import log_probs_and_entropy
from rlhf.ppo.train import _trainer, prompts_of_update, train_policy
from rlhf.stage import read_json, write_json
from tests.library import toys

LORA = LoraConfig(r=4, alpha=16.0)
CPU = torch.device("cpu")


class Stopped(Exception):
    """The machine goes away."""


@pytest.fixture
def train(data, sft, approved, tmp_path):
    def run(name="out", reward=approved, folder=data, start=sft, stop_at=None, **options):
        out = tmp_path / name
        out.mkdir(exist_ok=True)

        def progress(step, total, metrics):
            # Called before the update is saved, so checkpoint `stop_at - 1` is the last.
            if step == stop_at:
                raise Stopped

        keep = {k: options.pop(k) for k in ("seed", "identity", "checkpoints") if k in options}
        config = toys.changed(toys.PPO, **options)
        listen = {"progress": progress} if stop_at else {}
        train_policy(config, folder, start, reward, out, runtime=toys.RUNTIME, **keep, **listen)
        return out

    return run


def assert_same_run(a: Path, b: Path) -> None:
    toys.assert_same_weights(a, b)
    assert (a / "curve.json").read_bytes() == (b / "curve.json").read_bytes()


# --- learning ---------------------------------------------------------------------------------


def test_it_raises_its_own_reward(train, sft):
    out = train(total_episodes=320)
    curve = read_json(out / "curve.json")
    assert [row["update"] for row in curve] == list(range(1, 21))
    start = sum(row["reward"] for row in curve[:3]) / 3
    end = sum(row["reward"] for row in curve[-3:]) / 3
    assert end > start + 2
    assert toys.distance(sft, out) > 0.01
    assert load_renderer(out).template_hash == load_renderer(sft).template_hash
    assert all(row["kl"] > 0.1 for row in curve[-3:])


def test_the_first_update_begins_at_the_reference(train):
    # One optimiser step over the whole chunk: the ratio is 1, so nothing is clipped, and whitened
    # advantages have mean 0.
    out = train(total_episodes=16, num_ppo_epochs=1, mini_batch_size=16)
    (row,) = read_json(out / "curve.json")
    assert row["kl"] == pytest.approx(0, abs=1e-5)
    assert row["approx_kl"] == pytest.approx(0, abs=1e-8)
    assert row["clip_fraction"] == 0
    assert row["policy_loss"] == pytest.approx(0, abs=1e-5)
    assert row["learning_rate"] == toys.PPO.learning_rate


def test_dropout_is_off(train, sft, copy_of):
    folder = copy_of(sft)
    config = read_json(folder / "config.json")
    write_json(folder / "config.json", {**config, "attention_dropout": 0.5})
    out = train(start=folder, total_episodes=16, num_ppo_epochs=1, mini_batch_size=16)
    (row,) = read_json(out / "curve.json")
    assert row["kl"] == pytest.approx(0, abs=1e-5)
    assert row["approx_kl"] == pytest.approx(0, abs=1e-8)


@pytest.mark.parametrize("tokens", [64, 100])
def test_replies_leave_room_for_a_prompt(train, tokens):
    with pytest.raises(ConfigError, match=f"max_new_tokens = {tokens} leaves.* 64 tokens; lower"):
        train(max_new_tokens=tokens)


def test_the_result_says_what_the_last_update_said(data, sft, approved, tmp_path):
    result = train_policy(toys.PPO, data, sft, approved, tmp_path, runtime=toys.RUNTIME)
    last = read_json(tmp_path / "curve.json")[-1]
    assert result.metrics == {
        "updates": 4, **{k: last[k] for k in ("reward", "kl", "tokens", "eos_rate")},
    }  # fmt: skip
    assert last["reward"] == pytest.approx(last["reward/reward_model"] + last["reward/missing_eos"])


def test_learning_rates_decay(train):
    out = train(lr_final_fraction=0.2)
    # peak · (1 − 0.8·u/4) for u = 0, 1, 2, 3
    rates = [row["learning_rate"] for row in read_json(out / "curve.json")]
    assert rates == pytest.approx([5e-3 * x for x in (1, 0.8, 0.6, 0.4)])


def test_the_critic_has_a_rate_of_its_own(sft, reward_model):
    config = toys.changed(toys.PPO, critic_learning_rate=0.5)
    trainer = _trainer(config, sft, reward_model, 0, CPU)
    trainer._set_learning_rates(0.1)
    assert [g["lr"] for g in trainer.optimizer.param_groups] == pytest.approx([5e-4, 0.05])


@pytest.fixture(scope="module")
def two_updates(data, sft, approved, tmp_path_factory):
    out = tmp_path_factory.mktemp("two")
    config = toys.changed(toys.PPO, total_episodes=32)
    train_policy(config, data, sft, approved, out, runtime=toys.RUNTIME)
    return out


@pytest.mark.parametrize(
    "change",
    [
        {"kl_coef": 1.0},
        {"clip_range": 0.01},
        {"value_clip_range": 0.01},
        {"value_clip_range": None},
        {"gamma": 0.5},
        {"gae_lambda": 0.1},
        {"value_loss_coef": 0.0},
        {"max_new_tokens": 4},
        {"top_k": 2},
        {"top_p": 0.5},
        {"temperature": 0.5},
        {"missing_eos_penalty": 9.0},
        {"missing_eos_penalty": None},
        {"whiten_rewards": True},
        {"lr_final_fraction": 1.0},
        {"learning_rate": 1e-3},
        {"critic_learning_rate": 1e-5},
        {"critic": "policy"},
        {"num_ppo_epochs": 1},
        {"mini_batch_size": 4},
        {"chunk_size": 8},
        {"adam_beta2": 0.5},
        {"max_grad_norm": 1e-3},
        {"lora": LORA},
        {"seed": 1},
    ],
    ids=lambda c: "-".join(f"{k}={v}" for k, v in c.items())[:30],
)
def test_every_parameter_arrives(train, two_updates, change):
    assert toys.distance(train(total_episodes=32, **change), two_updates) > 1e-4


@pytest.mark.parametrize("micro", [3, 1])
def test_micro_batches_change_nothing(train, two_updates, micro):
    assert toys.distance(train(total_episodes=32, micro_batch_size=micro), two_updates) < 1e-4


def test_whitening_leaves_a_single_score_alone(train):
    # 17 episodes: the last chunk holds one, whose deviation is not a number
    out = train(total_episodes=17, whiten_rewards=True)
    assert len(read_json(out / "curve.json")) == 2


# --- prompts ----------------------------------------------------------------------------------


def test_every_prompt_once_per_lap():
    prompts = [PromptRow(f"p{i}") for i in range(7)]
    config = toys.changed(toys.PPO, total_episodes=33, chunk_size=10)

    def stream(seed):
        return [prompts_of_update(prompts, u, config, seed) for u in range(config.updates)]

    chunks = stream(0)
    assert [len(c) for c in chunks] == [10, 10, 10, 3]
    order = [p for c in chunks for p in c]
    laps = [order[i : i + 7] for i in range(0, 28, 7)]
    assert all(sorted(lap, key=lambda row: row.prompt) == prompts for lap in laps)
    assert len({repr(lap) for lap in laps}) == 4  # each lap shuffled anew
    assert len({row.prompt for row in order[28:]}) == 5
    assert stream(0) == chunks
    assert stream(1) != chunks


def test_no_prompts(train, data, tmp_path):
    folder = toys.write_data(tmp_path / "empty")
    write_rows(folder / PROMPTS_TRAIN, [])
    with pytest.raises(DataError, match=r"no prompts .*data\.source"):
        train(folder=folder)


# --- resuming ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def straight(data, sft, approved, tmp_path_factory):
    """Four updates in one go, without checkpoints."""
    out = tmp_path_factory.mktemp("straight")
    train_policy(toys.PPO, data, sft, approved, out, runtime=toys.RUNTIME)
    return out


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


def test_kill_9(straight, data, sft, reward_model, train, tmp_path):
    script = f"""
import os, signal
from pathlib import Path
from rlhf.ppo.train import train_policy
from tests.library import toys

def progress(step, total, metrics):
    if step == 3:
        os.kill(os.getpid(), signal.SIGKILL)

train_policy(
    toys.PPO, Path({str(data)!r}), Path({str(sft)!r}), toys.approve(Path({str(reward_model)!r})),
    Path({str(tmp_path)!r}), runtime=toys.RUNTIME, checkpoints=Path({str(tmp_path / "c")!r}),
    progress=progress,
)
"""
    root = Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", script], cwd=root, check=False)
    assert done.returncode == -signal.SIGKILL
    assert sorted(p.name for p in (tmp_path / "c").iterdir())[-1] == "update-000002"
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
    names = sorted(p.name for p in (tmp_path / "c").iterdir())
    assert names == ["update-000003", "update-000004"]
    files = sorted(p.name for p in (tmp_path / "c" / names[0]).iterdir())
    assert files == [
        "critic.safetensors", "optimizer.safetensors", "policy.safetensors", "state.json",
    ]  # fmt: skip


def test_how_often_is_free(train, straight, tmp_path):
    train("a", checkpoints=tmp_path / "c", checkpoint_every=3)
    assert [p.name for p in (tmp_path / "c").iterdir()] == ["update-000003"]
    # how often to save changes nothing that is learnt, so another value may resume
    assert_same_run(train("b", checkpoints=tmp_path / "c", checkpoint_every=1), straight)


def test_another_identity_is_refused_by_name(train, tmp_path):
    checkpoints = tmp_path / "c"
    train("a", checkpoints=checkpoints, identity={"base": "one", "data": "two"})
    again = {"base": "one", "data": "two"}
    train("b", checkpoints=checkpoints, identity=again)
    for changes, name in [
        ({"identity": {"base": "one", "data": "three"}}, "its data is two, this run's is three"),
        ({"identity": {"base": "one"}}, "its data is two, this run's is None"),
        ({"identity": {**again, "extra": "x"}}, "its extra is None, this run's is x"),
        ({"identity": again, "kl_coef": 0.5}, "its config is"),
        ({"identity": again, "seed": 5}, "its seed is 0, this run's is 5"),
    ]:
        with pytest.raises(ConfigError, match=f"{name}.*delete the folder"):
            train("c", checkpoints=checkpoints, **changes)


# --- what can go wrong ------------------------------------------------------------------------


def broken_after(calls, spoil):
    """`policy_loss` that is spoilt after so many calls."""
    count = 0

    def wrapped(*args):
        nonlocal count
        count += 1
        loss, parts = policy_loss(*args)
        return (spoil(loss) if count > calls else loss), parts

    return wrapped


def nan_gradient(loss):
    loss.register_hook(lambda grad: grad * float("nan"))
    return loss


@pytest.mark.parametrize("spoil", [lambda loss: loss * float("nan"), nan_gradient])
def test_a_loss_that_is_not_finite_stops_before_the_step(
    train, straight, tmp_path, monkeypatch, spoil
):
    checkpoints = tmp_path / "c"
    # 4 steps an update: the fault is in the second step of the third
    with monkeypatch.context() as patch:
        patch.setattr(ppo_module, "policy_loss", broken_after(9, spoil))
        with pytest.raises(TrainingError, match=r"not finite.*ppo\.learning_rate"):
            train("broken", checkpoints=checkpoints)
    assert max(p.name for p in checkpoints.iterdir()) == "update-000002"
    assert_same_run(train("resumed", checkpoints=checkpoints), straight)


def test_a_reward_that_is_not_finite_names_the_reply(train, reward_model, copy_of, tmp_path):
    folder = copy_of(reward_model)
    model = toys.weights(folder)
    model["score.weight"][0, 0] = float("inf")
    from safetensors.torch import save_file

    save_file(model, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="score is not finite for the reply"):
        train(reward=toys.approve(folder), checkpoints=tmp_path / "c")
    assert not (tmp_path / "c").exists()


def test_an_ungated_reward_model_is_no_reward_model(data, sft, reward_model, tmp_path):
    with pytest.raises((TypeError, AttributeError)):
        train_policy(toys.PPO, data, sft, reward_model, tmp_path, runtime=toys.RUNTIME)
    with pytest.raises(TypeError):
        Approved(reward_model, None, object())


def test_a_reward_model_whose_template_changed_is_refused(train, reward_model, copy_of):
    folder = copy_of(reward_model)
    (folder / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    with pytest.raises(ConfigError, match="template changed since it was trained; train it again"):
        train(reward=toys.approve(folder))


def test_one_with_the_policys_words_but_another_template_is_refused(train, reward_model, copy_of):
    folder = copy_of(reward_model)
    (folder / "chat_template.jinja").write_text(PLAIN_TEMPLATE)
    meta = read_json(folder / META)
    write_json(folder / META, {**meta, "template_hash": load_renderer(folder).template_hash})
    with pytest.raises(ConfigError, match="but another chat template; train it again"):
        train(reward=toys.approve(folder))


def test_a_foreign_tokenizer_scores_but_is_no_critic(train, data, fresh, tmp_path):
    from rlhf.reward import train_reward_model

    folder = tmp_path / "foreign"
    folder.mkdir()
    train_reward_model(toys.REWARD, data, fresh, folder, runtime=toys.RUNTIME)
    reward = toys.approve(folder)
    with pytest.raises(
        ConfigError, match=r"ppo\.critic = 'reward_model'.*set ppo\.critic to policy"
    ):
        train(reward=reward)
    out = train("critic", reward=reward, critic="policy", total_episodes=16)
    assert len(read_json(out / "curve.json")) == 1


class FixedScorer(Scorer):
    """Scores known beforehand, for the two replies of `TestModelReward`."""

    def __init__(self):
        pass

    def __call__(self, prompts, replies):
        assert (prompts, replies) == (["tea?", "jar?"], ["good", "bad"])
        return torch.tensor([3.0, 1.0])


class TestModelReward:
    batch = (
        Reply("tea?", "good", 2, True),
        Reply("jar?", "bad", 2, False),
    )

    def test_every_reply_with_its_own_prompt(self):
        scored = ModelReward(FixedScorer())(self.batch)
        assert scored.totals.tolist() == [3, 1]
        assert {k: v.tolist() for k, v in scored.components.items()} == {"reward_model": [3, 1]}
        assert {k: v.tolist() for k, v in scored.weighted.items()} == {"reward_model": [3, 1]}


# --- adapters ---------------------------------------------------------------------------------


def test_lora_trains_adapters_and_publishes_a_plain_model(train, sft, tmp_path):
    out = train(lora=LORA, total_episodes=160, checkpoints=tmp_path / "c")
    assert not list(out.glob("adapter*"))
    before, after = toys.weights(sft), toys.weights(out)
    assert before.keys() == after.keys()
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert moved
    assert all(k.endswith("_proj.weight") for k in moved)
    saved = load_file(tmp_path / "c" / "update-000010" / "policy.safetensors")
    assert saved
    assert all("lora_" in k for k in saved)
    curve = read_json(out / "curve.json")
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-5)
    assert sum(r["reward"] for r in curve[-3:]) > sum(r["reward"] for r in curve[:3])


def test_a_resumed_lora_run_is_the_same_run(train, tmp_path):
    straight = train("straight", lora=LORA)
    with pytest.raises(Stopped):
        train("stopped", lora=LORA, checkpoints=tmp_path / "c", stop_at=3)
    assert_same_run(train("resumed", lora=LORA, checkpoints=tmp_path / "c"), straight)


def test_with_adapters_the_reference_is_the_base(sft, reward_model):
    trainer = _trainer(toys.changed(toys.PPO, lora=LORA), sft, reward_model, 0, CPU)
    assert trainer.reference is None
    for name, p in trainer.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    replies = trainer._sample([PromptRow("tea or cup?"), PromptRow("jar or mug?")], seed=1)
    with torch.no_grad():
        base, _ = log_probs_and_entropy(load_policy(sft), replies, 1.0)
        reference = trainer._reference_log_probs(replies)
        ours, _ = log_probs_and_entropy(trainer.policy, replies, 1.0)
    torch.testing.assert_close(reference, base)
    assert not torch.allclose(ours, base, atol=1e-2)


def test_the_reference_stays_where_it_was(sft, reward_model):
    trainer = _trainer(toys.PPO, sft, reward_model, 0, CPU)
    before = {k: v.clone() for k, v in trainer.reference.state_dict().items()}
    trainer.update(0, [PromptRow("tea or cup?")] * 16)
    assert all(torch.equal(v, before[k]) for k, v in trainer.reference.state_dict().items())
    moved = trainer.policy.state_dict()
    assert not all(torch.equal(moved[k], before[k]) for k in before)
