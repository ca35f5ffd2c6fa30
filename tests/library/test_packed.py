"""Packed forward passes: the same numbers as padded ones, for several architectures."""

from __future__ import annotations

import copy
from typing import Any

import peft
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from transformers import (
    Cohere2Config,
    Cohere2ForCausalLM,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from rlhf.modeling.critic import Critic, critic_from
from rlhf.modeling.decoders import pad_left
from rlhf.modeling.generate import Replies
from rlhf.modeling.logprobs import (
    log_probs_and_entropy,
    log_probs_entropy_values,
    reply_logits,
    reply_values,
    token_log_probs,
)
from rlhf.modeling.packed import (
    Packed,
    arguments_of,
    packs,
    rectangles_of,
    take_rows,
)
from rlhf.modeling.reward import token_batches
from rlhf.modeling.structure import has_plain_head
from tests.examples import examples
from tests.library.toys import DEVICE, within

pytestmark = pytest.mark.device


VOCABULARY = 61


SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
    # wide, so that what a token attends to matters
    "initializer_range": 0.3,
}


GPT2 = {
    "vocab_size": VOCABULARY,
    "n_embd": 32,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 64,
    "initializer_range": 0.3,
}


EAGER: dict[str, Any] = {"attn_implementation": "eager"}


PACKED = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "gqa": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, num_key_value_heads=2)),
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "scaled": lambda: CohereForCausalLM(CohereConfig(**SMALL, logit_scale=0.3)),
}


PADDED = {
    "capped": lambda: Gemma2ForCausalLM(
        Gemma2Config(**SMALL, num_key_value_heads=2, head_dim=8, **EAGER)
    ),
    "window": lambda: MistralForCausalLM(
        MistralConfig(**SMALL, num_key_value_heads=4, sliding_window=6)
    ),
    "eager": lambda: LlamaForCausalLM(LlamaConfig(**SMALL, **EAGER)),
    "mixed": lambda: Cohere2ForCausalLM(Cohere2Config(**SMALL, sliding_window=6)),
}


ALL = {**PACKED, **PADDED}


def make(name, seed=0):
    torch.manual_seed(seed)
    return ALL[name]().eval().to(DEVICE)


def replies_of(prompts, replies, pad=0):
    """A batch as `generate` makes it, of the given token lists."""
    ids, attention = pad_left(prompts, pad)
    width = max(len(r) for r in replies)
    tail = torch.tensor([r + [pad] * (width - len(r)) for r in replies])
    mask = torch.tensor([[True] * len(r) + [False] * (width - len(r)) for r in replies])
    return Replies(
        torch.cat([ids, tail], 1),
        torch.cat([attention, mask.long()], 1),
        mask,
        torch.ones(len(replies), dtype=torch.bool),
    ).to(DEVICE)


