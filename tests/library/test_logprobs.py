"""Fused log-probabilities: values and gradients of the plain formula, in any slices."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from rlhf.modeling.logprobs import log_probs_from_logits, token_log_probs
from tests.library.toys import DEVICE, within

pytestmark = pytest.mark.device


N, WIDTH, VOCABULARY = 11, 5, 13


@pytest.fixture
def case():
    torch.manual_seed(0)
    hidden = torch.randn(N, WIDTH, dtype=torch.float64).to(DEVICE).requires_grad_()
    head = nn.Linear(WIDTH, VOCABULARY, dtype=torch.float64).to(DEVICE)
    return hidden, head, torch.randint(VOCABULARY, (N,)).to(DEVICE)


def run(case, function, temperature, entropy):
    """Values, and the gradients of an arbitrary sum of them."""
    hidden, head, targets = case
    log_probs, entropies = function(head, hidden, targets, temperature, entropy)
    weights = torch.arange(1.0, N + 1, dtype=torch.float64, device=DEVICE)
    loss = (log_probs * weights).sum() + ((entropies * weights.flip(0)).sum() if entropy else 0)
    return [log_probs, entropies, *torch.autograd.grad(loss, (hidden, head.weight, head.bias))]


def plainly(head, hidden, targets, temperature, entropy):
    return log_probs_from_logits(head(hidden), targets, temperature, entropy)


@pytest.mark.parametrize("entropy", [True, False])
@pytest.mark.parametrize("temperature", [1.0, 0.6])
@pytest.mark.parametrize(
    "sizes", [{}, {"slice_size": 4 * VOCABULARY}, {"slice_size": 4 * VOCABULARY, "keep": 0}]
)
@pytest.mark.parametrize("kind", ["linear", "other"])
def test_values_and_gradients_are_those_of_the_formula(case, entropy, temperature, sizes, kind):
    class Other(nn.Linear):
        """A head that is no plain layer: by autograd."""

    def ours(head, hidden, targets, temperature, entropy):
        if kind == "other":
            head.__class__ = Other
        return token_log_probs(head, hidden, targets, temperature, entropy, **sizes)

    expected = run(case, plainly, temperature, entropy)
    seen = run(case, ours, temperature, entropy)
    for a, b in zip(seen, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-12)


def test_by_hand():
    """Logits 0, ln 2, ln 5: probabilities 1/8, 2/8, 5/8."""
    head = nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[1.0], [2.0], [5.0]], device=DEVICE).log()
    hidden, target = torch.ones(1, 1, device=DEVICE), torch.tensor([1], device=DEVICE)
    log_probs, entropy = token_log_probs(head, hidden, target)
    assert log_probs.item() == pytest.approx(-1.386294)  # ln 1/4
    # 1/8 ln 8 + 2/8 ln 4 + 5/8 ln 8/5
    assert entropy.item() == pytest.approx(0.259930 + 0.346574 + 0.293752, abs=1e-5)


def test_huge_logits_stay_finite():
    head = nn.Linear(1, 3, bias=False)
    head.weight.data = torch.tensor([[1e4], [0.0], [-1e4]], device=DEVICE)
    hidden = torch.ones(2, 1, device=DEVICE, requires_grad=True)
    log_probs, entropy = token_log_probs(head, hidden, torch.tensor([0, 2], device=DEVICE))
    assert log_probs.tolist() == [0, -2e4]
    assert entropy.tolist() == [0, 0]
    (log_probs.sum() + entropy.sum()).backward()
    gradient = head.weight.grad
    assert gradient is not None
    assert torch.isfinite(gradient).all()


def test_gradients_do_not_change_a_bit():
    """The old log-probs of PPO come without gradients, the new ones with: their ratio is 1."""
    torch.manual_seed(0)
    head, hidden = nn.Linear(64, 500).to(DEVICE), torch.randn(300, 64).to(DEVICE)
    targets = torch.randint(500, (300,)).to(DEVICE)
    for keep in (2**25, 0):
        options: Any = {"slice_size": 70 * 500, "keep": keep}
        new = token_log_probs(head, hidden, targets, **options)[0]
        with torch.no_grad():
            old = token_log_probs(head, hidden, targets, **options)[0]
        torch.testing.assert_close(new, old, atol=within(0.0, 1e-5), rtol=0)


def test_a_frozen_head_still_passes_the_gradient_on(case):
    hidden, head, targets = case
    head.requires_grad_(False)
    token_log_probs(head, hidden, targets, entropy=False)[0].sum().backward()
    ours, hidden.grad = hidden.grad, None
    plainly(head, hidden, targets, 1.0, False)[0].sum().backward()
    torch.testing.assert_close(ours, hidden.grad)
