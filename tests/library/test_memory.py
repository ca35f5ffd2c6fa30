"""Memory that is freed while the policy is trained is there again, without new page faults."""

from __future__ import annotations

import ctypes
import subprocess
import sys

import pytest
import torch

from rlhf.ppo import memory

#: In a process of its own: what earlier tests freed would do as well.
SCRIPT = """
import resource, torch
from rlhf.ppo.memory import kept

def faults():
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)  # 64 MiB
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

print(faults(), faults())
with kept(torch.device("cpu")):
    print(faults(), faults())
"""


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="glibc's malloc"
)
def test_freed_memory_is_kept_inside():
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT], check=True, stdout=subprocess.PIPE, text=True
    )
    first, second, filling, again = map(int, done.stdout.split())
    assert min(first, second, filling) > 5 * again
    assert again < 100


def test_other_devices_have_allocators_of_their_own(monkeypatch):
    monkeypatch.setattr(memory.ctypes, "CDLL", None)
    with memory.kept(torch.device("cuda")):
        pass