def some_rows(lengths, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randint(3, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


PROMPTS = some_rows([5, 9, 2, 9, 1], 1)


REPLIES = some_rows([7, 1, 12, 7, 3], 2)


BATCH = replies_of(PROMPTS, REPLIES)


def alone(model, i):
    """Logits after each token, computed for one row by the model itself."""
    ids = torch.tensor([PROMPTS[i] + REPLIES[i]], device=DEVICE)
    return model(ids, use_cache=False).logits[0, len(PROMPTS[i]) - 1 :]


@pytest.mark.parametrize("name", ALL)
def test_log_probs_are_those_of_each_row_alone(name):
    model = make(name)
    expected = [alone(model, i).log_softmax(-1) for i in range(len(PROMPTS))]
    assert packs(model, 21) == (name in PACKED)
    log_probs, entropy = log_probs_and_entropy(model, BATCH, 1.0)
    logits = reply_logits(model, BATCH, 1.0).split([len(r) for r in REPLIES])
    close = within(2e-5, 1e-4)
    for i, reply in enumerate(REPLIES):
        log_p = expected[i][:-1]
        n = len(reply)
        chosen = log_p[torch.arange(n), reply]
        torch.testing.assert_close(log_probs[i, :n], chosen, atol=close, rtol=0)
        uncertainty = -(log_p.exp() * log_p).sum(-1)
        torch.testing.assert_close(entropy[i, :n], uncertainty, atol=within(5e-5, 1e-4), rtol=0)
        assert log_probs[i, n:].abs().sum() == entropy[i, n:].abs().sum() == 0
        torch.testing.assert_close(logits[i].log_softmax(-1), log_p, atol=close, rtol=0)


@pytest.mark.parametrize("name", ["capped", "scaled", "mixed"])
def test_a_head_that_scales_or_caps_is_noticed(name):
    assert not has_plain_head(make(name))
    assert has_plain_head(make("llama"))


def loss_of(policy, critic, batch, temperature=0.7):
    log_probs, entropy = log_probs_and_entropy(policy, batch, temperature)
    values = reply_values(critic, batch)
    weights = torch.linspace(-1, 1, log_probs.numel()).view(log_probs.shape).to(log_probs)
    return (weights * log_probs).sum() + 0.3 * (weights * entropy).sum() + values.square().sum()


def gradients(*models):
    return {
        f"{i}.{name}": p.grad
        for i, model in enumerate(models)
        for name, p in model.named_parameters()
        if p.requires_grad
    }


def with_critic(model):
    critic = critic_from(copy.deepcopy(model))
    nn.init.normal_(critic.value_head.weight)
    return critic.to(DEVICE)


@pytest.mark.parametrize("name", PACKED)
@pytest.mark.parametrize("kind", ["plain", "float64", "lora", "checkpointed"])
def test_gradients_are_those_of_padded_batches(name, kind, monkeypatch):
    policy = make(name)
    critic = with_critic(policy)
    if kind == "float64":
        policy, critic = policy.double(), critic.double()
    if kind == "lora":
        config = peft.LoraConfig(
            target_modules="all-linear", init_lora_weights=False, fan_in_fan_out=name == "gpt2"
        )
        policy = peft.get_peft_model(policy, config).eval()
    if kind == "checkpointed":  # transformers checkpoints in training mode only
        newer = getattr(policy, "activation_checkpointing_enable", None)
        (newer or policy.gradient_checkpointing_enable)()  # transformers 5.17 has only this
        policy.train()
        for module in policy.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0
    packed = loss_of(policy, critic, BATCH)
    packed.backward()
    ours = {k: None if g is None else g.clone() for k, g in gradients(policy, critic).items()}
    policy.zero_grad()
    critic.zero_grad()
    monkeypatch.setattr("rlhf.modeling.logprobs.packs", lambda *_: False)
    padded = loss_of(policy, critic, BATCH)
    padded.backward()
    tolerance = 1e-10 if kind == "float64" else within(1e-4, 1e-3)
    torch.testing.assert_close(packed, padded, atol=tolerance, rtol=1e-5)
    for key, theirs in gradients(policy, critic).items():
        if theirs is None:
            assert ours[key] is None
            continue
        scale = theirs.abs().max().clamp(min=1)
        bounds = {"atol": tolerance * scale.item(), "rtol": within(1e-4, 1e-3)}
        torch.testing.assert_close(ours[key], theirs, **bounds)


def test_bf16_autocast_is_close_and_lowers_the_head_too(monkeypatch):
    policy = make("llama")
    seen = []

    def watched(head, hidden, *rest):
        seen.append(hidden.dtype)
        return token_log_probs(head, hidden, *rest)

    monkeypatch.setattr("rlhf.modeling.logprobs.token_log_probs", watched)
    exact, _ = log_probs_and_entropy(policy, BATCH, 1.0)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        rough, _ = log_probs_and_entropy(policy, BATCH, 1.0)
        monkeypatch.setattr("rlhf.modeling.logprobs.packs", lambda *_: False)
        padded, _ = log_probs_and_entropy(policy, BATCH, 1.0)
    assert rough.dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16, torch.bfloat16]
    assert (rough - exact).abs().max() > 1e-4
    assert (rough - exact).abs().max() < 3 * (padded - exact).abs().max() + 0.1


def test_one_forward_gives_log_probs_entropy_and_values():
    policy = make("gqa")
    head = nn.Linear(32, 1).to(DEVICE)
    seen = log_probs_entropy_values(policy, head, BATCH, 0.7)
    critic = Critic(policy.model)
    critic.value_head = head
    expected = (*log_probs_and_entropy(policy, BATCH, 0.7), reply_values(critic, BATCH))
    for ours, theirs in zip(seen, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=within(1e-5, 1e-4), rtol=0)
    assert seen[2].shape == (5, 13)


class TestInvariance:
    @settings(max_examples=examples(15), deadline=None)
    @given(
        lengths=st.lists(st.tuples(st.integers(1, 9), st.integers(1, 9)), min_size=1, max_size=6),
        data=st.data(),
    )
    @pytest.mark.parametrize("name", ["gpt2", "gqa"])
    def test_padding_and_order_change_nothing(self, name, lengths, data):
        model = make(name).double()
        prompts = some_rows([p for p, _ in lengths], 5)
        replies = some_rows([r for _, r in lengths], 6)
        order = data.draw(st.permutations(range(len(lengths))))
        together = replies_of([prompts[i] for i in order], [replies[i] for i in order], pad=3)
        with torch.no_grad():
            log_probs, _ = log_probs_and_entropy(model, together, 1.0, entropy=False)
            for row, i in enumerate(order):
                single, _ = log_probs_and_entropy(model, replies_of([prompts[i]], [replies[i]]), 1)
                n = len(replies[i])
                close = within(1e-12, 1e-9)
                torch.testing.assert_close(log_probs[row, :n], single[0], atol=close, rtol=0)


def test_one_model_packs_or_not_by_the_length_of_the_text():
    model = make("window")
    assert packs(model, 6)
    assert not packs(model, 7)


def test_a_model_that_comes_out_wrong_is_given_padded_batches(monkeypatch):
    model = make("gqa")
    own = model.config._attn_implementation
    right = Packed.attend
    monkeypatch.setattr(Packed, "attend", lambda *args, **kw: right(*args, **kw) * 1.01)
    assert not packs(model, 20)
    assert model.config._attn_implementation == own


def test_outside_our_calls_a_model_is_as_before():
    model = make("gqa")
    ids, attention = (t.to(DEVICE) for t in pad_left(PROMPTS, 0))
    before = model(ids, attention_mask=attention).logits
    own = model.config._attn_implementation
    assert packs(model, 20)
    assert model.config._attn_implementation != own
    assert torch.equal(model(ids, attention_mask=attention).logits, before)
    assert "attn" not in str(sorted(model.config.to_dict()))


def test_rounding_up_changes_nothing(monkeypatch):
    """Where few shapes should occur, one more sequence is appended that nobody reads."""
    policy = make("gqa").double()
    critic = with_critic(policy).double()
    plain = loss_of(policy, critic, BATCH)
    plain.backward()
    expected = {k: g.clone() for k, g in gradients(policy, critic).items() if g is not None}
    policy.zero_grad()
    critic.zero_grad()
    for module in ("rlhf.modeling.packed", "rlhf.modeling.logprobs"):
        monkeypatch.setattr(f"{module}.rounding", lambda n, _: -n % 32)
    assert arguments_of(BATCH.ids, BATCH.attention, True)[0]["input_ids"].shape == (1, 64)
    loss = loss_of(policy, critic, BATCH)
    loss.backward()
    torch.testing.assert_close(loss, plain, atol=1e-10, rtol=0)
    seen = gradients(policy, critic)
    for key, gradient in expected.items():
        torch.testing.assert_close(seen[key], gradient, atol=1e-10, rtol=1e-10)


@pytest.mark.cpu_only("elsewhere torch's kernel takes all lengths")
def test_long_texts_and_short_ones_attend_alike(monkeypatch):
    """Beyond a length torch's own kernel is used."""
    policy = make("gqa")
    ours, _ = log_probs_and_entropy(policy, BATCH, 1.0)
    monkeypatch.setattr("rlhf.modeling.attention.LONGEST", 4)
    theirs, _ = log_probs_and_entropy(policy, BATCH, 1.0)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=0)
    assert not torch.equal(ours, theirs)


