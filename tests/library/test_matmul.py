"""Faster float32 products: on only inside, only where exact, and shapes that repeat."""

from __future__ import annotations

import torch

from rlhf.modeling import matmul
from rlhf.modeling.matmul import fast_float32, plain_float32, rounding

CPU = torch.device("cpu")


def test_on_inside_and_off_afterwards(monkeypatch):
    monkeypatch.setattr(matmul, "_is_exact", lambda: True)
    with fast_float32(CPU) as fast:
        assert fast
        assert torch.get_float32_matmul_precision() == "medium"
        assert (rounding(33, CPU), rounding(64, CPU)) == (31, 0)
        with plain_float32(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
        assert torch.get_float32_matmul_precision() == "medium"
    assert torch.get_float32_matmul_precision() == "highest"
    assert rounding(33, CPU) == 0


def test_off_where_it_would_not_be_float32(monkeypatch):
    monkeypatch.setattr(matmul, "TOLERANCE", 1e-6)  # as if it were bfloat16
    matmul._is_exact.cache_clear()
    with fast_float32(CPU) as fast:
        assert not fast
        assert torch.get_float32_matmul_precision() == "highest"
    matmul._is_exact.cache_clear()


def test_off_for_another_device():
    with fast_float32(torch.device("cuda")) as fast:
        assert not fast
