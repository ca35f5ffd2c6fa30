"""Device of a process: selection, uploads, matrix products, memory.

A copy back to the host (`.cpu()`, `.item()`, `.tolist()`, a boolean mask as an index) waits for all
kernels launched before it. Hot loops avoid it: tensors that decide about shapes are computed on the
CPU and uploaded.
"""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import cache
from typing import Any

import torch
from torch import Tensor

from rlhf.config import RuntimeConfig
from rlhf.errors import ConfigError

#: Largest relative error that counts as float32; that of bfloat16 is hundreds of times larger.
FLOAT32_ERROR = 1e-5

#: Numbers of rows are rounded up to this, because oneDNN generates code for each new shape.
ROW_MULTIPLE = 32

# Parameters of mallopt(3): free bytes at the heap's end above which it shrinks, and the least size
# and greatest number of blocks that come from mmap and are returned to the kernel.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _MMAP_MAX = -1, -3, -4

#: Never shrink, no mmap.
_RETAIN = {_MMAP_MAX: 0, _TRIM_THRESHOLD: 2**31 - 1}
#: mmap for whatever has 1 MiB.
_COMPACT = {_MMAP_THRESHOLD: 2**20}
#: The values that glibc adapts itself to if left alone.
_DEFAULT = {_MMAP_MAX: 65_536, _MMAP_THRESHOLD: 2**25, _TRIM_THRESHOLD: 2**26}


def prepare_device(runtime: RuntimeConfig) -> torch.device:
    """Set the number of CPU threads and return the device that `runtime` selects.

    Raises:
        ConfigError: The device is not available.
    """
    torch.set_num_threads(runtime.threads)
    cpu = torch.device("cpu")
    available = torch.accelerator.current_accelerator(check_available=True) or cpu
    device = available if runtime.device == "auto" else torch.device(runtime.device)
    if device.type not in (cpu.type, available.type):
        raise ConfigError(
            f"runtime.device = {runtime.device!r}, but torch finds no such device here; set it to "
            "auto or cpu, or install a torch that was built for it"
        )
    return device


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; from the CPU to a GPU without blocking the host.

    The source may be changed as soon as the call returns.
    """
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    # `.to(device)` blocks until all launched kernels have finished, and for pageable memory CUDA
    # does not guarantee that non_blocking helps. torch reuses a pinned buffer after its copy.
    return tensor.pin_memory().to(device, non_blocking=True)


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
    """Use MKL, not oneDNN, on a CPU, where many shapes occur that rarely repeat."""
    mkl = "highest" if device.type == "cpu" else torch.get_float32_matmul_precision()
    with _matmul_precision(mkl):
        yield


def rounding(rows: int, device: torch.device) -> int:
    """Return the padding rows that limit the number of shapes; 0 without oneDNN."""
    if device.type != "cpu" or torch.get_float32_matmul_precision() == "highest":
        return 0
    return -rows % ROW_MULTIPLE


@contextmanager
def retained_heap(device: torch.device) -> Iterator[None]:
    """Retain freed heap memory until the context ends; on CPU with glibc only.

    The gradients of a large model are freed and allocated at every step. Fresh memory costs a page
    fault for every 4 KiB: a fifth of the time of optimising 124 M parameters, while the peak is the
    same (measured).
    """
    with _heap(device, _RETAIN):
        yield


#: Parameters from which `compact_heap` has an effect.
_COMPACT_FROM = 20_000_000


@contextmanager
def compact_heap(device: torch.device, model: Any) -> Iterator[None]:
    """Take large tensors from the kernel, each by itself, until the context ends; as above.

    Tensors of some MB that are kept for a backward pass stand between others that are freed, and
    aligned allocations don't fill the holes: with LoRA 8.2 GB instead of 5.0 (reward model of 135 M
    weights, 8 rows of 384 tokens), at the same speed (measured). A small model has no such holes,
    and its tensors are so short-lived that the kernel's page faults take half of the time: it is
    left alone.
    """
    if sum(p.numel() for p in model.parameters()) < _COMPACT_FROM:
        yield
        return
    with _heap(device, _COMPACT):
        yield


@contextmanager
def _heap(device: torch.device, options: Mapping[int, int]) -> Iterator[None]:
    """Set options of the C library's heap until the context ends."""
    libc: Any = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):  # another C library
        yield
        return
    for option in options.items():
        libc.mallopt(*option)
    try:
        yield
    finally:
        for option in _DEFAULT.items():
            libc.mallopt(*option)


def empty_cache(device: torch.device) -> None:
    """Return the accelerator allocator's unused memory to the device.

    The phases of an update need different shapes: without this, the largest of each phase are held
    at once. A CPU's heap is not divided into blocks of fixed size and gains nothing (measured).
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()


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
