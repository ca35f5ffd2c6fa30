"""Sampling and log-probabilities: the draw, the mask, and the ratio that starts at one."""

from __future__ import annotations

from dataclasses import replace

import peft
import pytest
import torch
from torch import nn

from rlhf.modeling.critic import critic_from
from rlhf.ppo.decode import pad_left, position_ids
from rlhf.ppo.rollout import (
    Replies,
    Sampling,
    generate,
    log_probs_and_entropy,
    reply_values,
)
from tests.library.toys import DEVICE, within

pytestmark = pytest.mark.device
PROMPTS = ["tea or cup?", "jar?", "pot or mug, which is good?"]


@pytest.fixture
def rows(renderer):
    return [renderer.encode_prompt(p, 40) for p in PROMPTS]


def sample(policy, renderer, rows, seed=0, **options):
    return generate(policy, rows, renderer.tokenizer, Sampling(8, **options), seed)


def test_pad_left():
    ids, mask = pad_left([[5, 6, 7], [8]], pad=0)
    assert ids.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask.tolist() == [[1, 1, 1], [0, 0, 1]]


def test_positions_begin_at_the_first_real_token():
    assert position_ids(torch.tensor([[0, 0, 1, 1, 1]])).tolist() == [[0, 0, 0, 1, 2]]


def test_the_draw_depends_on_the_seed_alone(policy, renderer, rows):
    torch.manual_seed(1)
    state, following = torch.get_rng_state(), torch.rand(9, device=DEVICE)
    torch.manual_seed(1)
    first = sample(policy, renderer, rows, seed=7)
    # The global generators are untouched.
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(torch.rand(9, device=DEVICE), following)
    torch.manual_seed(2)
    assert torch.equal(sample(policy, renderer, rows, seed=7).ids, first.ids)
    assert not torch.equal(sample(policy, renderer, rows, seed=8).reply_ids, first.reply_ids)


def test_temperature_zero_takes_the_likeliest_token(policy, renderer, rows):
    replies = sample(policy, renderer, rows, temperature=0.0)
    for prompt, reply in zip(rows, replies.rows(), strict=True):
        ids = list(prompt)
        for token in reply:
            best = policy(torch.tensor([ids], device=DEVICE)).logits[0, -1].argmax().item()
            assert token == best
            ids.append(token)


class Scripted:
    """Stands in for a sampler: the tokens drawn are known."""

    def __init__(self, replies: list[list[int]]) -> None:
        self.replies = torch.tensor(replies, device=DEVICE)

    def __call__(self, logits, rows, step):
        assert len(logits) == len(rows)
        return self.replies[rows, step]


@pytest.fixture
def scripted(monkeypatch):
    """Makes `generate` draw the given tokens."""

    def script(replies):
        monkeypatch.setattr("rlhf.ppo.rollout.Sampler", lambda *_: Scripted(replies))

    return script


def test_masks_come_from_positions(policy, renderer, scripted):
    end, pad = renderer.tokenizer.eos_token_id, renderer.tokenizer.pad_token_id
    scripted([[9, end, pad, pad], [9, pad, end, pad], [9, 9, 9, 9], [end, end, 9, pad]])
    replies = generate(policy, [[8]] * 4, renderer.tokenizer, Sampling(4), 0)
    # up to and including the first end; a pad before it was sampled and counts
    assert replies.mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 1, 0], [1, 1, 1, 1], [1, 0, 0, 0]]
    assert replies.finished.tolist() == [True, True, False, True]
    assert replies.attention.tolist() == [[1, *m] for m in replies.mask.int().tolist()]
    assert replies.rows() == [[9, end], [9, pad, end], [9, 9, 9, 9], [end]]


def test_take_cuts_to_the_longest_of_its_rows():
    mask = torch.tensor([[1, 1, 1], [1, 0, 0], [1, 1, 0]]).bool()
    replies = Replies(
        torch.arange(15).reshape(3, 5),
        torch.cat([torch.ones(3, 2, dtype=torch.long), mask.long()], 1),
        mask,
        torch.tensor([False, True, True]),
    ).to(DEVICE)
    part = replies.take(torch.tensor([2, 1]))
    assert part.ids.tolist() == [[10, 11, 12, 13], [5, 6, 7, 8]]
    assert part.attention.shape == (2, 4)
    assert part.reply_ids.tolist() == [[12, 13], [7, 8]]
    assert part.mask.int().tolist() == [[1, 1], [1, 0]]
    assert part.finished.tolist() == [True, True]


def test_log_probs_by_hand(policy, renderer, rows):
    replies = sample(policy, renderer, rows[:1])
    log_probs, entropy = log_probs_and_entropy(policy, replies, 1.0)
    prompt, reply = rows[0], replies.rows()[0]
    log_p = policy(torch.tensor([prompt + reply], device=DEVICE)).logits[0].log_softmax(-1)
    for i, token in enumerate(reply):
        at = log_p[len(prompt) - 1 + i]
        assert log_probs[0, i].item() == pytest.approx(at[token].item(), abs=within(1e-5, 1e-4))
        uncertainty = -(at.exp() @ at).item()
        assert entropy[0, i].item() == pytest.approx(uncertainty, abs=within(1e-4, 1e-3))


