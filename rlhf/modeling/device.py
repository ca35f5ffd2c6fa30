"""Device of a process: selection, uploads, matrix products, memory.

A copy back to the host (`.cpu()`, `.item()`, `.tolist()`, a boolean mask as an index) waits for all
kernels launched before it. Hot loops avoid it: tensors that decide about shapes are computed on the
CPU and uploaded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device; from the CPU to a GPU without blocking the host.

    The source may be changed as soon as the call returns.
    """
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    # `.to(device)` blocks until all launched kernels have finished, and for pageable memory CUDA
    # does not guarantee that non_blocking helps. torch reuses a pinned buffer after its copy.
    return tensor.pin_memory().to(device, non_blocking=True)
