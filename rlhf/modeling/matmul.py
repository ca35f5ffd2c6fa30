"""Which library multiplies float32 matrices on a CPU.

With `torch.set_float32_matmul_precision("medium")` torch hands them to oneDNN. On many CPUs that is
twice as fast as MKL and as exact; on CPUs with matrix units it means bfloat16, which is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

FLOAT32_ERROR = 1e-5
"""Largest relative error that still is float32's; bfloat16's is hundreds of times this."""
STEP = 32
"""oneDNN prepares code for each shape that it meets: numbers of rows are rounded up to this."""


@contextmanager
def fast_float32(device: torch.device) -> Iterator[bool]:
    """oneDNN's products inside, on a CPU where they keep float32's accuracy.

    It depends on the machine alone, never on a timing, so that a resumed run computes alike.

    Yields:
        Whether it is on.
    """
    before = torch.get_float32_matmul_precision()
    wanted = device.type == "cpu" and before == "highest"
    fast = wanted and _error() < FLOAT32_ERROR
    with _precision("medium" if fast else before):
        yield fast


@contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """MKL's products inside, for many small shapes that seldom occur twice."""
    with _precision("highest" if device.type == "cpu" else torch.get_float32_matmul_precision()):
        yield


def rounding(rows: int, device: torch.device) -> int:
    """Rows to add, so that few different shapes occur; none where it is of no use."""
    if device.type != "cpu" or torch.get_float32_matmul_precision() == "highest":
        return 0
    return -rows % STEP


@contextmanager
def _precision(wanted: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if wanted == before:  # setting it costs more than asking
        yield
        return
    torch.set_float32_matmul_precision(wanted)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


@cache
def _error() -> float:
    """Relative error of a product as training has them, against float64."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double().T
    with _precision("medium"):
        return float((a @ b.T - exact).abs().max() / exact.abs().max())
