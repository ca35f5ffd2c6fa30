"""bfloat16: storing frozen layers in it changes no bit, and heads keep their precision."""

from __future__ import annotations

import shutil
from pathlib import Path

import peft
import pytest
import torch
from torch import nn
from transformers import PhiConfig, PhiForCausalLM

from rlhf.errors import ConfigError
from rlhf.modeling.base import load_policy
from rlhf.modeling.decoders import frozen_copy
from rlhf.modeling.generate import generate
from rlhf.modeling.logprobs import log_probs_and_entropy
from rlhf.modeling.packed import packs
from rlhf.modeling.precision import autocast, in_own_precision, store_in_bfloat16
from rlhf.modeling.reward import Scorer
from rlhf.modeling.sampling import Sampling
from tests.library import toys
from tests.library.ppo_runs import LORA, assert_same_run
from tests.library.test_packed import ALL, make

pytestmark = pytest.mark.device
PLACES = ("rlhf.modeling.reward.store_in_bfloat16", "rlhf.ppo.models.store_in_bfloat16")


@pytest.mark.cpu_only("bytes are compared, and a GPU adds up in no fixed order")
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"lora": LORA},
        {"lora": LORA, "critic": "adapter", "kl_audit": True},
        {"critic": "head", "gradient_checkpointing": True},
    ],
)
def test_storing_frozen_layers_lowered_changes_no_bit_of_a_run(train, monkeypatch, options):
    options = {**options, "precision": "bf16", "total_episodes": 32}
    lowered = train("lowered", **options)
    for place in PLACES:
        monkeypatch.setattr(place, lambda model: None)
    assert_same_run(train("as-they-are", **options), lowered)


def test_the_published_weights_are_those_of_the_base_plus_the_adapter(train, sft):
    """Not those that were rounded to compute with: 2⁻⁹ of a weight would be lost."""
    out = train(lora=LORA, precision="bf16", total_episodes=16, learning_rate=1e-12)
    before, after = toys.weights(sft), toys.weights(out)
    linear = [name for name in before if name.endswith("proj.weight")]
    assert linear
    for name in linear:
        assert not torch.equal(before[name], before[name].bfloat16().float())
        torch.testing.assert_close(after[name], before[name], atol=1e-6, rtol=0)


def test_what_is_stored_lowered(sft):
    """The frozen linear layers; not the embedding that the head is tied to, nor what learns."""
    policy = peft.get_peft_model(
        load_policy(sft), peft.LoraConfig(r=2, target_modules="all-linear")
    )
    store_in_bfloat16(policy)
    kinds = {name: p.dtype for name, p in policy.named_parameters()}
    assert {d for n, d in kinds.items() if n.endswith("base_layer.weight")} == {torch.bfloat16}
    others = {d for n, d in kinds.items() if not n.endswith("base_layer.weight")}
    assert others == {torch.float32}
    assert any("lora_A" in name for name in kinds)


def phi():
    """An architecture whose head has a bias, here a large one."""
    torch.manual_seed(0)
    config = PhiConfig(
        vocab_size=61, hidden_size=32, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=64, max_position_embeddings=64,
    )  # fmt: skip
    model = PhiForCausalLM(config).eval()
    torch.nn.init.normal_(model.lm_head.bias)
    return model.to(toys.DEVICE)


@pytest.mark.parametrize("temperature", [1.0, 0.7])
@pytest.mark.parametrize("name", [*ALL, "phi"])
def test_log_probs_are_the_same_bit_by_bit(name, temperature):
    model = (phi() if name == "phi" else make(name)).requires_grad_(False)
    tokens = type("Tokens", (), {"eos_token_id": 2, "pad_token_id": 0})
    replies = generate(model, [[5, 6, 7], [8]], tokens, Sampling(6), 0)

    def log_probs():
        with torch.no_grad(), autocast(toys.DEVICE, "bf16"):
            return log_probs_and_entropy(model, replies, temperature)

    before, size = log_probs(), sum(p.nbytes for p in model.parameters())
    store_in_bfloat16(model)
    assert all(torch.equal(a, b) for a, b in zip(before, log_probs(), strict=True))
    assert sum(p.nbytes for p in model.parameters()) < size


def test_what_was_learnt_is_saved_before_the_base_is_read_again(train, sft, tmp_path):
    start = Path(shutil.copytree(sft, tmp_path / "start"))
    options = {"lora": LORA, "precision": "bf16", "total_episodes": 32, "checkpoint_every": 9}

    def told(step):
        if step == 2:
            shutil.move(start, tmp_path / "away")

    folders = {"start": start, "checkpoints": tmp_path / "c", **options}
    with pytest.raises(ConfigError, match="start"):
        train("gone", told=told, **folders)
    shutil.move(tmp_path / "away", start)
    resumed = train("resumed", told=lambda step: pytest.fail("trained again"), **folders)
    assert_same_run(resumed, train("straight", **options))


def test_a_copy_shares_what_is_lowered_already_and_is_not_tried_again(monkeypatch):
    model = make("gqa").requires_grad_(False)
    store_in_bfloat16(model)
    twin = frozen_copy(model, torch.bfloat16)
    monkeypatch.setattr("rlhf.modeling.packed._enable_packing", None)  # would be called to try it
    assert packs(twin, 8)
    ours, theirs = dict(model.named_parameters()), dict(twin.named_parameters())
    assert {p.dtype for p in theirs.values()} == {torch.bfloat16}
    for name, parameter in ours.items():
        shared = parameter.data_ptr() == theirs[name].data_ptr()
        assert shared == (parameter.dtype == torch.bfloat16), name


def test_a_head_computes_in_its_own_precision():
    """257 needs nine binary digits; bfloat16 has eight."""
    head = nn.Linear(1, 1, bias=False).to(toys.DEVICE)
    nn.init.ones_(head.weight)
    hidden = torch.tensor([[257.0]], device=toys.DEVICE)
    with torch.autocast(toys.DEVICE.type, torch.bfloat16):
        assert in_own_precision(head, hidden).item() == 257
        assert head(hidden).item() != 257


def test_a_reward_model_in_bf16_scores_nearly_as_in_fp32(reward_model):
    prompts = [f"{a} or jar?" for a in toys.ASKED]
    texts = ["good", "bad", "good good", "bad bad", "tea"]
    exact, lowered = (
        Scorer(reward_model, toys.DEVICE, 64, precision=p)(prompts, texts) for p in ("fp32", "bf16")
    )
    assert not torch.equal(exact, lowered)
    assert (exact - lowered).abs().max() < 0.05 * exact.abs().max()
    # The scores themselves are not rounded to bfloat16.
    assert not torch.equal(lowered, lowered.bfloat16().float())
