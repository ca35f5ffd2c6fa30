"""Matrix-multiply rate of the machine, and least arithmetic of a PPO update."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn import functional as F

from benchmarks.ppo.process import CPU, synchronise
from benchmarks.ppo.workload import Size

SETTINGS = ("highest", "medium")
SECONDS = 0.3


def needed_gflops(size: Size, prompts: Sequence[int], replies: Sequence[int]) -> dict[str, float]:
    """Return the least work of each phase, in 1e9 operations, for these lengths.

    2 operations per weight and token forward, 4 backward, plus attention's 4·hidden per layer and
    pair of positions; the head on reply tokens only, nothing on padding. Rollout: the policy once
    over all tokens. Scoring: reference, critic and reward model (the policy's log-probs come with
    sampling). Optimisation: policy and critic, forward and backward, every epoch.
    """
    reply_tokens, tokens = sum(replies), sum(prompts) + sum(replies)
    pairs = sum((p + r) * (p + r + 1) / 2 for p, r in zip(prompts, replies, strict=True))
    body = 2 * size.body * tokens + 4 * size.layers * size.hidden * pairs
    head = 2 * size.head * reply_tokens
    operations = {
        "rollout": body + head,
        "scoring": 3 * body + head,
        "optimisation": size.epochs * 3 * (2 * body + head),
    }
    return {name: value / 1e9 for name, value in operations.items()}


def matmul_rates(size: Size, device: torch.device = CPU) -> dict[str, Any]:
    """Return GF/s of the update's matrix products, by float32 precision setting.

    The error is the largest difference to float64 over the largest result. `peak` is the best rate
    of any shape and setting: what phases are measured against.
    """
    tokens = size.batch * (24 + size.new_tokens)
    shapes = {
        "body": (tokens, size.hidden, size.intermediate),
        "head": (size.batch * size.new_tokens, size.hidden, size.vocab),
        "decode": (size.batch, size.hidden, size.intermediate),
        "square": (1024, 1024, 1024),
    }
    rates: dict[str, Any] = {setting: {} for setting in SETTINGS}
    for setting in SETTINGS:
        with matmul_precision(setting):
            for name, shape in shapes.items():
                rates[setting][name] = matmul_rate(*shape, device)
            rates[setting]["error"] = max(_error(*shape, device) for shape in shapes.values())
    rates["peak"] = max(rates[setting][name] for setting in SETTINGS for name in shapes)
    return rates


@contextmanager
def matmul_precision(setting: str) -> Any:
    """Set `torch.set_float32_matmul_precision` inside a with block.

    `medium` lets oneDNN multiply on CPUs.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(setting)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@torch.no_grad()
def matmul_rate(
    rows: int, inner: int, columns: int, device: torch.device = CPU,
    dtype: torch.dtype = torch.float32,
) -> float:  # fmt: skip
    """Return GF/s of one product, the best of many."""
    a, b = (t.to(dtype) for t in _operands(rows, inner, columns, device))
    F.linear(a, b)
    synchronise(device)
    best, spent = float("inf"), 0.0
    while spent < SECONDS:
        started = time.perf_counter()
        F.linear(a, b)
        synchronise(device)
        seconds = time.perf_counter() - started
        best, spent = min(best, seconds), spent + seconds
    return 2 * rows * inner * columns / best / 1e9


@torch.no_grad()
def _error(rows: int, inner: int, columns: int, device: torch.device) -> float:
    a, b = _operands(min(rows, 256), inner, min(columns, 4096), device)
    exact = F.linear(a.double(), b.double())
    return float((F.linear(a, b) - exact).abs().max() / exact.abs().max())


def _operands(
    rows: int, inner: int, columns: int, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator(device).manual_seed(0)
    return (
        torch.randn(rows, inner, generator=generator, device=device),
        torch.randn(columns, inner, generator=generator, device=device),
    )
