"""Which library multiplies float32 on a CPU: a switch that can be worth a factor of two."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

#: Below, the matrices are too small for the other library to gain on its overhead (measured).
LARGE = 5_000_000
#: Largest relative error that still is float32's; bfloat16's is a thousand times this.
FLOAT32_ERROR = 1e-5


@contextmanager
def fast_float32(device: torch.device, parameters: int) -> Iterator[bool]:
    """Let oneDNN multiply, for large models on CPUs where that keeps float32's accuracy.

    PyTorch ties it to the "medium" setting, which allows lower precision: CPUs with matrix units
    then compute in bfloat16. So the error is measured first. Whether it is switched on depends on
    the machine and the model alone, never on a timing, so that a resumed run computes alike.

    Yields:
        Whether it is on.
    """
    before = torch.get_float32_matmul_precision()
    if device.type != "cpu" or parameters < LARGE or before != "highest":
        yield False
        return
    torch.set_float32_matmul_precision("medium")
    try:
        accurate = _error() < FLOAT32_ERROR
        if not accurate:
            torch.set_float32_matmul_precision(before)
        yield accurate
    finally:
        torch.set_float32_matmul_precision(before)


def _error() -> float:
    """Relative error of a product as training has them, against float64."""
    generator = torch.Generator().manual_seed(0)
    a, b = (torch.randn(256, 512, generator=generator) for _ in range(2))
    exact = a.double() @ b.double().T
    return float((a @ b.T - exact).abs().max() / exact.abs().max())
