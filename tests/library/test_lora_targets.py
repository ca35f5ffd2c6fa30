"""The layers that `target_modules` names, on dense, Conv1D and mixture models."""

from __future__ import annotations

import copy
import logging

import peft
import pytest
import torch
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    JambaConfig,
    JambaForCausalLM,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from rlhf.config import LoraConfig, load_config
from rlhf.errors import ConfigError
from rlhf.modeling.lora import (
    CRITIC,
    POLICY,
    copy_adapter,
    fit_targets,
    lora_config,
    merge_adapter,
    parameters_of,
    target_module_errors,
    with_adapter,
)
from rlhf.modeling.reward import Scorer
from rlhf.ppo.train import build_trainer
from tests.library import toys
from tests.library.families import make_model
from tests.library.ppo_runs import LORA

ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]
DENSE = [*ATTENTION, "gate_proj", "up_proj", "down_proj"]


@pytest.fixture(scope="module")
def mixture():
    """Two layers: a dense one, and one with four experts."""
    torch.manual_seed(0)
    return Qwen3MoeForCausalLM(
        Qwen3MoeConfig(
            vocab_size=64, hidden_size=16, num_hidden_layers=2, num_attention_heads=2,
            num_key_value_heads=2, head_dim=8, intermediate_size=24, moe_intermediate_size=8,
            num_experts=4, num_experts_per_tok=2, mlp_only_layers=[0],
        )
    ).eval()  # fmt: skip


def targets(model, value, heads=()):
    return fit_targets(LoraConfig(target_modules=value), model, "sft", heads).target_modules


def ends(names):
    return {name.rpartition(".")[2] for name in names}


def refusal(model, value, heads=()):
    with pytest.raises(ConfigError) as caught:
        targets(model, value, heads)
    text = str(caught.value)
    assert text.startswith(f"sft.lora.target_modules = {value!r}: ")
    assert "\n" not in text
    return text


def adapted(model, config):
    with target_module_errors("sft", config):
        return peft.get_peft_model(model, lora_config(config, "CAUSAL_LM")).eval()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[q_proj,v_proj]", ("q_proj", "v_proj")),
        ('["q_proj", "v_proj"]', ("q_proj", "v_proj")),
        ("['q_proj']", ("q_proj",)),
        ("q_proj, v_proj", ("q_proj", "v_proj")),
        ("self_attn.q_proj", "self_attn.q_proj"),
        (" all-linear ", "all-linear"),
        (r".*\.[qv]_proj", r".*\.[qv]_proj"),
        ("[qv]_proj", "[qv]_proj"),
    ],
)
def test_forms_on_the_command_line(text, expected):
    config = load_config(None, [f"--sft.lora.target_modules={text}"]).config
    assert config.sft.lora.target_modules == expected  # pyright: ignore
    again = type(config).model_validate_json(config.model_dump_json())
    assert again == config


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "'' has an empty name; write all-linear"),
        ("[]", "('',) has an empty name"),
        ("[q_proj,]", "('q_proj', '') has an empty name"),
        (".*(q_proj", "is no regular expression (missing )"),
    ],
)
def test_what_names_no_layer_is_an_error_of_the_configuration(text, expected):
    with pytest.raises(ConfigError, match=r"^sft\.lora\.target_modules: ") as caught:
        load_config(None, [f"--sft.lora.target_modules={text}"])
    assert expected in str(caught.value)


