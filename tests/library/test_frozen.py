"""Frozen weights in 16 bits, which change no number, and in 4 bits (QLoRA) in every stage."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, T5Config
from transformers.models.t5.modeling_t5 import T5EncoderModel

from rlhf.config import BaseModelConfig, LoraConfig, PipelineConfig, RuntimeConfig
from rlhf.errors import ConfigError
from rlhf.files import read_json
from rlhf.modeling.base import load_policy
from rlhf.modeling.device import prepare_device
from rlhf.modeling.frozen import (
    FrozenLinear,
    check_frozen_dtype,
    holds_stored,
    parameter_count,
    restore,
    store_frozen,
)
from rlhf.modeling.lora import merge_adapter, with_adapter
from rlhf.modeling.nf4 import NF4_BYTES
from rlhf.modeling.reward import Scorer
from rlhf.ppo.train import build_trainer
from tests.emulated_cuda import emulated_cuda
from tests.library import toys
from tests.library.ppo_runs import EVERYTHING, LORA, Stopped, assert_same_run

CPU, GPU = torch.device("cpu"), torch.device("cuda")
IDS = torch.arange(3, 33).view(2, 15)
QLORA: dict[str, Any] = {"lora": LORA, "frozen_dtype": "nf4"}


@pytest.fixture(scope="module")
def nf4() -> None:
    pytest.importorskip("bitsandbytes")  # not on a bare GPU machine


@pytest.fixture(scope="module")
def half(sft, tmp_path_factory) -> Path:
    """The SFT policy in bfloat16."""
    return in_bfloat16(sft, tmp_path_factory.mktemp("half") / "sft")


@pytest.fixture(scope="module")
def untrained(fresh, tmp_path_factory) -> Path:
    """A base in bfloat16."""
    return in_bfloat16(fresh, tmp_path_factory.mktemp("half") / "fresh")


@pytest.fixture(scope="module")
def half_reward(nf4, data, half, tmp_path_factory) -> Path:
    """A reward model trained by QLoRA from that policy."""
    from rlhf.reward import train_reward_model

    out = tmp_path_factory.mktemp("half-reward")
    section: Any = toys.changed(toys.REWARD, pooling="last", epochs=3, **QLORA)
    train_reward_model(section, data, half, out, runtime=toys.RUNTIME)
    return out


def in_bfloat16(source: Path, folder: Path) -> Path:
    shutil.copytree(source, folder)
    load_policy(source).to(torch.bfloat16).save_pretrained(folder)
    return folder


def stored(model: Any) -> dict[str, FrozenLinear]:
    return {name: m for name, m in model.named_modules() if isinstance(m, FrozenLinear)}


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(IDS).logits


@pytest.mark.parametrize("family", ["sft", "gpt2-base"])
def test_nf4_computes_with_the_numbers_that_it_stands_for(nf4, toy, family):
    model, plain = load_policy(toy(family)), load_policy(toy(family))
    store_frozen(model, "nf4", CPU, "ppo")
    layers = stored(model)
    assert len(layers) == (4 if family == "gpt2-base" else 7)
    for name, layer in layers.items():
        before: Any = plain.get_submodule(name).weight
        before = before.T if family == "gpt2-base" else before
        assert (layer.out_features, layer.in_features) == before.shape
        size = layer.stored.nbytes + layer.scales.nbytes + layer.scale_scales.nbytes
        assert size == pytest.approx(NF4_BYTES * before.numel(), abs=4)
        gap = (layer.weight - before).norm() / before.norm()
        assert 0.05 < gap < 0.15  # of normal numbers in 4 bits: 0.09
        states = torch.randn(3, layer.in_features, requires_grad=True)
        expected = F.linear(states, layer.weight, layer.bias)
        assert torch.equal(layer(states), expected)
        (wanted,) = torch.autograd.grad(expected.square().sum(), states)
        (found,) = torch.autograd.grad(layer(states).square().sum(), states)
        torch.testing.assert_close(found, wanted)
        with torch.autocast("cpu", torch.bfloat16):
            assert layer(states).dtype == torch.bfloat16
        assert layer(states.bfloat16()).dtype == torch.bfloat16
    assert parameter_count(model) == plain.num_parameters()
    before = logits(model)
    torch.testing.assert_close(logits(restore(model)), before)
    assert not holds_stored(model)
    assert not torch.allclose(before, logits(plain))


def test_sixteen_bits_are_taken_where_they_lose_nothing(sft, half):
    plain = load_policy(half)
    model = load_policy(half)
    store_frozen(model, "auto", GPU, "ppo")
    assert {layer.stored.dtype for layer in stored(model).values()} == {torch.bfloat16}
    assert len(stored(model)) == 7
    assert torch.equal(logits(model), logits(plain))
    assert {m.weight.dtype for m in stored(model).values()} == {torch.float32}
    model = load_policy(half)
    up: Any = model.model.layers[0].mlp.up_proj
    up.weight.data[0, 0] = 1 + 2**-10  # float16 has 11 bits, bfloat16 has 8
    down: Any = model.model.layers[0].mlp.down_proj
    down.weight.data[0, 0] = 1 + 2**-20
    before = logits(model)
    store_frozen(model, "auto", GPU, "ppo")
    assert up.stored.dtype == torch.float16
    assert not isinstance(down, FrozenLinear)
    assert torch.equal(logits(model), before)
    for folder, dtype, device, count in (
        (half, "auto", CPU, 0), (half, "float32", GPU, 0), (sft, "auto", GPU, 0),
        (sft, "bfloat16", CPU, 7),
    ):  # fmt: skip
        model = load_policy(folder)
        store_frozen(model, dtype, device, "ppo")
        assert len(stored(model)) == count


def test_code_that_reads_a_layers_dtype_sees_that_of_its_results():
    """T5 converts its states to the dtype of a layer's weight."""
    torch.manual_seed(0)
    config = T5Config(vocab_size=64, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    model: Any = T5EncoderModel(config).to(torch.bfloat16).float().eval()
    with torch.no_grad():
        before = model(IDS).last_hidden_state
        store_frozen(model, "auto", GPU, "ppo")
        assert len(stored(model)) == 6
        assert torch.equal(model(IDS).last_hidden_state, before)


@pytest.mark.parametrize(
    "options",
    [{"lora": LORA, "critic": "adapter"}, {"critic": "policy"}],
    ids=["base", "reference and reward model"],
)
def test_a_run_on_weights_in_16_bits_is_the_same_bit_by_bit(train, half, data, tmp_path, options):
    """So `auto` changes nothing; the base, the reference and the reward model are in bfloat16."""
    from rlhf.reward import train_reward_model

    reward = tmp_path / "reward"
    reward.mkdir()
    section: Any = toys.changed(toys.REWARD, pooling="last")
    train_reward_model(section, data, half, reward, runtime=toys.RUNTIME)
    options = {"start": half, "reward": toys.approve(reward), "total_episodes": 32, **options}
    runs = [train(d, frozen_dtype=d, **options) for d in ("float32", "bfloat16")]
    assert_same_run(*runs)
    trainer = build_trainer(
        toys.changed(toys.PPO, frozen_dtype="bfloat16", lora=options.get("lora"), critic="policy"),
        half, toys.approve(reward), 0, CPU,
    )  # fmt: skip
    frozen = [trainer.models.scorer.model, trainer.models.reference or trainer.models.policy]
    assert all(holds_stored(model) for model in frozen)
    assert not holds_stored(trainer.models.critic)


@pytest.mark.parametrize("stage", ["sft", "reward"])
def test_adapters_on_a_base_in_16_bits_learn_the_same(stage, half, data, tmp_path):
    from rlhf.reward import train_reward_model
    from rlhf.sft import train_sft

    outs = []
    for dtype in ("float32", "bfloat16"):
        outs.append(out := tmp_path / dtype)
        out.mkdir()
        options = {"lora": LORA, "frozen_dtype": dtype, "epochs": 0.5}
        if stage == "sft":
            section: Any = toys.changed(toys.SFT, **options)
            start = BaseModelConfig(path=str(half))
            train_sft(section, start, data, out, runtime=toys.RUNTIME)
        else:
            section = toys.changed(toys.REWARD, pooling="last", **options)
            train_reward_model(section, data, half, out, runtime=toys.RUNTIME)
    assert_same = [(out / "curve.json").read_bytes() for out in outs]
    assert assert_same[0] == assert_same[1]
    toys.assert_same_weights(*outs)


def test_sft_by_qlora_learns_and_publishes_the_base_with_the_adapter(
    nf4, untrained, data, tmp_path
):
    """Merged into the base's own weights: those without an adapter come out bit by bit."""
    from rlhf.sft import train_sft

    lora = LoraConfig(r=4, alpha=16.0, target_modules=("q_proj", "down_proj"))
    start, gains = BaseModelConfig(path=str(untrained)), {}
    for dtype in ("float32", "nf4"):
        section: Any = toys.changed(toys.SFT, lora=lora, frozen_dtype=dtype)
        out = tmp_path / dtype
        out.mkdir()
        train_sft(section, start, data, out, runtime=toys.RUNTIME)
        losses = [row["loss"] for row in read_json(out / "curve.json")]
        gains[dtype] = losses[0] - losses[-1]
    assert gains["nf4"] > 0.7 * gains["float32"] > 0.05
    before, after = toys.weights(untrained), toys.weights(out)
    assert {k: (v.dtype, v.shape) for k, v in after.items()} == {
        k: (torch.bfloat16, v.shape) for k, v in before.items()
    }
    moved = {k for k in before if not torch.equal(before[k], after[k])}
    assert {k.split(".")[-2] for k in moved} == {"q_proj", "down_proj"}
    for name in moved:
        change = (after[name].float() - before[name].float()).double()
        # Of rank 4, but for the rounding to bfloat16; the rounding to 4 bits would fill all ranks.
        values = torch.linalg.svdvals(change)
        assert values[4:].square().sum() < 1e-3 * values.square().sum()
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())
    assert "quantization_config" not in read_json(out / "config.json")


