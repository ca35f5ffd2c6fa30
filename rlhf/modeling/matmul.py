"""The library that multiplies float32 matrices on a CPU: oneDNN or MKL.

With `torch.set_float32_matmul_precision("medium")` torch uses oneDNN. On many CPUs that is twice as
fast as MKL and as accurate; on CPUs with matrix units it computes in bfloat16, which is not.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

#: Largest relative error that counts as float32; that of bfloat16 is hundreds of times larger.
FLOAT32_ERROR = 1e-5
#: Numbers of rows are rounded up to this, because oneDNN generates code for each new shape.
ROW_MULTIPLE = 32


@contextmanager
def fast_float32(device: torch.device) -> Iterator[bool]:
    """Use oneDNN for matrix products, on a CPU where it keeps float32 accuracy.

    The choice depends on the machine alone, never on a timing, so that a resumed run computes the
    same numbers.

    Yields:
        True if oneDNN is in use.
    """
    before = torch.get_float32_matmul_precision()
    eligible = device.type == "cpu" and before == "highest"
    fast = eligible and _onednn_error() < FLOAT32_ERROR
    with _matmul_precision("medium" if fast else before):
        yield fast


@contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """Use MKL for matrix products on a CPU: for many shapes that rarely repeat."""
    mkl = "highest" if device.type == "cpu" else torch.get_float32_matmul_precision()
    with _matmul_precision(mkl):
        yield


def rounding(rows: int, device: torch.device) -> int:
    """Return the rows to add so that few shapes occur; 0 unless oneDNN is in use."""
    if device.type != "cpu" or torch.get_float32_matmul_precision() == "highest":
        return 0
    return -rows % ROW_MULTIPLE


@cache
def _onednn_error() -> float:
    """Return the relative error of oneDNN for a product of training's size."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double().T
    with _matmul_precision("medium"):
        return float((a @ b.T - exact).abs().max() / exact.abs().max())


@contextmanager
def _matmul_precision(value: str) -> Iterator[None]:
    before = torch.get_float32_matmul_precision()
    if value == before:  # setting it costs more than reading it
        yield
        return
    torch.set_float32_matmul_precision(value)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
