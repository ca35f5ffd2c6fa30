"""Meter of the program's use of a machine: time, peak memory, energy.

Memory is sampled by a thread, for no counter of the system is that of a stage and its child
processes. Energy is read from counters of the machine where they can be read: those of the CPU's
packages (RAPL), and those of NVIDIA's GPUs if the package nvidia-ml-py is installed. Nothing here
loads torch, and no failure here ends a stage.
"""

from __future__ import annotations

import math
import os
import resource
import sys
import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import psutil

from rlhf.costs import Cost

#: Seconds between two samples.
EVERY = 2.0
#: Folders of the counters of energy, and of the names of NVIDIA's GPUs.
POWERCAP = Path("/sys/class/powercap")
NVIDIA = Path("/proc/driver/nvidia/gpus")
#: Variable that selects GPUs.
VISIBLE = "CUDA_VISIBLE_DEVICES"
CPU = "cpu"


class Meter:
    """Measures this process and its children while its block runs.

    Args:
        gpus: Number of GPUs that they use; 0 on a CPU.
        sampled: Called after every sample, in the thread that takes them.
        every: Seconds between two samples.
    """

    #: Of the block that runs in this process; child processes report to it.
    current: Meter | None = None

    def __init__(
        self, gpus: int = 0, sampled: Callable[[], None] = lambda: None, *, every: float = EVERY
    ) -> None:
        self.steps = 0
        self._gpus, self._sampled, self._every = gpus, sampled, every
        self._peaks: dict[str, int] = {}
        self._energy = _Energy(gpus)
        self._started, self._ended = time.monotonic(), math.inf
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._sample_often, daemon=True)

    def __enter__(self) -> Self:
        self._started = time.monotonic()
        self._before = _own_peak()
        _reset_device_peaks()
        self._energy.read()
        self._sample()
        Meter.current = self
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        Meter.current = None
        self._ended = time.monotonic()
        self._stop.set()
        self._thread.join()
        peak = _own_peak()
        if peak > self._before:  # else it was reached before this block
            self.note({"memory": peak})
        self._sample()

    def note(self, peaks: Mapping[str, int]) -> None:
        """Note peaks of memory that were measured elsewhere, as by a child process."""
        for name, value in peaks.items():
            self._peaks[name] = max(value, self._peaks.get(name, 0))

    def seconds(self) -> float:
        """Return the time since the block began, or that it took."""
        return min(time.monotonic(), self._ended) - self._started

    def cost(self) -> Cost:
        """Return what was measured so far."""
        measured = Cost(seconds=self.seconds(), steps=self.steps, energy=self._energy.joules)
        return measured.model_copy(update=self._peaks)

    def _sample(self) -> None:
        with suppress(psutil.Error, OSError, ValueError):
            self.note({"memory": _resident()})
        with suppress(OSError, RuntimeError, ValueError):
            self.note(device_peaks())
        self._energy.read()

    def _sample_often(self) -> None:
        while not self._stop.wait(self._every):
            self._sample()
            self._sampled()


def device_peaks() -> dict[str, int]:
    """Return peaks of this process's memory on its GPU; empty without one, or before its use."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available() or not torch.cuda.is_initialized():
        return {}
    free, whole = torch.cuda.mem_get_info()
    return {
        "allocated": int(torch.cuda.max_memory_allocated()),
        "reserved": int(torch.cuda.max_memory_reserved()),
        "device_memory": int(whole - free),
    }


def device_name(device: str) -> str:
    """Return the name of the device that a `runtime.device` selects; `cpu` without another one.

    A GPU's name comes from NVIDIA's driver: torch takes seconds to load, and memory of the GPU.
    """
    torch = sys.modules.get("torch")
    if device == CPU or (device == "auto" and os.environ.get(VISIBLE) in ("", "-1")):
        return CPU
    kind = ""
    if torch is not None:
        accelerator = torch.accelerator.current_accelerator(check_available=True)
        kind = accelerator.type if accelerator else CPU
        if kind != "cuda":
            return kind
        if torch.cuda.is_initialized():
            return str(torch.cuda.get_device_name())
    with suppress(OSError):
        for gpu in sorted(NVIDIA.iterdir()):
            for line in (gpu / "information").read_text(errors="replace").splitlines():
                name, _, value = line.partition(":")
                if name.strip() == "Model":
                    return value.strip()
    return kind or ("mps" if sys.platform == "darwin" else CPU)


def _reset_device_peaks() -> None:
    """Forget what an earlier stage of this process took of its GPU."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.cuda.is_available() and torch.cuda.is_initialized():
        torch.cuda.reset_peak_memory_stats()


