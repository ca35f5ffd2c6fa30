"""Estimates by fake tensors, compared with the same model that computes."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM

from rlhf.config import LoraConfig, load_config
from rlhf.estimate import PROCESS, cures, estimate, shape_of
from rlhf.modeling.base import load_policy
from rlhf.modeling.frozen import FrozenLinear, store_frozen
from rlhf.modeling.nf4 import NF4_BYTES

LENGTH = 24


@pytest.mark.parametrize("name", ["fresh", "gpt2-base", "bloom-base"])
def test_a_shape_is_that_of_the_model_that_computes(toy, name):
    shape = shape_of(toy(name), LENGTH, None)
    model = load_policy(toy(name))
    assert shape.parameters == sum(p.numel() for p in model.parameters())
    assert shape.adapter == 0
    assert shape.vocabulary == model.config.vocab_size
    ids = torch.zeros(1, LENGTH, dtype=torch.long)
    cache = model.base_model(input_ids=ids, use_cache=True).past_key_values
    held = sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers)
    assert shape.cache_per_token == held / LENGTH

    own = {p.untyped_storage().data_ptr() for p in model.parameters()}
    stored = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            stored[storage.data_ptr()] = (storage.nbytes(), storage)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train().base_model(input_ids=ids, use_cache=False)
    measured = sum(size for size, _ in stored.values())
    assert shape.stored_per_row == pytest.approx(measured, rel=0.15)


def test_adapters_are_counted(toy):
    shape = shape_of(toy("fresh"), LENGTH, LoraConfig(r=2))
    model = AutoModelForCausalLM.from_pretrained(toy("fresh"))
    linear = [
        m for n, m in model.named_modules() if isinstance(m, torch.nn.Linear) and n != "lm_head"
    ]
    assert shape.adapter == sum(2 * (m.in_features + m.out_features) for m in linear)


def test_sharing_and_smaller_batches_need_less(toy):
    base = toy("fresh")

    def stages(*overrides: str):
        words = [f"--base.path={base}", "--data.source=x.jsonl", "--ppo.max_new_tokens=8"]
        config = load_config(
            None,
            [*words, "--sft.max_length=48", "--reward_model.max_length=48", *overrides],
        ).config
        return config, {stage.section: stage for stage in estimate(config, base)}

    lora = "--sft.lora.r=2", "--reward_model.lora.r=2", "--ppo.lora.r=2", "--ppo.shared_base=true"
    full_config, full = stages("--runtime.device=cpu")
    _, small = stages(*lora, "--ppo.critic=adapter")
    _, micro = stages("--sft.micro_batch_size=1", "--ppo.micro_batch_size=1")
    ppo = full["ppo"]
    # Policy, reference, reward model, critic, the watchdog's judge, and the policy that it retains;
    # then one base with three adapters, the judge, and a retained adapter.
    cpu = "--runtime.device=cpu"
    assert ppo.weights == 6 * full["sft"].weights
    alone_config, alone = stages("--ppo.watchdog=none", cpu)
    assert alone["ppo"].weights == 4 * full["sft"].weights
    unjudged_config, unjudged = stages("--judge.enabled=false", cpu)
    assert unjudged["ppo"].weights == 5 * full["sft"].weights
    _, bare = stages(*lora, "--ppo.critic=adapter", "--ppo.watchdog=none", cpu)
    _, unjudged_small = stages(*lora, "--ppo.critic=adapter", "--judge.enabled=false", cpu)
    adapter = shape_of(base, LENGTH, LoraConfig(r=2)).adapter
    assert unjudged_small["ppo"].weights - bare["ppo"].weights == 4 * adapter
    assert "watchdog to none, which needs no judge in" in cures(full_config, ppo)
    assert "needs no second copy of the policy" in cures(unjudged_config, unjudged["ppo"])
    assert "watchdog" not in cures(alone_config, alone["ppo"])
    assert full["sft"].weights < small["ppo"].weights < ppo.weights / 2
    assert micro["sft"].activations < full["sft"].activations / 4
    assert micro["ppo"].activations < ppo.activations
    assert all(stage.peak > PROCESS + stage.weights for stage in full.values())
    assert all(stage.tokens_per_second > 0 for stage in full.values())
    assert cures(full_config, ppo).startswith("set ppo.lora")


def test_a_base_in_fewer_bits_needs_less_by_its_linear_layers(toy):
    base = toy("fresh")
    model = load_policy(base)
    store_frozen(model, "bfloat16", torch.device("cpu"), "ppo")
    linear = sum(m.stored.numel() for m in model.modules() if isinstance(m, FrozenLinear))
    assert shape_of(base, LENGTH, None).linear == linear > 0
    weights = {}
    for dtype in ("auto", "float32", "bfloat16", "nf4"):
        config = load_config(
            None,
            [
                f"--base.path={base}", "--data.source=x.jsonl", "--ppo.max_new_tokens=8",
                "--sft.max_length=48", "--reward_model.max_length=48", "--sft.lora.r=2",
                "--ppo.lora.r=2", "--ppo.critic=head", "--runtime.device=cpu",
                f"--sft.frozen_dtype={dtype}", f"--ppo.frozen_dtype={dtype}",
                "--ppo.watchdog=none",
            ],
        ).config  # fmt: skip
        stages = {stage.section: stage for stage in estimate(config, base)}
        weights[dtype] = stages["sft"].weights, stages["ppo"].weights
    full = weights["float32"]
    assert weights["auto"] == full  # on a CPU
    # The base below adapters; in PPO a reward model, too, which is not rounded to 4 bits.
    saved = {d: (full[0] - w[0], full[1] - w[1]) for d, w in weights.items()}
    assert saved["bfloat16"] == pytest.approx((2 * linear, 4 * linear))
    assert saved["nf4"] == pytest.approx((4 - NF4_BYTES) * torch.tensor([linear, linear]))
