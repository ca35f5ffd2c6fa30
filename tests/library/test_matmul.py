"""oneDNN's products are used where they are float32's, only while training, in few shapes."""

from __future__ import annotations

import pytest
import torch

from rlhf.modeling import matmul
from rlhf.modeling.matmul import fast_float32, plain_float32, rounding

CPU = torch.device("cpu")
pytestmark = pytest.mark.device
cpu_only = pytest.mark.cpu_only("of oneDNN's products")


@cpu_only
def test_on_and_put_back():
    with fast_float32(CPU) as on:
        assert on == (matmul._onednn_error() < 1e-5)
        assert torch.get_float32_matmul_precision() == ("medium" if on else "highest")
    assert torch.get_float32_matmul_precision() == "highest"


@cpu_only
def test_few_shapes_inside_and_small_products_by_mkl(monkeypatch):
    monkeypatch.setattr(matmul, "_onednn_error", lambda: 1e-6)
    with fast_float32(CPU):
        assert (rounding(33, CPU), rounding(64, CPU)) == (31, 0)
        assert rounding(33, torch.device("cuda")) == 0
        with plain_float32(CPU):
            assert torch.get_float32_matmul_precision() == "highest"
            assert rounding(33, CPU) == 0
        assert torch.get_float32_matmul_precision() == "medium"
        with plain_float32(torch.device("cuda")):
            assert torch.get_float32_matmul_precision() == "medium"
    assert rounding(33, CPU) == 0


@cpu_only
def test_not_where_it_costs_accuracy(monkeypatch):
    monkeypatch.setattr(matmul, "_onednn_error", lambda: 3e-3)  # bfloat16's
    with fast_float32(CPU) as on:
        assert not on
        assert torch.get_float32_matmul_precision() == "highest"


def test_not_on_other_devices():
    with fast_float32(torch.device("cuda")) as on:
        assert not on
        assert torch.get_float32_matmul_precision() == "highest"


@cpu_only
def test_a_users_own_setting_stays():
    torch.set_float32_matmul_precision("high")
    try:
        with fast_float32(CPU) as on:
            assert not on
            assert torch.get_float32_matmul_precision() == "high"
        assert torch.get_float32_matmul_precision() == "high"
    finally:
        torch.set_float32_matmul_precision("highest")


@cpu_only
def test_the_error_is_measured():
    matmul._onednn_error.cache_clear()
    assert 0 < matmul._onednn_error() < 1e-5
    assert torch.get_float32_matmul_precision() == "highest"
