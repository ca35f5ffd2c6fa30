"""Errors of PPO and their messages."""

from __future__ import annotations

import pytest

import rlhf.ppo.optimisation as optimise_module
from rlhf.checkpoints.folder import checkpoints_in
from rlhf.data.chat_template import PLAIN_TEMPLATE
from rlhf.data.rendering import load_renderer
from rlhf.errors import ConfigError, TrainingError
from rlhf.files import read_json, write_json
from rlhf.gates import Approved
from rlhf.modeling.reward import META
from rlhf.ppo.losses import policy_loss
from rlhf.ppo.train import train_policy
from tests.library import toys
from tests.library.ppo_runs import assert_same_run

pytestmark = pytest.mark.device


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
        patch.setattr(optimise_module, "policy_loss", broken_after(9, spoil))
        with pytest.raises(TrainingError, match=r"not finite.*ppo\.learning_rate"):
            train("broken", checkpoints=checkpoints)
    assert max(p.name for p in checkpoints.iterdir()) == "update-000002"
    assert_same_run(train("resumed", checkpoints=checkpoints), straight)


def test_a_reward_that_is_not_finite_names_the_reply(train, reward_model, copy_of, tmp_path):
    folder = copy_of(reward_model)
    model = toys.weights(folder)
    model["score.weight"][:] = 3e38  # finite, as loading demands
    from safetensors.torch import save_file

    save_file(model, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(TrainingError, match="score is not finite for the reply"):
        train(reward=toys.approve(folder), checkpoints=tmp_path / "c")
    assert not checkpoints_in(tmp_path / "c")


def test_an_ungated_reward_model_is_no_reward_model(data, sft, reward_model, tmp_path):
    with pytest.raises((TypeError, AttributeError)):
        train_policy(toys.PPO, data, sft, reward_model, tmp_path, runtime=toys.RUNTIME)
    with pytest.raises(TypeError):
        Approved(reward_model, toys.approve(reward_model).verdict, object())


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
    with pytest.raises(
        ConfigError, match="another chat template or end of replies; train it again"
    ):
        train(reward=toys.approve(folder))


def test_a_foreign_tokenizer_scores_but_is_no_critic(train, toy):
    reward = toys.approve(toy("fresh-reward"))
    with pytest.raises(
        ConfigError, match=r"ppo\.critic = 'reward_model'.*set ppo\.critic to policy"
    ):
        train(reward=reward)
    out = train("critic", reward=reward, critic="policy", total_episodes=16)
    assert len(read_json(out / "curve.json")) == 1


def test_adapters_for_modules_that_the_policy_has_not(train):
    with pytest.raises(ConfigError, match=r"^ppo\.lora\.target_modules = 'nope': this model"):
        train(lora={"target_modules": "nope"})
