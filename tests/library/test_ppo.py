"""PPO on the toy task: it learns from its own prompts."""

from __future__ import annotations

import pytest
import torch
from safetensors.torch import load_file

from rlhf.data.rendering import load_renderer
from rlhf.data.rows import PROMPTS_TRAIN, PromptRow, write_rows
from rlhf.errors import ConfigError, DataError
from rlhf.files import read_json, write_json
from rlhf.modeling.base import load_policy
from rlhf.modeling.logprobs import log_probs_and_entropy
from rlhf.ppo.train import build_trainer, prompts_of_update, train_policy
from tests.library import toys
from tests.library.ppo_runs import LORA, Stopped, assert_same_run
from tests.library.toys import DEVICE, within

pytestmark = pytest.mark.device


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
    first, *_, last = read_json(tmp_path / "curve.json")
    assert result.metrics == {
        "updates": 4, **{k: last[k] for k in ("reward", "kl", "tokens", "eos_rate")},
        **{f"{k}_before": first[k] for k in ("reward", "tokens", "eos_rate")},
    }  # fmt: skip
    assert last["reward"] == pytest.approx(last["reward/reward_model"] + last["reward/missing_eos"])


def test_learning_rates_decay(train):
    out = train(lr_final_fraction=0.2)
    # peak · (1 − 0.8·u/4) for u = 0, 1, 2, 3
    rates = [row["learning_rate"] for row in read_json(out / "curve.json")]
    assert rates == pytest.approx([5e-3 * x for x in (1, 0.8, 0.6, 0.4)])


def test_the_critic_has_a_rate_of_its_own(sft, approved):
    config = toys.changed(toys.PPO, critic_learning_rate=0.5, lr_final_fraction=0.5)
    trainer = build_trainer(config, sft, approved, 0, DEVICE)
    # half way through 4 updates: 0.75 of the peaks
    rates = trainer.models.set_learning_rates(2)
    assert rates == pytest.approx({"learning_rate": 3.75e-3, "critic_learning_rate": 0.375})
    groups = [g["lr"] for o in trainer.models.optimizers.values() for g in o.param_groups]
    assert groups == list(rates.values())


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
    assert all(sorted(lap, key=lambda r: r.prompt) == prompts for lap in laps)
    assert len({tuple(row.prompt for row in lap) for lap in laps}) == 4  # each lap shuffled anew
    assert len({row.prompt for row in order[28:]}) == 5
    assert stream(0) == chunks
    assert stream(1) != chunks


def test_no_prompts(train, data, tmp_path):
    folder = toys.write_data(tmp_path / "empty")
    write_rows(folder / PROMPTS_TRAIN, [])
    with pytest.raises(DataError, match=r"no prompts .*data\.source"):
        train(folder=folder)


# --- adapters ---------------------------------------------------------------------------------


def test_lora_trains_adapters_and_publishes_a_plain_model(train, sft, tmp_path):
    out = train(lora=LORA, total_episodes=160, checkpoints=tmp_path / "c")
    # Beside the weights: at the top transformers would take the folder for an adapter.
    assert [path.name for path in out.glob("adapter*")] == ["adapter"]
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


def test_with_adapters_the_reference_is_the_base(sft, approved):
    trainer = build_trainer(toys.changed(toys.PPO, lora=LORA), sft, approved, 0, DEVICE)
    assert trainer.models.reference is None
    for name, p in trainer.models.policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(p, std=0.3)
    rows = [PromptRow("tea or cup?"), PromptRow("jar or mug?")]
    replies = trainer.sample(rows, 1).replies.to(DEVICE)
    with torch.no_grad():
        base, _ = log_probs_and_entropy(load_policy(sft).to(DEVICE), replies, 1.0)
        reference = trainer.models.reference_log_probs(replies)
        ours, _ = trainer.models.log_probs(replies)
    close = {"atol": within(1e-5, 1e-4), "rtol": within(1.3e-6, 1e-4)}
    torch.testing.assert_close(reference, base, **close)
    assert not torch.allclose(ours, base, atol=1e-2)


def test_the_reference_stays_where_it_was(sft, approved):
    trainer = build_trainer(toys.PPO, sft, approved, 0, DEVICE)
    before = {k: v.clone() for k, v in trainer.models.reference.state_dict().items()}
    trainer.update(0, [PromptRow("tea or cup?")] * 16)
    assert all(torch.equal(v, before[k]) for k, v in trainer.models.reference.state_dict().items())
    moved = trainer.models.policy.state_dict()
    assert not all(torch.equal(moved[k], before[k]) for k in before)
