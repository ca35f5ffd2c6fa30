"""When memory goes back: an accelerator's after each phase of an update, a CPU's at the end."""

from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

# Options of mallopt(3): with how many bytes free at its end the heap shrinks, from how many bytes
# and for how many tensors at most memory comes from the kernel and returns to it.
_TRIM, _MMAP_FROM, _MMAP_MOST = -1, -3, -4
#: While kept: never and none. Afterwards: what the C library, left alone, adapts itself to.
_KEPT = {_MMAP_MOST: 0, _TRIM: 2**31 - 1}
_USUAL = {_MMAP_MOST: 65_536, _MMAP_FROM: 2**25, _TRIM: 2**26}


@contextmanager
def kept(device: torch.device) -> Iterator[None]:
    """Let a process on a CPU keep the memory that it frees, until the end.

    The gradients of a large model are freed and made again at every step. Fresh memory costs a page
    fault for every 4 KiB: a fifth of the time of optimising 124 M parameters, while the peak is the
    same (measured).
    """
    libc: Any = ctypes.CDLL(None) if device.type == "cpu" and sys.platform == "linux" else None
    if not hasattr(libc, "mallopt"):  # glibc's alone
        yield
        return
    for option in _KEPT.items():
        libc.mallopt(*option)
    try:
        yield
    finally:
        for option in _USUAL.items():
            libc.mallopt(*option)


def release(device: torch.device) -> None:
    """Return what an accelerator's allocator keeps for later.

    The phases of an update need different shapes: without this, the largest of each are held at
    once. A CPU's heap is not cut into blocks of fixed size and gains nothing (measured).
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
