"""Transfers to an accelerator that do not make the host wait.

A copy back (`.cpu()`, `.item()`, `.tolist()`, a boolean mask as an index) waits until everything
that was launched before it has been computed, so hot loops have as few of them as they can: what
decides about shapes is worked out on the CPU and uploaded.
"""

from __future__ import annotations

import torch
from torch import Tensor


def upload(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a CPU tensor to a device without waiting for it; no copy if it is there already.

    A plain `.to(device)` waits until everything that was launched before has been computed. The
    driver has read pageable memory when the call returns, so the source may be changed then.
    """
    return tensor.to(device, non_blocking=tensor.device.type == "cpu")