def test_rows_of_similar_length_share_an_attention_call():
    groups = rectangles_of([30, 90, 31, 30, 88])
    assert [sorted(g) for g in groups] == [[1, 4], [0, 2, 3]]
    assert [g[0] for g in groups] == [1, 2]  # the longest first: it gives the width


def test_arguments_of_a_packed_row():
    ids = torch.tensor([[0, 7, 8], [4, 5, 6]], device=DEVICE)
    attention = torch.tensor([[0, 1, 1], [1, 1, 1]])
    arguments, place = arguments_of(ids, attention, packed=True)
    assert arguments["input_ids"].tolist() == [[7, 8, 4, 5, 6]]
    assert arguments["position_ids"].tolist() == [[0, 1, 0, 1, 2]]
    assert place[attention.bool()].tolist() == [0, 1, 2, 3, 4]


def test_equal_lengths_are_read_in_place():
    assert Packed.of([4, 4, 4], DEVICE).fill is None


def test_take_rows_has_the_gradient_of_indexing():
    source = torch.randn(6, 3, dtype=torch.float64).to(DEVICE).requires_grad_()
    index = torch.tensor([4, 0, 5], device=DEVICE)
    torch.autograd.gradcheck(lambda s: take_rows(s, index), (source,))
    assert torch.equal(take_rows(source, index), source[index])


def test_batches_stay_within_the_budget():
    assert token_batches([5, 1, 9, 3], 8) == [[1, 3], [0], [2]]