def test_a_reward_model_by_qlora_tells_good_from_bad(half_reward, half):
    good, bad = Scorer(half_reward, CPU, 48)(["tea or cup?"] * 2, ["good", "bad"])
    assert good > bad + 0.5
    loaded = AutoModelForSequenceClassification.from_pretrained(half_reward)
    assert loaded.config.num_labels == 1
    before, after = toys.weights(half), toys.weights(half_reward)
    assert {w.dtype for w in after.values()} == {torch.bfloat16}
    same = {k for k in before if k in after and torch.equal(before[k], after[k])}
    assert same == {k for k in before if not k.endswith("_proj.weight")}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("critic", ["reward_model", "adapter"])
def test_ppo_by_qlora_on_a_shared_base_learns(train, half, half_reward, precision, critic):
    out = train(
        start=half, reward=toys.approve(half_reward), shared_base=True, precision=precision,
        critic=critic, total_episodes=96, **QLORA,
    )  # fmt: skip
    curve = read_json(out / "curve.json")
    assert curve[0]["kl"] == pytest.approx(0, abs=1e-4 if precision == "fp32" else 0.05)
    assert sum(r["reward"] for r in curve[-2:]) > sum(r["reward"] for r in curve[:2]) + 0.5
    before, after = toys.weights(half), toys.weights(out)
    assert {w.dtype for w in after.values()} == {torch.bfloat16}
    assert {k for k in before if not torch.equal(before[k], after[k])} <= {
        k for k in before if k.endswith("_proj.weight")
    }
    _, info = AutoModelForCausalLM.from_pretrained(out, output_loading_info=True)
    assert not any(info.values())


