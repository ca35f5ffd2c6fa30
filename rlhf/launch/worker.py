"""Child of a launch: runs its share of a training stage under torchrun.

Runs as a script: `python -m rlhf.launch.worker <folder>`.
"""

from __future__ import annotations

import ctypes
import json
import logging
import os
import signal
import sys
import time
import traceback
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from rlhf.errors import ConfigError, Interrupted
from rlhf.launch.job import (
    AGENT_PID,
    JOB,
    MESSAGES,
    RESULT,
    Job,
    ended_file,
    output_file,
    pid_file,
    train,
)
from rlhf.meter import device_peaks

#: prctl(2): the signal that a process gets when its parent dies.
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Run this process's share of the job, and report how it ended."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    # Ignored outside of the training, which handles it; the parent sends it again.
    signal.signal(signal.SIGTERM, lambda *_: None)
    _end_with_launcher()
    pid_file(folder, rank).write_text(str(os.getpid()))
    _redirect_output(output_file(folder, rank))
    try:
        job = Job.model_validate_json((folder / JOB).read_bytes())
        messages = _Messages(folder / MESSAGES)
        if rank == 0:
            _log_to(messages, job.log_level)
        _set_device(job)
        result = train(job, messages.progress)
        if rank == 0:
            (folder / RESULT).write_text(json.dumps(dict(result.metrics)))
        _report_end(folder, rank)
    except Interrupted as error:
        _report_end(folder, rank, error)
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        _report_end(folder, rank, error)
        os._exit(1)  # at once: the others wait for this one
    _exit()


def _set_device(job: Job) -> None:
    """Assign this process a device of its own; no-op on CPUs.

    Raises:
        ConfigError: Fewer devices than processes are available.
    """
    import torch

    from rlhf.modeling.device import prepare_device

    device, count = prepare_device(job.runtime), int(os.environ["LOCAL_WORLD_SIZE"])
    if device.type == "cpu":
        return
    available = torch.accelerator.device_count()
    if count > available:
        raise ConfigError(
            f"{job.field}.processes = {count}, but there are {available} devices of type "
            f"{device.type}, and each process needs its own; lower it, or set runtime.device to cpu"
        )
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))


class _Messages(logging.Handler):
    """Sends progress and log records to the parent, a JSON object a line."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def progress(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Send that `step` of `total` is done."""
        self._write({"step": step, "total": total, "metrics": dict(metrics)})

    def emit(self, record: logging.LogRecord) -> None:
        """Send a log record."""
        text = record.getMessage()
        self._write({"logger": record.name, "level": record.levelno, "text": text})

    def _write(self, message: dict[str, Any]) -> None:
        os.write(self._descriptor, json.dumps(message).encode() + b"\n")


def _log_to(handler: logging.Handler, level: int) -> None:
    logging.captureWarnings(True)
    for name in ("rlhf", "py.warnings"):
        logger = logging.getLogger(name)
        logger.addHandler(handler)
        logger.setLevel(level)
        logger.propagate = False


def _report_end(folder: Path, rank: int, error: BaseException | None = None) -> None:
    """Report this process's end, atomically: the parent may read at any time."""
    report: dict[str, Any] = {"kind": type(error).__name__, "message": str(error)} if error else {}
    with suppress(Exception):  # of a device that is in no state to answer
        report |= {"peaks": device_peaks()}
    file = ended_file(folder, rank)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({**report, "time": time.time()}))
    partial.replace(file)


def _end_with_launcher() -> None:
    """Have the kernel kill this process when the launcher dies (Linux only)."""
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[AGENT_PID]):  # it died before
        os._exit(1)


def _redirect_output(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _exit() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    # All output is written; unloading the libraries in order would take seconds.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
