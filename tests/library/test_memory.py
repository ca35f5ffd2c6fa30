"""Memory that is freed while the policy is trained is there again, without new page faults."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from rlhf.ppo import memory

pytestmark = pytest.mark.device

#: In a process of its own: what earlier tests freed would do as well.
SCRIPT = """
import resource, torch
from rlhf.ppo.memory import kept

def faults():
    # Each fits where the one before was, with room for what came in between.
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for i in range(8):
        torch.ones(2**24 - i * 2**20)
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults())
with kept(torch.device("cpu")):
    torch.ones(2**25)
    print(faults())
"""


@pytest.mark.cpu_only("of malloc")
@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc"
)
def test_freed_memory_is_kept_inside():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=True, stdout=subprocess.PIPE, text=True
    )
    fresh, kept = map(int, done.stdout.split())
    assert fresh > 80_000  # 4 KiB each
    assert kept < fresh / 10


def test_other_devices_have_allocators_of_their_own(monkeypatch):
    asked = []
    monkeypatch.setattr(memory.ctypes, "CDLL", asked.append)
    with memory.kept(torch.device("cuda")):
        assert not asked
    assert not asked
