"""`python -m rlhf.launch.worker <folder>`: one of the processes that do a job, under torchrun."""

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
from pathlib import Path
from typing import Any

from rlhf.errors import ConfigError, Interrupted
from rlhf.launch import folder as names
from rlhf.progress import Progress
from rlhf.stage import StageResult

#: prctl(2): the signal to get when the parent dies.
_PR_SET_PDEATHSIG = 1


def main() -> None:
    """Do the job's share, and say how it went."""
    folder, rank = Path(sys.argv[1]), int(os.environ["RANK"])
    # Until training listens to it, and after; the parent sends it again.
    signal.signal(signal.SIGTERM, lambda *_: None)
    _end_with_the_launcher()
    names.pid_file(folder, rank).write_text(str(os.getpid()))
    _print_into(names.output_file(folder, rank))
    job = json.loads((folder / names.JOB).read_text())
    messages = _Messages(folder / names.MESSAGES)
    if rank == 0:
        _log_to(messages, job["log_level"])
    try:
        result = _work(job, messages.progress)
        if rank == 0:
            (folder / names.RESULT).write_text(json.dumps(dict(result.metrics)))
        _say(folder, rank, {})
    except Interrupted as error:
        _say(folder, rank, {"kind": "Interrupted", "message": str(error)})
    except BaseException as error:
        traceback.print_exc()
        sys.stderr.flush()
        _say(folder, rank, {"kind": type(error).__name__, "message": str(error)})
        os._exit(1)  # at once: the others wait for this one
    _leave()


def _work(job: dict[str, Any], progress: Progress) -> StageResult:
    """Call the stage."""
    from rlhf.config import BaseModelConfig, PPOConfig, RewardModelConfig, RuntimeConfig, SFTConfig

    runtime = RuntimeConfig.model_validate(job["runtime"])
    _check_devices(job, runtime)
    data, out, config = Path(job["data"]), Path(job["out_dir"]), job["config"]
    shared: dict[str, Any] = {"seed": job["seed"], "runtime": runtime, "progress": progress}
    if job["stage"] == "train-sft":
        from rlhf.sft import train_sft

        base = BaseModelConfig.model_validate(job["base"])
        return train_sft(SFTConfig.model_validate(config), base, data, out, **shared)
    if job["stage"] == "train-reward-model":
        from rlhf.reward import train_reward_model

        section = RewardModelConfig.model_validate(config)
        return train_reward_model(section, data, job["sft"], out, **shared)
    from rlhf.ppo.train import train_policy

    return train_policy(
        PPOConfig.model_validate(config), data, Path(job["sft"]), _approved(job["reward_model"]),
        out, identity=job["identity"], checkpoints=_optional_path(job["checkpoints"]),
        uploads=_uploads(job["place"]), **shared,
    )  # fmt: skip


def _check_devices(job: dict[str, Any], runtime: Any) -> None:
    import torch

    from rlhf.modeling.base import device_of

    device, count = device_of(runtime), int(os.environ["WORLD_SIZE"])
    if device.type == "cpu":
        return
    there = torch.accelerator.device_count()
    if count > there:
        section = {"train-sft": "sft", "train-policy": "ppo"}.get(job["stage"], "reward_model")
        raise ConfigError(
            f"{section}.processes = {count}, but there are {there} devices of type {device.type}, "
            "and each process needs its own; lower it, or set runtime.device to cpu"
        )
    torch.accelerator.set_device_index(int(os.environ["LOCAL_RANK"]))


def _approved(given: dict[str, Any] | None) -> Any:
    """The reward model's folder, asked for again at its gate with the verdict that came along."""
    from rlhf.gates import Check, Verdict, require

    if given is None:
        return None
    words = given["verdict"]
    checks = tuple(Check(**check) for check in words["checks"])
    verdict = Verdict(words["gate"], words["subject"], words["approved"], checks)
    return require(Path(given["folder"]), verdict.subject, verdict)


def _uploads(given: dict[str, Any] | None) -> Any:
    from rlhf.ppo.stored import CheckpointPlace
    from rlhf.ppo.upload import CheckpointUploads

    if given is None or os.environ["RANK"] != "0":
        return None
    return CheckpointUploads(CheckpointPlace.model_validate(given).open())


def _optional_path(given: str | None) -> Path | None:
    return Path(given) if given else None


class _Messages(logging.Handler):
    """Tells the parent of progress and of what is logged."""

    def __init__(self, file: Path) -> None:
        super().__init__()
        self._descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)

    def progress(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Tell that `step` of `total` is done."""
        self._write({"step": step, "total": total, "metrics": dict(metrics)})

    def emit(self, record: logging.LogRecord) -> None:
        """Pass a log record on."""
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


def _say(folder: Path, rank: int, words: dict[str, str]) -> None:
    """Written whole or not at all: who has a file has had its say."""
    file = names.ended_file(folder, rank)
    partial = file.with_suffix(".partial")
    partial.write_text(json.dumps({**words, "time": time.time()}))
    partial.replace(file)


def _end_with_the_launcher() -> None:
    """Die when the launcher does, however it dies; where the kernel offers that."""
    if sys.platform == "linux":
        libc: Any = ctypes.CDLL(None)
        libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(os.environ[names.AGENT_PID]):  # it died before
        os._exit(1)


def _print_into(file: Path) -> None:
    descriptor = os.open(file, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)


def _leave() -> None:
    import torch.distributed as dist

    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()
    # All is written and said. Taking the libraries down in order would take seconds.
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