def test_names_find_layers_by_their_end(policy):
    every = targets(policy, "all-linear")
    assert ends(every) == set(DENSE)
    assert targets(policy, "ALL-linear") == every
    assert ends(targets(policy, "q_proj")) == {"q_proj"}
    assert ends(targets(policy, ("q_proj", "mlp.up_proj"))) == {"q_proj", "up_proj"}
    assert targets(policy, "model.layers.0.self_attn.q_proj") == (
        "model.layers.0.self_attn.q_proj",
    )
    assert ends(targets(policy, r".*\.[qv]_proj")) == {"q_proj", "v_proj"}
    # The head and embeddings stay as they are, whatever a pattern matches.
    assert targets(policy, ".*") == every
    assert "proj" not in ends(every)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("qproj", "this model has no linear layer of the name 'qproj'"),
        # peft passes over the second name without a word.
        (("q_proj", "vproj"), "this model has no linear layer of the name 'vproj'"),
        ("proj", "no linear layer of the name 'proj'"),
        (r"model\.q_proj|x", "no linear layer of the name"),
        ("lm_head", "'lm_head' is the output head, which gets no adapter"),
        (("q_proj", "embed_tokens"), "'embed_tokens' is an embedding, which gets no adapter"),
        ("self_attn", "'self_attn' is no linear layer that can get an adapter"),
    ],
)
def test_a_name_without_a_layer_is_refused_with_those_that_there_are(policy, value, reason):
    text = refusal(policy, value)
    assert reason in text
    assert text.endswith(f"; choose from {', '.join(sorted(DENSE))}, or write all-linear")


def test_conv1d_layers_and_a_head_that_is_trained_in_full():
    gpt2 = GPT2LMHeadModel(GPT2Config(vocab_size=32, n_embd=8, n_layer=1, n_head=2, n_positions=16))
    assert ends(targets(gpt2, "all-linear")) == {"c_attn", "c_proj", "c_fc"}
    assert ends(targets(gpt2, "c_attn")) == {"c_attn"}
    # As if the last layer were a reward model's head.
    assert ends(targets(gpt2, "all-linear", ("transformer.h.0.mlp",))) == {"c_attn", "c_proj"}
    assert "is no linear layer" in refusal(gpt2, "c_fc", ("transformer.h.0.mlp",))


def test_layers_of_mamba_whose_weights_a_kernel_reads_get_no_adapter():
    model = JambaForCausalLM(
        JambaConfig(
            vocab_size=32, hidden_size=8, intermediate_size=8, num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
            expert_layer_period=4, expert_layer_offset=3, num_experts=2, mamba_d_state=4,
            mamba_dt_rank=4, use_mamba_kernels=False,
        )
    )  # fmt: skip
    assert "in_proj" in ends(targets(model, "all-linear"))
    assert not ends(targets(model, "all-linear")) & {"out_proj", "x_proj", "dt_proj", "conv1d"}
    assert "'out_proj' is no linear layer that can get an adapter" in refusal(model, "out_proj")


NO_PRODUCT = "is no linear layer that can get an adapter"


@pytest.mark.parametrize(
    ("family", "without", "reason", "has"),
    [
        ("llama4_text", "router", NO_PRODUCT, "q_proj"),  # returns two tensors
        ("phimoe", "router", NO_PRODUCT, "q_proj"),
        ("deepseek_v4", "o_a_proj", NO_PRODUCT, "o_b_proj"),  # a product for each group
        ("falcon", None, "", "query_key_value"),  # a forward pass of its own, but the usual one
        ("zamba", "q_proj", "has weights that several layers share", "in_proj"),
        ("zamba2-shared", "o_proj", "has weights that several layers share", "in_proj"),
    ],
)
def test_layers_that_an_adapter_would_break_get_none(family, without, reason, has, caplog):
    model = make_model(family, 64)
    with caplog.at_level(logging.WARNING, "rlhf"):
        found = ends(targets(model, "all-linear"))
    assert has in found
    assert without not in found
    if without:
        assert reason in refusal(model, without)
    assert any("that several layers share" in r.getMessage() for r in caplog.records) == (
        "share" in reason
    )
    with torch.no_grad():
        changed = with_adapter(model, LoraConfig(r=2), "sft", quiet=True).eval()
        for name, parameter in parameters_of(changed, POLICY).items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        ids = torch.arange(6)[None]
        expected = changed(ids).logits
        merged = merge_adapter(changed)(ids).logits
    torch.testing.assert_close(merged, expected, atol=1e-3, rtol=1e-3)


