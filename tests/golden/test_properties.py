"""Properties of PPO's formulas for all inputs, in single and double precision."""

from __future__ import annotations

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.config.ppo import KLSection
from rlhf.ppo.losses import (
    RunningScale,
    entropy_bonus,
    exact_kl,
    gae,
    kl_controller,
    kl_estimate,
    last_valid,
    masked_mean,
    policy_loss,
    shaped_rewards,
    value_loss,
    value_mask,
    whiten,
)
from tests.examples import examples
from tests.library.toys import DEVICE

pytestmark = pytest.mark.device
DTYPES = st.sampled_from([torch.float32, torch.float64])
quick = settings(max_examples=examples(40), deadline=None)
number = st.floats(-4, 4, width=32)
junk = st.sampled_from([0.0, 9.0, -1e30, math.inf, math.nan])
shares = st.sampled_from([0.0, 0.25, 0.9, 0.95, 1.0])


def tolerance(dtype):
    return {"rtol": 1e-4, "atol": 1e-4} if dtype == torch.float32 else {"rtol": 1e-9, "atol": 1e-9}


class Chunk:
    """Random tensors of one (batch, time) with one mask, and what to pad them with."""

    def __init__(self, mask, seed, dtype):
        self.mask, self.dtype = mask, dtype
        self.n = float(mask.sum())
        generator = torch.Generator().manual_seed(seed)
        draw = torch.randn(6, *mask.shape, generator=generator, dtype=torch.float64)
        draws = draw.to(DEVICE, dtype)
        self.old, self.advantages, self.values, self.returns, self.rewards = draws[:5]
        self.new = self.old + draws[5] * 0.5
        self.scores = draws[0, :, 0] * 3

    def padded(self, left, right, filler):
        """The same chunk with more columns, which hold `filler`."""
        wide = object.__new__(Chunk)
        wide.__dict__ |= self.__dict__
        for name in ("mask", "old", "new", "advantages", "values", "returns", "rewards"):
            value = False if name == "mask" else filler
            pad = torch.nn.functional.pad(getattr(self, name), (left, right), value=value)
            setattr(wide, name, pad)
        return wide

    def rows(self, index):
        part = object.__new__(Chunk)
        part.__dict__ |= self.__dict__
        for name in ("mask", "old", "new", "advantages", "values", "returns", "rewards", "scores"):
            setattr(part, name, getattr(self, name)[index])
        return part


@st.composite
def chunks(draw):
    width = draw(st.integers(1, 6))
    lengths = draw(st.lists(st.integers(1, width), min_size=1, max_size=4))
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return Chunk(mask.to(DEVICE), draw(st.integers(0, 10**6)), draw(DTYPES))


def losses(c, dual_clip=2.0):
    policy, sums = policy_loss(c.new, c.old, c.advantages, c.mask, 0.2, c.n, dual_clip)
    value = value_loss(c.values, c.old, c.returns, c.mask, 0.2, c.n)
    bonus = entropy_bonus(c.values, c.mask, c.n)
    return {**sums, "policy": policy, "value": value, "entropy": bonus}


def per_token(c, gamma=0.9, lam=0.8):
    advantages, returns = gae(c.rewards, c.values, c.mask, gamma, lam)
    found = {"advantages": advantages, "returns": returns}
    for variance in ("biased", "unbiased"):
        for shift in (True, False):
            found[f"{variance} {shift}"] = whiten(c.values, c.mask, variance, shift)
    return found


@given(chunks(), st.integers(0, 3), st.integers(0, 3), junk)
@quick
def test_padding_on_either_side_changes_nothing(chunk, left, right, filler):
    wide = chunk.padded(left, right, filler)
    width = chunk.mask.shape[1]
    for name, value in losses(chunk).items():
        torch.testing.assert_close(losses(wide)[name], value, **tolerance(chunk.dtype))
    mean = masked_mean(wide.values, wide.mask)
    torch.testing.assert_close(mean, masked_mean(chunk.values, chunk.mask))
    plain, padded = per_token(chunk), per_token(wide)
    for name, value in plain.items():
        inside = padded[name][:, left : left + width]
        torch.testing.assert_close(inside, value, **tolerance(chunk.dtype))
        assert not padded[name][~wide.mask].any()
    assert (last_valid(wide.mask) == last_valid(chunk.mask) + left).all()