def test_the_first_ratio_is_exactly_one(policy, renderer, rows):
    replies = sample(policy, renderer, rows, top_k=5, temperature=0.7)
    with torch.no_grad():
        old, _ = log_probs_and_entropy(policy, replies, 0.7)
    new, _ = log_probs_and_entropy(policy.train(), replies, 0.7)
    ratio = (new - old).exp()
    torch.testing.assert_close(ratio, torch.ones_like(old), atol=within(0.0, 1e-5), rtol=0)


def test_padding_on_the_left_changes_nothing(policy, renderer, rows):
    replies = sample(policy, renderer, rows)
    together, _ = log_probs_and_entropy(policy, replies, 1.0)
    for i, prompt in enumerate(rows):
        reply = replies.rows()[i]
        ids = torch.tensor([prompt + reply])
        full = torch.ones(1, len(reply), dtype=torch.bool)
        alone = Replies(ids, torch.ones_like(ids), full, torch.tensor([True])).to(DEVICE)
        log_probs, _ = log_probs_and_entropy(policy, alone, 1.0)
        torch.testing.assert_close(
            log_probs[0], together[i, : len(reply)], atol=within(1e-5, 1e-4), rtol=0
        )


def test_temperature_divides_the_logits(policy, renderer, rows):
    replies = sample(policy, renderer, rows)
    log_probs, _ = log_probs_and_entropy(policy, replies, 2.0)
    nn.init.constant_(policy.model.norm.weight, 0.5)  # halves the logits, as temperature 2 does
    halved, _ = log_probs_and_entropy(policy, replies, 1.0)
    torch.testing.assert_close(log_probs, halved, atol=within(1e-5, 1e-4), rtol=0)


def test_a_cold_draw_is_greedy(policy, renderer, rows):
    greedy = sample(policy, renderer, rows, temperature=0.0)
    assert torch.equal(sample(policy, renderer, rows, temperature=1e-4).ids, greedy.ids)
    assert not torch.equal(sample(policy, renderer, rows, temperature=1.0).ids, greedy.ids)


def ranks(policy, replies):
    """Of each sampled token: how many were likelier, and their probability together."""
    width, attention = replies.mask.shape[1], replies.attention.to(DEVICE)
    logits = policy(
        input_ids=replies.ids, attention_mask=attention, position_ids=position_ids(attention)
    ).logits[:, -width - 1 : -1]
    p = logits.softmax(-1)
    chosen = p.gather(-1, replies.reply_ids[..., None])
    above = p > chosen
    return above.sum(-1)[replies.mask], (p * above).sum(-1)[replies.mask]


def test_filters_restrict_the_draw_and_not_the_log_probs(policy, renderer, rows):
    many = rows * 8
    free, _ = ranks(policy, sample(policy, renderer, many))
    assert free.max() > 50  # top_k = 0 is no filter, and not transformers' default of 50
    by_k = sample(policy, renderer, many, top_k=3)
    assert ranks(policy, by_k)[0].max() <= 2
    by_p = sample(policy, renderer, many, top_p=0.3)
    assert ranks(policy, by_p)[1].max() < 0.3
    # Over the whole vocabulary the probabilities add up to one, whatever the filter was.
    log_probs, _ = log_probs_and_entropy(policy, by_k, 1.0)
    assert log_probs[by_k.mask].exp().mean() < 0.1  # among 3 tokens it would be about a third


@pytest.mark.parametrize("adapters", [False, True])
def test_a_models_own_generation_defaults_stay_out(policy, renderer, rows, adapters):
    plain = sample(policy, renderer, rows, temperature=0.0)
    policy.generation_config.repetition_penalty = 5.0
    policy.generation_config.min_new_tokens = 8
    own = policy.generation_config
    wrapped = policy
    if adapters:
        wrapped = peft.get_peft_model(
            policy, peft.LoraConfig(target_modules="all-linear", task_type="CAUSAL_LM")
        )
    assert torch.equal(sample(wrapped, renderer, rows, temperature=0.0).ids, plain.ids)
    assert policy.generation_config is own


def test_values_belong_to_the_states_before_and_after_each_token(policy, renderer, rows):
    critic = critic_from(policy)
    nn.init.normal_(critic.value_head.weight)
    critic.to(DEVICE)
    replies = sample(policy, renderer, rows)
    mask = replies.valid & (torch.arange(8) < torch.tensor([[8], [3], [1]]))
    attention = torch.cat([replies.attention[:, :-8], mask.long()], 1)
    replies = replace(replies, mask=mask.to(DEVICE), attention=attention)
    values = reply_values(critic, replies)
    assert values.shape == (3, 9)
    for i, (prompt, reply) in enumerate(zip(rows, replies.rows(), strict=True)):
        ids = torch.tensor([prompt + reply], device=DEVICE)
        positions = torch.arange(ids.shape[1], device=DEVICE)[None]
        alone = critic(ids, torch.ones_like(ids), positions)[0]
        n = len(reply)
        expected = alone[len(prompt) - 1 :]  # after the prompt, ..., after the last token
        assert len(expected) == n + 1
        close = within(1e-5, 1e-4)
        torch.testing.assert_close(values[i, : n + 1], expected, atol=close, rtol=0)
        assert values[i, n + 1 :].abs().sum() == 0
