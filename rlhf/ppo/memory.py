"""Gives memory back between the phases of an update."""

from __future__ import annotations

import ctypes
import sys

import torch


def release(device: torch.device) -> None:
    """Return what the allocator keeps for later to the device, or to the operating system.

    The phases of an update need different shapes: without this, the process holds the largest of
    each at once.
    """
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif device.type == "mps":
        torch.mps.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # glibc only
        if trim is not None:
            trim(0)