@given(chunks(), st.integers(0, 3), junk, st.sampled_from(["last", "past_end"]))
@quick
def test_padding_changes_no_reward(chunk, right, filler, position):
    cap = 6
    plain_states = value_mask(chunk.mask, cap, position)
    plain = shaped_rewards(chunk.scores, chunk.values, chunk.mask, plain_states, 0.3)
    wide = chunk.padded(0, right, filler)
    states = value_mask(wide.mask, cap, position)
    padded = shaped_rewards(chunk.scores, wide.values, wide.mask, states, 0.3)
    width = plain.shape[1]
    assert torch.equal(states[:, :width], plain_states)
    assert torch.equal(padded[:, :width], plain)
    assert not states[:, width:].any()
    assert not padded[:, width:].any()
    # Every score arrives, once, and where it should.
    lengths = chunk.mask.sum(1)
    more = (lengths < cap).long() if position == "past_end" else 0
    assert torch.equal(states.sum(1), lengths + more)
    free = shaped_rewards(chunk.scores, chunk.values, chunk.mask, plain_states, 0.0)
    assert torch.equal(free.sum(1), chunk.scores)


@given(chunks(), st.sampled_from([1, 2, 3]))
@quick
def test_cuts_into_micro_batches_change_no_loss_and_no_gradient(chunk, size):
    def total(parts):
        new = chunk.new.clone().requires_grad_()
        values = chunk.values.clone().requires_grad_()
        loss = 0
        for index in parts:
            part = chunk.rows(index)
            part.new, part.values = new[index], values[index]
            found = losses(part)
            loss = loss + found["policy"] + found["value"] - 0.01 * found["entropy"]
        return loss, *torch.autograd.grad(loss, (new, values))

    rows = torch.arange(len(chunk.mask), device=DEVICE)
    for whole, cut in zip(total([rows]), total(rows.flip(0).split(size)), strict=True):
        torch.testing.assert_close(cut, whole, **tolerance(chunk.dtype))


@given(chunks(), shares, shares)
@quick
def test_gae_is_the_sum_over_all_later_errors(chunk, gamma, lam):
    advantages, returns = gae(chunk.rewards, chunk.values, chunk.mask, gamma, lam)
    rewards, values = chunk.rewards.double(), chunk.values.double()
    for i, n in enumerate(chunk.mask.sum(1).tolist()):
        following = torch.cat([values[i, 1:n], values.new_zeros(1)])
        delta = rewards[i, :n] + gamma * following - values[i, :n]
        for t in range(n):
            weights = (gamma * lam) ** torch.arange(n - t, dtype=torch.float64, device=DEVICE)
            expected = (weights * delta[t:]).sum().to(chunk.dtype)
            close = tolerance(chunk.dtype)
            torch.testing.assert_close(advantages[i, t], expected, **close)
            torch.testing.assert_close(returns[i, t], expected + chunk.values[i, t], **close)


@given(chunks(), st.sampled_from([None, 2.0]))
@quick
def test_a_ratio_of_one_gives_minus_the_mean_advantage(chunk, dual_clip):
    chunk.new = chunk.old.clone()
    found = losses(chunk, dual_clip)
    mean = masked_mean(chunk.advantages, chunk.mask)
    torch.testing.assert_close(found["policy"], -mean, **tolerance(chunk.dtype))
    assert found["clip_fraction"] == found["approx_kl"] == 0


@given(chunks(), st.floats(1.5, 4))
@quick
def test_the_dual_clip_bounds_bad_tokens_alone(chunk, bound):
    def loss(advantages, dual_clip):
        args = (advantages, chunk.mask, 0.2, 1.0, dual_clip)
        return policy_loss(chunk.new + 3, chunk.old, *args)[0]  # ratios of about 20

    bad, good = -chunk.advantages.abs(), chunk.advantages.abs()
    most = float(bound * (good * chunk.mask).sum())
    assert float(loss(bad, bound)) <= most * (1 + 1e-5)
    assert loss(bad, bound) <= loss(bad, None)
    assert loss(good, bound) == loss(good, None)


@given(chunks())
@quick
def test_clips_are_never_optimistic(chunk):
    found = losses(chunk, None)
    terms = (chunk.new - chunk.old).exp() * chunk.advantages
    unclipped = -masked_mean(terms, chunk.mask)
    assert found["policy"] >= unclipped - 1e-5
    args = (chunk.values, chunk.old, chunk.returns, chunk.mask)
    assert found["value"] >= value_loss(*args, None, chunk.n)