def test_without_learning_the_base_itself_is_published(nf4, train, half):
    """Not the numbers that 4 bits stand for."""
    out = train(start=half, total_episodes=16, learning_rate=1e-12, **QLORA)
    toys.assert_same_weights(half, out)


def test_policy_reference_and_critic_share_one_base_in_4_bits(half, half_reward):
    config: Any = toys.changed(toys.PPO, shared_base=True, **QLORA)
    models = build_trainer(config, half, toys.approve(half_reward), 0, CPU).models
    base = [p for n, p in models.policy.named_parameters() if n.endswith("stored")]
    assert {p.dtype for p in base} == {torch.uint8}
    assert len(base) == 7
    assert models.reference is None
    trained = [*models.parameters["policy"].values(), *models.parameters["critic"].values()]
    assert {p.dtype for p in trained} == {torch.float32}
    # A reward model of its own keeps the scores that the gate judged.
    config = toys.changed(toys.PPO, critic="head", **QLORA)
    models = build_trainer(config, half, toys.approve(half_reward), 0, CPU).models
    assert not holds_stored(models.scorer.model)
    assert holds_stored(models.policy)


def test_a_resumed_run_is_the_uninterrupted_one(nf4, train, half, tmp_path):
    options = {"start": half, **EVERYTHING, "frozen_dtype": "nf4", "total_episodes": 64}
    straight = train("straight", **options)
    with pytest.raises(Stopped):
        train("cut", stop_at=3, checkpoints=tmp_path / "c", **options)
    resumed = train("resumed", checkpoints=tmp_path / "c", **options)
    assert_same_run(straight, resumed)


def test_an_adapter_is_not_merged_into_numbers_in_4_bits(nf4, half):
    model = load_policy(half)
    store_frozen(model, "nf4", CPU, "ppo")
    adapted = with_adapter(model, LORA, "ppo")
    with pytest.raises(ValueError, match="own weights"):
        merge_adapter(adapted)
    assert merge_adapter(adapted, load_policy(half)) is not None


