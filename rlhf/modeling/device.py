"""Transfers to an accelerator that do not make the host wait.

A copy back (`.cpu()`, `.item()`, `.tolist()`, a boolean mask as an index) waits until everything
that was launched before it has been computed, so hot loops have as few of them as they can: what
decides about shapes is worked out on the CPU and uploaded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a tensor to a device, from the CPU to a GPU without waiting for it.

    A plain `.to(device)` waits until everything that was launched before has been computed, and for
    pageable memory CUDA only says that it might not. So the copy starts from pinned memory, which
    torch keeps for the next one as soon as this one is done; the source may be changed at once.
    """
    if tensor.device.type != "cpu" or device.type != "cuda":
        return tensor.to(device)
    return tensor.pin_memory().to(device, non_blocking=True)