@given(chunks(), st.sampled_from(["biased", "unbiased"]))
@quick
def test_whitened_values_have_mean_0_and_variance_1(chunk, variance):
    if chunk.n < 2:
        return
    close = {"abs": 1e-4 if chunk.dtype == torch.float32 else 1e-5}
    values = whiten(chunk.values, chunk.mask, variance)[chunk.mask]
    assert float(values.mean()) == pytest.approx(0, **close)
    correction = 1 if variance == "unbiased" else 0
    before = float(chunk.values[chunk.mask].double().var(correction=correction))
    # 1e-8 is added to the variance, which shows where values are almost equal.
    expected = before / (before + 1e-8)
    assert float(values.var(correction=correction)) == pytest.approx(expected, **close)
    kept = whiten(chunk.values, chunk.mask, variance, shift_mean=False)[chunk.mask]
    assert float(kept.mean()) == pytest.approx(float(chunk.values[chunk.mask].mean()), **close)


@given(st.lists(st.tuples(st.floats(-30, 0), st.floats(-30, 0)), min_size=1), DTYPES)
@quick
def test_k2_and_k3_are_never_negative(pairs, dtype):
    log_probs, reference = torch.tensor([pairs], dtype=dtype, device=DEVICE).unbind(-1)
    near = log_probs + (reference - log_probs) * 1e-7  # where digits run out
    for other in (reference, near, log_probs):
        for estimator in ("k2", "k3"):
            estimate = kl_estimate(log_probs, other, estimator)
            assert estimate.dtype == dtype
            assert (estimate >= 0).all()
    clamped = kl_estimate(log_probs, reference, "k1", 2.0)
    assert clamped.abs().max() <= 2


@given(st.lists(st.tuples(number, number), min_size=2, max_size=6), DTYPES)
@quick
def test_k1_and_k3_are_unbiased(logits, dtype):
    """Weighted by the policy's probabilities, over all tokens, they are the exact KL."""
    policy, reference = torch.tensor([logits], dtype=dtype, device=DEVICE).unbind(-1)
    exact = exact_kl(policy, reference)
    log_probs = policy.log_softmax(-1)
    for estimator in ("k1", "k3"):
        estimate = kl_estimate(log_probs, reference.log_softmax(-1), estimator)
        mean = (log_probs.exp() * estimate).sum(-1)
        torch.testing.assert_close(mean, exact, **tolerance(dtype))
    assert (exact > -1e-5).all()
    forbidden = torch.full((1, 1), -math.inf, dtype=dtype, device=DEVICE)
    wide = exact_kl(torch.cat([policy, forbidden], 1), torch.cat([reference, forbidden], 1))
    torch.testing.assert_close(wide, exact)


@given(st.lists(st.tuples(st.floats(-100, 1000), st.integers(1, 512)), max_size=20))
@quick
def test_the_adaptive_controller_is_bounded_per_step(updates):
    config = KLSection(kl_coef=0.15, kl_controller="adaptive", kl_target=6, kl_horizon=10_000)
    controller = kl_controller(config)
    for kl, n in updates:
        before = controller.value
        controller.update(kl, n)
        step = controller.value / before - 1
        assert abs(step) <= 0.2 * n / 10_000 + 1e-12
        assert controller.value > 0
        assert step * (kl - 6) >= 0


@given(st.lists(st.lists(number, min_size=1, max_size=5), min_size=1, max_size=5), DTYPES)
@quick
def test_the_running_scale_does_not_depend_on_chunks(parts, dtype):
    scale, whole = RunningScale(), RunningScale()
    for part in parts:
        scale.update(torch.tensor(part, dtype=dtype, device=DEVICE))
        again = RunningScale()
        again.load_state_dict(json.loads(json.dumps(scale.state_dict())))
        assert vars(again) == vars(scale)
        scale = again
    scores = torch.tensor([x for part in parts for x in part], dtype=dtype, device=DEVICE)
    whole.update(scores)
    assert scale.deviation == pytest.approx(whole.deviation, rel=1e-6)
    if len(scores) > 1 and float(scores.double().std()) > 1e-6:
        assert scale.deviation == pytest.approx(float(scores.double().std()), rel=1e-6)
    assert scale.apply(scores).dtype == dtype