def test_an_emulated_gpu_trains_on_what_the_files_have(half, half_reward):
    """`auto`: bfloat16 on the device, and the same numbers as in float32."""
    config: Any = toys.changed(toys.PPO, lora=LORA, critic="head")
    found = {}
    for dtype in ("auto", "float32"):
        with emulated_cuda():
            section = config.model_copy(update={"frozen_dtype": dtype})
            trainer = build_trainer(section, half, toys.approve(half_reward), 0, GPU)
            policy = trainer.models.policy
            assert (
                holds_stored(policy)
                == holds_stored(trainer.models.scorer.model)
                == (dtype == "auto")
            )
            assert {p.device.type for p in policy.parameters()} == {"cuda"}
            with torch.no_grad():
                found[dtype] = policy(input_ids=IDS.to(GPU)).logits.cpu()
    assert torch.equal(found["auto"], found["float32"])


@pytest.mark.cpu_only("a GPU is found")
def test_4_bits_on_a_cpu_need_the_cpu_by_name(half, data, tmp_path, train):
    from rlhf.sft import train_sft

    auto = RuntimeConfig(threads=1)
    section: Any = toys.changed(toys.SFT, **QLORA)
    message = (
        r"sft\.frozen_dtype = 'nf4' needs a GPU.*; set it to auto, or runtime\.device to cpu to"
    )
    with pytest.raises(ConfigError, match=message):
        train_sft(section, BaseModelConfig(path=str(half)), data, tmp_path, runtime=auto)
    with pytest.raises(ConfigError, match=r"ppo\.frozen_dtype = 'nf4' needs a CUDA GPU.*'mps'"):
        check_frozen_dtype("nf4", "ppo", torch.device("mps"), auto)
    for dtype in ("auto", "bfloat16"):
        check_frozen_dtype(dtype, "ppo", prepare_device(auto), auto)


@pytest.mark.parametrize(
    ("module", "message"),
    [
        ("bitsandbytes", r"which is not installed; run `pip install bitsandbytes`, or set it to"),
        ("bitsandbytes.functional", r"can't be loaded here \(.*\); install a build for this torch"),
    ],
)
def test_a_package_that_is_missing_or_broken_is_named(nf4, module, message, monkeypatch, train):
    monkeypatch.setitem(sys.modules, module, None)  # as if it were not there
    with pytest.raises(
        ConfigError, match=rf"^ppo\.frozen_dtype = 'nf4' needs bitsandbytes, .*{message}"
    ):
        train(**QLORA)


def test_a_model_without_a_linear_layer_is_refused(nf4, half):
    with pytest.raises(ConfigError, match=r"ppo\.frozen_dtype = 'nf4' finds no linear layer to"):
        store_frozen(load_policy(half), "nf4", CPU, "ppo", keep=["layers"])


BASE = {"path": "some/model"}


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"base": BASE, "sft": {"frozen_dtype": "nf4"}}, "sft.*'nf4' needs lora: .*; set lora, or"),
        ({"base": BASE, "ppo": {"frozen_dtype": "nf4"}}, "ppo.*'nf4' needs lora: .*; set lora, or"),
        (
            {"base": BASE, "reward_model": {"frozen_dtype": "bfloat16"}},
            "reward_model.*'bfloat16' needs lora",
        ),
        (
            {"sft": QLORA},
            r"sft\.frozen_dtype = 'nf4' is for a pretrained base, and base\.path = none",
        ),
        ({"reward_model": QLORA}, r"reward_model\.frozen_dtype = 'nf4' is for a pretrained"),
        (
            {"base": BASE, "sft": {**QLORA, "processes": 2, "sharding": "fsdp"}},
            "'nf4' has weights that sharding = 'fsdp' can't",
        ),
        (
            {"base": BASE, "reward_model": {"lora": LORA}, "ppo": {**QLORA, "shared_base": True}},
            r"reward_model\.frozen_dtype = 'auto' trained it .* = 'nf4'; set both to nf4, or nei",
        ),
        ({"base": BASE, "ppo": {"frozen_dtype": "int4"}}, "frozen_dtype"),
    ],
)
def test_4_bits_that_can_not_be_are_refused_at_once(sections, message):
    with pytest.raises(ValueError, match=f"(?s){message}"):
        PipelineConfig(**sections)


def test_4_bits_that_can_be_are_accepted():
    shared = {"reward_model": QLORA, "ppo": {**QLORA, "shared_base": True}}
    assert PipelineConfig(base=BASE, sft=QLORA, **shared).ppo.frozen_dtype == "nf4"
    external = {"reward_model": {**QLORA, "base": "x/y"}}
    assert PipelineConfig(**external, judge={"base": "x/z"}).reward_model.lora
    assert PipelineConfig(**external, judge={"enabled": False}).reward_model.lora
    assert PipelineConfig(base=BASE, ppo={"frozen_dtype": "bfloat16"}).ppo.lora is None