def _resident() -> int:
    """Return the memory of this process and its children; pages that they share count often."""
    own = psutil.Process()
    size = own.memory_info().rss
    for child in own.children(recursive=True):
        with suppress(psutil.Error):  # it has ended
            size += child.memory_info().rss
    return int(size)


def _own_peak() -> int:
    """Return the largest memory of this process since its start, which no sample misses."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return int(peak if sys.platform == "darwin" else peak * 1024)


class _Energy:
    """Sum of the machine's counters of energy since the first reading; None without any."""

    def __init__(self, gpus: int) -> None:
        self.joules: float | None = None
        self._counters = [*_packages(), *_gpu_counters(gpus)]
        self._last: list[float | None] = [None] * len(self._counters)

    def read(self) -> None:
        """Add what the counters have counted since the last reading."""
        for number, (counter, wraps_at) in enumerate(self._counters):
            try:
                now = counter()
            except Exception:  # of a driver's library, which has exceptions of its own
                self._last[number] = None
                continue
            before = self._last[number]
            self._last[number] = now
            if before is not None:
                used = now - before
                self.joules = (self.joules or 0.0) + (used if used >= 0 else used + wraps_at)


#: A function that reads a counter in joules, and the value at which it begins anew.
Counter = tuple[Callable[[], float], float]


def _packages() -> list[Counter]:
    """Return the counters of the CPU's packages that may be read; on most systems root alone may.

    Their parts (`intel-rapl:0:1`) are in them.
    """
    counters: list[Counter] = []
    with suppress(OSError):
        for folder in sorted(POWERCAP.glob("intel-rapl:*")):
            if folder.name.count(":") != 1:
                continue
            with suppress(OSError, ValueError):
                file = folder / "energy_uj"
                _microjoules(file)
                counters.append(
                    (lambda file=file: _microjoules(file),
                     _microjoules(folder / "max_energy_range_uj"))
                )  # fmt: skip
    return counters


def _microjoules(file: Path) -> float:
    return int(file.read_text()) / 1e6


def _gpu_counters(count: int) -> list[Counter]:
    """Return the counters of the first GPUs that this process sees, by NVIDIA's own package."""
    if not count:
        return []
    try:
        import pynvml  # pyright: ignore[reportMissingImports]

        nvml: Any = pynvml
        nvml.nvmlInit()
        visible = [part for part in os.environ.get(VISIBLE, "").split(",") if part]
        handles = [_handle(nvml, visible, number) for number in range(count)]
        for handle in handles:
            nvml.nvmlDeviceGetTotalEnergyConsumption(handle)  # not known by older GPUs
    except Exception:  # not installed, no driver, no such counter
        return []
    return [
        (lambda handle=handle: nvml.nvmlDeviceGetTotalEnergyConsumption(handle) / 1e3, 0.0)
        for handle in handles
    ]


def _handle(nvml: Any, visible: list[str], number: int) -> Any:
    """Return NVML's handle of the GPU that CUDA gives a number; it may be named by its UUID."""
    name = visible[number] if number < len(visible) else str(number)
    if name.isdigit():
        return nvml.nvmlDeviceGetHandleByIndex(int(name))
    return nvml.nvmlDeviceGetHandleByUUID(name)
