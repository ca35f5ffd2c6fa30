"""CPU settings during training: oneDNN's matrix products, and freed memory."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from rlhf.modeling import device
from rlhf.modeling.device import fast_float32, plain_float32, rounding

CPU = torch.device("cpu")


pytestmark = pytest.mark.device


cpu_only = pytest.mark.cpu_only("of oneDNN's products")


@cpu_only
def test_on_and_put_back():
    with fast_float32(CPU) as on:
        assert on == (device._onednn_error() < 1e-5)
        assert torch.get_float32_matmul_precision() == ("medium" if on else "highest")
    assert torch.get_float32_matmul_precision() == "highest"


@cpu_only
def test_few_shapes_inside_and_small_products_by_mkl(monkeypatch):
    monkeypatch.setattr(device, "_onednn_error", lambda: 1e-6)
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
    monkeypatch.setattr(device, "_onednn_error", lambda: 3e-3)  # bfloat16's
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
    device._onednn_error.cache_clear()
    assert 0 < device._onednn_error() < 1e-5
    assert torch.get_float32_matmul_precision() == "highest"


#: In a process of its own: what earlier tests freed would do as well.
SCRIPT = """
import resource, torch
from rlhf.modeling.device import retained_heap

def faults():
    # Each fits where the one before was, with room for what came in between.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(8):
        torch.ones(2**24 - i * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
with retained_heap(torch.device("cpu")):
    torch.ones(2**25)
    print(faults())
"""


GLIBC = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc"
)


def printed_by(script: str) -> list[str]:
    """Run a script in a process with a heap of its own; return the words that it prints."""
    done = subprocess.run(
        [sys.executable, "-c", script], check=True, stdout=subprocess.PIPE, text=True
    )
    return done.stdout.split()


@pytest.mark.cpu_only("of malloc")
@GLIBC
def test_freed_memory_is_kept_inside():
    fresh, kept = map(int, printed_by(SCRIPT))
    assert fresh > 80_000  # 4 KiB each
    assert kept < fresh / 10


HOLES = """
import contextlib, sys, torch
from rlhf.modeling.device import compact_heap

def resident():
    return int(open("/proc/self/statm").read().split()[1]) * 4096

def grown():
    # As with LoRA: what is kept stands behind its parts, which are freed.
    kept, before = [], resident()
    for _ in range(40):
        for size in (2**20, 3 * 2**19):
            parts = torch.ones(size), torch.ones(size), torch.ones(size)
            kept.append(parts[0] + parts[1])
            del parts
    return (resident() - before) / sum(tensor.nbytes for tensor in kept)

torch.ones(2**20)  # glibc learns the size when it is freed
print(grown())
with torch.device("meta"):
    large = torch.nn.Linear(5_000, 5_000)  # small models are left alone
with compact_heap(torch.device("cpu"), large):
    print(grown())
"""


@pytest.mark.cpu_only("of malloc")
@GLIBC
def test_large_tensors_leave_no_holes():
    with_holes, compact = map(float, printed_by(HOLES))
    assert with_holes > 1.2  # else there is nothing to test; 1.29 to 1.5 on a busy machine
    assert compact < 1.1


def test_a_small_model_keeps_its_heap(monkeypatch):
    """Its tensors are short-lived: fresh pages for each took half of the quickstart's time."""
    asked = []
    monkeypatch.setattr(device.ctypes, "CDLL", asked.append)
    with device.compact_heap(torch.device("cpu"), torch.nn.Linear(4, 4)):
        assert not asked
    assert not asked


def test_other_devices_have_allocators_of_their_own(monkeypatch):
    asked = []
    monkeypatch.setattr(device.ctypes, "CDLL", asked.append)
    with device.retained_heap(torch.device("cuda")):
        assert not asked
    assert not asked