def test_fused_experts_are_left_out_and_named(mixture, caplog):
    with caplog.at_level(logging.WARNING, "rlhf"):
        every = targets(mixture, "all-linear")
    assert ends(every) == set(DENSE)
    (record,) = caplog.records
    total = sum(p.numel() for p in mixture.parameters())
    experts = 4 * 3 * 16 * 8  # four experts of three matrices
    assert record.getMessage() == (
        "sft.lora.target_modules = 'all-linear' gives no adapter to the fused experts "
        f"(model.layers.1.mlp.experts.gate_up_proj and 1 more, {100 * experts / total:.0f} % of "
        "the weights): they stay as they are"
    )
    text = refusal(mixture, "gate_up_proj")
    assert "'gate_up_proj' holds the fused experts of all layers, which get no adapter" in text


@pytest.mark.parametrize("value", ["all-linear", ("q_proj", "gate_proj"), "down_proj"])
def test_dense_layers_of_a_mixture_keep_their_adapters(mixture, value):
    """peft would take their names for the experts, of which it needs all, and drop the layers."""
    config = fit_targets(LoraConfig(r=2, target_modules=value), mixture, "sft")
    model = adapted(copy.deepcopy(mixture), config)
    found = {n.partition(".lora_")[0] for n in parameters_of(model, POLICY)}
    assert found == {f"base_model.model.{name}" for name in config.target_modules}
    # Another adapter on the same layers, of which the names are found as before.
    assert fit_targets(LoraConfig(r=2, target_modules=value), model, "ppo") == config
    copy_adapter(model, POLICY, CRITIC)
    assert len(parameters_of(model, CRITIC)) == len(parameters_of(model, POLICY))


@pytest.mark.parametrize("use_rslora", [False, True])
def test_the_merged_model_computes_as_with_the_adapter(mixture, use_rslora):
    config = LoraConfig(r=4, alpha=4.0, use_rslora=use_rslora, target_modules=("q_proj", "up_proj"))
    model = adapted(copy.deepcopy(mixture), fit_targets(config, mixture, "sft"))
    ids = torch.arange(6)[None]
    with torch.no_grad():
        for name, parameter in parameters_of(model, POLICY).items():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        layer = model.base_model.model.model.layers[0].self_attn.q_proj
        # Hu et al. 2021: α / r; Kalajdzievski 2023: α / √r.
        assert layer.scaling[POLICY] == (2.0 if use_rslora else 1.0)
        expected = model(ids).logits
        merged = merge_adapter(model)
        assert not torch.allclose(expected, mixture(ids).logits, atol=1e-3)
        torch.testing.assert_close(merged(ids).logits, expected, atol=1e-5, rtol=1e-4)


def test_stages_train_the_named_layers_alone_and_share_a_base(sft, data, tmp_path):
    """Reward model and policy have adapters on different layers of one base."""
    pytest.importorskip("trl")
    from rlhf.reward import train_reward_model

    lora = LoraConfig(r=2, alpha=8.0, target_modules=("q_proj", "up_proj"), use_rslora=True)
    config = toys.changed(toys.REWARD, lora=lora, epochs=1)
    train_reward_model(config, data, sft, tmp_path, runtime=toys.RUNTIME)  # pyright: ignore
    before, after = toys.weights(sft), toys.weights(tmp_path)
    moved = {k.split(".")[-2] for k in before if not torch.equal(before[k], after[k])}
    assert moved == {"q_proj", "up_proj"}
    ppo = toys.changed(toys.PPO, shared_base=True, lora=toys.changed(LORA, target_modules="v_proj"))
    trainer = build_trainer(ppo, sft, toys.approve(tmp_path), 0, toys.DEVICE)  # pyright: ignore
    policy = trainer.models.policy
    assert {n.split(".")[-4] for n in parameters_of(policy, POLICY)} == {"v_proj"}
    assert {n.split(".")[-4] for n in parameters_of(policy, CRITIC)} == {"q_proj", "up_proj"}
    scorer = trainer.environment.function.__self__.scorer  # pyright: ignore
    rows = (["tea or cup?", "jar or mug?"], ["good", "bad bad"])
    expected = Scorer(tmp_path, toys.DEVICE, 64)(*rows)
    torch.testing.assert_close(scorer(*rows), expected, atol=1e-4, rtol=1e-4)
