"""PPO's formulas against values calculated by hand."""

from __future__ import annotations

import math
import os

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from jaxtyping import TypeCheckError
from torch import Tensor

from rlhf.ppo.losses import (
    RunningScale,
    clip_scores,
    gae,
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


def row(*values: float) -> Tensor:
    return torch.tensor([values], dtype=torch.float64, device=DEVICE)


def mask_of(*rows: str) -> Tensor:
    """`mask_of("110")` is one row with two valid tokens and an invalid one."""
    return torch.tensor([[c == "1" for c in r] for r in rows], device=DEVICE)


@pytest.mark.skipif(os.environ.get("RLHF_CHECK_SHAPES") == "0", reason="switched off")
def test_shapes_are_checked_in_these_tests():
    with pytest.raises(TypeCheckError):
        masked_mean(torch.zeros(1, 3), torch.ones(1, 2, dtype=torch.bool))
    with pytest.raises(TypeCheckError):
        masked_mean(torch.zeros(1, 3), torch.ones(1, 3))  # a mask is boolean


def test_masked_mean():
    values = torch.tensor([[1.0, 2.0, 3.0], [4.0, 5.0, 6.0]], device=DEVICE)
    # (1 + 2 + 4) / 3: every token counts alike, whichever row it stands in
    assert masked_mean(values, mask_of("110", "100")).item() == pytest.approx(7 / 3)
    assert masked_mean(values, mask_of("000", "000")).item() == 0


def test_whiten():
    # valid 1 and 3: mean 2, variance ((−1)² + 1²) / 2 = 1, so −1 and 1; the 100 is not seen
    assert whiten(row(1, 3, 100), mask_of("110")).tolist() == [pytest.approx([-1, 1, 0])]
    # valid 0 and 4: mean 2, biased deviation 2 (the unbiased would be 2.83)
    assert whiten(row(0, 4), mask_of("11")).tolist() == [pytest.approx([-1, 1])]


def test_shaped_rewards():
    log_probs = torch.tensor([[-1.0, -2.0, -3.0], [-1.0, -1.0, -1.0]], device=DEVICE)
    reference = torch.tensor([[-2.0, -2.0, -1.0], [-1.0, -1.5, -3.0]], device=DEVICE)
    mask, scores = mask_of("110", "111"), torch.tensor([3.0, -4.0], device=DEVICE)
    states = value_mask(mask, 3, "last")
    rewards = shaped_rewards(scores, log_probs - reference, mask, states, 0.5)
    # −0.5·(−1+2) = −0.5 | −0.5·0 + 3 = 3 | invalid
    # −0.5·0 = 0 | −0.5·0.5 = −0.25 | −0.5·2 − 4 = −5
    assert rewards.tolist() == [[-0.5, 3, 0, 0], [0, -0.25, -5, 0]]


@pytest.mark.parametrize("position", ["last", "past_end"])
def test_a_reply_without_tokens_has_no_reward(position):
    states = value_mask(mask_of("00", "10"), 2, position)
    kl, scores = torch.ones(2, 2, device=DEVICE), torch.tensor([3.0, 4.0], device=DEVICE)
    rewards = shaped_rewards(scores, kl, mask_of("00", "10"), states, 0.5)
    # the second: −0.5 and 4, on one state or on two
    assert rewards.tolist() == [[0, 0, 0], [3.5, 0, 0] if position == "last" else [-0.5, 4, 0]]


def test_scores_are_clipped_on_both_sides():
    scores = torch.tensor([-3.0, 0.5, 3.0], device=DEVICE)
    assert clip_scores(scores, 2).tolist() == [-2, 0.5, 2]
    assert clip_scores(scores, None).tolist() == [-3, 0.5, 3]


def test_an_empty_chunk_leaves_the_running_scale_alone():
    scale = RunningScale()
    scale.update(torch.empty(0, device=DEVICE))
    assert (scale.count, scale.mean, scale.deviation) == (0, 0, 1)


def test_last_valid():
    assert last_valid(mask_of("1100", "1000", "1111")).tolist() == [1, 0, 3]


def test_gae_of_one_step():
    # λ = 0, γ = 1: A is δ = r + V' − V: 0+2−1, 0+3−2, 5+0−3; returns A + V
    advantages, returns = gae(row(0, 0, 5), row(1, 2, 3), mask_of("111"), 1.0, 0.0)
    assert advantages.tolist() == [[1, 1, 2]]
    assert returns.tolist() == [[2, 3, 5]]


def test_gae_of_the_whole_reply():
    # λ = 1, γ = 1: A is the sum of rewards to come less V: 5−1, 5−2, 5−3
    advantages, returns = gae(row(0, 0, 5), row(1, 2, 3), mask_of("111"), 1.0, 1.0)
    assert advantages.tolist() == [[4, 3, 2]]
    assert returns.tolist() == [[5, 5, 5]]


def test_gae_discounts():
    # γ = λ = ½: δ₃ = 5−3 = 2, A₃ = 2; δ₂ = ½·3−2 = −½, A₂ = −½ + ¼·2 = 0; δ₁ = ½·2−2 = −1, A₁ = −1
    advantages, _ = gae(row(0, 0, 5), row(2, 2, 3), mask_of("111"), 0.5, 0.5)
    assert advantages.tolist() == [[-1, 0, 2]]


numbers = st.floats(-5, 5, allow_nan=False, width=32)
share = st.floats(0.0, 1.0, width=32)


@st.composite
def episodes(draw):
    width = draw(st.integers(1, 7))
    lengths = draw(st.lists(st.integers(1, width), min_size=1, max_size=3))
    table = st.lists(
        st.lists(numbers, min_size=width, max_size=width),
        min_size=len(lengths),
        max_size=len(lengths),
    )
    rewards, values = (torch.tensor(draw(table), dtype=torch.float64) for _ in range(2))
    mask = torch.arange(width)[None] < torch.tensor(lengths)[:, None]
    return rewards.to(DEVICE), values.to(DEVICE), mask.to(DEVICE)


@given(episodes(), share, share)
@settings(max_examples=examples(60), deadline=None)
def test_gae_is_the_sum_of_discounted_errors(episode, gamma, lam):
    rewards, values, mask = episode
    advantages, returns = gae(rewards, values, mask, gamma, lam)
    for i, n in enumerate(mask.sum(1).tolist()):
        v = [*values[i, :n].tolist(), 0.0]
        deltas = [float(rewards[i, t]) + gamma * v[t + 1] - v[t] for t in range(n)]
        for t in range(n):
            expected = sum((gamma * lam) ** k * d for k, d in enumerate(deltas[t:]))
            assert float(advantages[i, t]) == pytest.approx(expected, abs=1e-9)
            assert float(returns[i, t]) == pytest.approx(expected + v[t], abs=1e-9)
        assert advantages[i, n:].abs().sum() == 0
        assert returns[i, n:].abs().sum() == 0


@given(episodes(), st.integers(1, 4), numbers)
@settings(max_examples=examples(40), deadline=None)
def test_padding_changes_nothing(episode, extra, junk):
    rewards, values, mask = episode
    more = torch.full((len(mask), extra), junk, dtype=torch.float64, device=DEVICE)
    wide = torch.cat([mask, torch.zeros_like(more, dtype=torch.bool)], 1)
    padded = gae(torch.cat([rewards, more], 1), torch.cat([values, more], 1), wide, 0.9, 0.8)
    plain = gae(rewards, values, mask, 0.9, 0.8)
    width = mask.shape[1]
    assert torch.equal(padded[0][:, :width], plain[0])
    assert torch.equal(padded[1][:, :width], plain[1])
    n = float(mask.sum())
    old = torch.zeros_like(values)
    wide_old = torch.cat([old, more], 1)
    loss, parts = policy_loss(torch.cat([values, more], 1), wide_old, wide_old, wide, 0.2, n)
    loss_plain, parts_plain = policy_loss(values, old, old, mask, 0.2, n)
    assert loss.item() == pytest.approx(loss_plain.item())
    for name, value in parts.items():
        assert value.item() == pytest.approx(parts_plain[name].item())
    loss = value_loss(torch.cat([values, more], 1), wide_old, wide_old + 1, wide, 0.2, n)
    assert loss.item() == pytest.approx(value_loss(values, old, old + 1, mask, 0.2, n).item())


def test_policy_loss_is_the_clipped_surrogate():
    ratios, advantages = row(0.5, 1, 1.5), row(1, -1, 2)
    loss, sums = policy_loss(
        ratios.log(), torch.zeros_like(ratios), advantages, mask_of("111"), 0.2, 3.0
    )
    # min(0.5·1, 0.8·1) + min(−1, −1) + min(1.5·2, 1.2·2) = 0.5 − 1 + 2.4 = 1.9; −1.9 / 3
    assert loss.item() == pytest.approx(-1.9 / 3)
    assert sums["clip_fraction"].item() == 1  # the third alone: 2.4 < 3
    # Σ r − 1 − ln r, as the tokens are the old policy's: (½−1+ln 2) + 0 + (1.5−1−ln 1.5)
    kl = math.log(2) - math.log(1.5)
    assert sums["approx_kl"].item() == pytest.approx(kl)


def test_policy_loss_is_pessimistic_for_a_bad_token():
    # A = −1, r = ½: min(−0.5, −0.8) = −0.8, so no gradient draws it further down
    log_ratio = row(0.5).log().requires_grad_()
    loss, _ = policy_loss(log_ratio, row(0.0), row(-1.0), mask_of("1"), 0.2, 1.0)
    loss.backward()
    assert loss.item() == pytest.approx(0.8)
    assert log_ratio.grad.item() == 0


def test_what_lies_in_the_padding_cannot_overflow():
    # exp(1000) is infinite, and infinity times 0 is not a number
    log_probs = row(0, 1000).requires_grad_()
    loss, sums = policy_loss(log_probs, row(0, 0), row(1, 1), mask_of("10"), 0.2, 1.0)
    loss.backward()
    assert loss.item() == -1
    assert sums["approx_kl"].item() == 0
    assert log_probs.grad.tolist() == [[-1, 0]]


def test_value_loss():
    values, old, returns, mask = row(2, 1, 9), row(1, 1, 0), row(3, 2, 0), mask_of("110")
    # ½·((2−3)² + (1−2)²) / 2
    assert value_loss(values, old, returns, mask, None, 2.0).item() == pytest.approx(0.5)
    # the first is clamped to 1.2: max(1, 1.8²) = 3.24; ½·(3.24 + 1) / 2
    assert value_loss(values, old, returns, mask, 0.2, 2.0).item() == pytest.approx(1.06)
    # a clamp that would flatter the value does not: V = 0, old = 2, R = 3: max(9, 1.2²) = 9
    assert value_loss(row(0), row(2), row(3), mask_of("1"), 0.2, 1.0).item() == pytest.approx(4.5)


def test_the_loss_does_not_depend_on_how_a_step_is_cut():
    torch.manual_seed(0)
    mask = mask_of("1111", "1000", "1110")
    n = float(mask.sum())
    new, old, advantages, returns = torch.randn(4, 3, 4, dtype=torch.float64).to(DEVICE)
    new = new.mul(0.3).requires_grad_()
    old = old * 0.3

    def loss(rows: list[int]) -> Tensor:
        args = (new[rows], old[rows], advantages[rows], mask[rows])
        return policy_loss(*args, 0.2, n)[0] + value_loss(
            new[rows], old[rows], returns[rows], mask[rows], 0.2, n
        )

    whole = loss([0, 1, 2])
    parts = [loss([2]), loss([0, 1])]
    assert sum(parts).item() == pytest.approx(whole.item())
    (expected,) = torch.autograd.grad(whole, new)
    (cut,) = torch.autograd.grad(sum(parts), new)
    torch.testing.assert_close(cut, expected)
