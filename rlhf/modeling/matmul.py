"""Which library multiplies float32 matrices on a CPU.

With `torch.set_float32_matmul_precision("medium")` torch hands them to oneDNN. On many CPUs that is
twice as fast as MKL and as exact; on some it means bfloat16, which is not. So it is tried first.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import torch

STEP = 32
"""oneDNN prepares code for each shape that it meets: numbers of rows are rounded up to this."""
TOLERANCE = 4
"""How many times MKL's own error is still float32."""


@contextmanager
def fast_float32(device: torch.device) -> Iterator[bool]:
    """Faster float32 products on the CPU inside, where they are as exact; yields whether."""
    before = torch.get_float32_matmul_precision()
    fast = device.type == "cpu" and before == "highest" and _is_exact()
    try:
        if fast:
            torch.set_float32_matmul_precision("medium")
        yield fast
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def plain_float32(device: torch.device) -> Iterator[None]:
    """MKL's products inside, for many small shapes that seldom occur twice."""
    before = torch.get_float32_matmul_precision()
    if device.type != "cpu" or before == "highest":
        yield
        return
    torch.set_float32_matmul_precision("highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def rounding(rows: int, device: torch.device) -> int:
    """Rows to add, so that few different shapes occur; none where it is of no use."""
    if device.type != "cpu" or torch.get_float32_matmul_precision() == "highest":
        return 0
    return -rows % STEP


@cache
def _is_exact() -> bool:
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double().t()
    before = torch.get_float32_matmul_precision()
    errors = {}
    try:
        for precision in ("highest", "medium"):
            torch.set_float32_matmul_precision(precision)
            errors[precision] = float(((a @ b.t()).double() - exact).norm())
    finally:
        torch.set_float32_matmul_precision(before)
    return errors["medium"] <= TOLERANCE * errors["highest"]
