"""Section: versions, the GPU, and its rates of matrix products and copies."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib import metadata
from typing import Any

import torch

from benchmarks.gpu.section import Context, Results
from benchmarks.machine import matmul_precision, matmul_rate
from benchmarks.ppo.process import synchronise

PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "peft", "accelerate", "pydantic")


def environment(context: Context, results: Results) -> None:
    """Record package versions, the machine and the GPU."""
    results.put(
        python=platform.python_version(),
        packages={name: _version(name) for name in (*PACKAGES, "trl", "datasets")},
        cores=os.cpu_count(),
        platform=platform.platform(),
        **_gpu(context),
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _gpu(context: Context) -> dict[str, Any]:
    if context.device != "cuda":
        return {"gpu": None}
    properties = torch.cuda.get_device_properties(0)
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        driver = subprocess.run(query, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        driver = None
    return {
        "gpu": properties.name,
        "gpu_memory_mib": properties.total_memory / 2**20,
        "multiprocessors": properties.multi_processor_count,
        "cuda": torch.version.cuda,
        "driver": driver,
    }


def rates(context: Context, results: Results) -> None:
    """Record the best rates of a large matrix product and of a copy on the device."""
    device, n = torch.device(context.device), 256 if context.tiny else 8192
    matmul = {
        "bf16": matmul_rate(n, n, n, device, torch.bfloat16),
        "fp32": matmul_rate(n, n, n, device),
    }
    with matmul_precision("medium"):
        matmul["fp32_medium"] = matmul_rate(n, n, n, device)
    results.put(matmul_gflops_per_second=matmul, matmul_shape=[n, n, n])
    results.put(copy_gb_per_second=_copy_rate(device, 2**20 if context.tiny else 2**30))


def _copy_rate(device: torch.device, size: int) -> float:
    """Return 10⁹ bytes read and written per second by a copy, the best of ten."""
    source = torch.zeros(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = float("inf")
    for _ in range(10):
        synchronise(device)
        started = time.perf_counter()
        target.copy_(source)
        synchronise(device)
        best = min(best, time.perf_counter() - started)
    return 2 * size / best / 1e9
