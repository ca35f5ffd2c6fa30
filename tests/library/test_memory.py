"""Memory that is freed while the policy is trained is there again, without new page faults."""

from __future__ import annotations

import ctypes
import sys

import pytest
import torch

from rlhf.ppo.memory import kept

resource = pytest.importorskip("resource")
CPU = torch.device("cpu")
PAGES = 2**26 // resource.getpagesize()


def faults():
    """How many pages a tensor of 64 MiB took from the kernel."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc"
)
def test_freed_memory_is_kept_inside():
    assert faults() > PAGES // 2
    assert faults() > PAGES // 2
    with kept(CPU):
        torch.ones(2**24)
        assert faults() < PAGES // 10


def test_other_devices_have_allocators_of_their_own():
    with kept(torch.device("cuda")):
        assert faults() > 0
