"""A call of a training stage, and the files of a launch in child processes.

Loads no torch: the parent of a launch reads it.
"""

from __future__ import annotations

import builtins
import logging
import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, PlainSerializer

from rlhf import errors
from rlhf.budget import Deadline
from rlhf.checkpoints.store import CheckpointStoreConfig
from rlhf.config import BaseModelConfig, PPOConfig, RewardModelConfig, RuntimeConfig, SFTConfig
from rlhf.config.lengths import TokenLimits
from rlhf.data.rows import PAIRS_TRAIN
from rlhf.gates import Verdict, require
from rlhf.stage import Progress, StageResult, silent

#: A path that is absolute in JSON, for a process that may have another working directory.
JobPath = Annotated[Path, PlainSerializer(lambda path: str(path.absolute()), when_used="json")]

# Files in the folder of a launch.
JOB = "job.json"
RESULT = "result.json"
MESSAGES = "messages.jsonl"
FAILURES = "failures.json"
AGENT_LOG = "agent.log"
#: Environment variable with the launcher's process id.
AGENT_PID = "RLHF_AGENT_PID"
#: Lines and characters of a dead process's output that its error shows.
_LINES, _CHARACTERS = 8, 1500


class Job(BaseModel):
    """One call of a training stage: `train` runs it here, `launch` in child processes."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    stage: str
    """Name of the stage, for messages."""
    field: str
    """Name of `section` in the configuration, for messages."""
    section: SFTConfig | RewardModelConfig | PPOConfig
    """Hyper-parameters; their type decides which stage is called."""
    base: BaseModelConfig = BaseModelConfig()
    """Model that SFT starts from; the other stages start from an input."""
    inputs: Mapping[str, JobPath]
    """Folders by role: `data`, `sft`, `reward-model` and `judge`."""
    pairs: str = PAIRS_TRAIN
    """Name of the dataset's file with the pairs that a reward model or a judge is trained on."""
    limits: TokenLimits | None = None
    """Most tokens of prompts and replies."""
    verdict: Verdict | None = None
    """Verdict on the reward model; None for an environment that needs none."""
    out_dir: JobPath
    """Empty folder for the result."""
    seed: int = 0
    """Seed of the stage."""
    runtime: RuntimeConfig = RuntimeConfig()
    """Device, and the threads of all processes together."""
    checkpoints: JobPath | None = None
    """Folder that training saves to and resumes from; None trains without."""
    checkpoint_store: CheckpointStoreConfig | None = None
    """Store that checkpoints are uploaded to; None uploads none."""
    identity: Mapping[str, str] = {}
    """Digests of the inputs, as far as they are known, for the checkpoints."""
    deadline: Deadline | None = None
    """When PPO has to stop, as its part of the run's budget is used up; None has no limit."""
    log_level: int = logging.WARNING
    """Level of the logger `rlhf` in child processes; set by `launch`."""


def train(job: Job, progress: Progress = silent) -> StageResult:
    """Run a job in this process, or this process's share of it.

    Raises:
        GateRejected: The verdict on PPO's reward model is a rejection.
        RLHFError: An error of the stage.
    """
    uploads = None
    if job.checkpoint_store is not None:
        from rlhf.checkpoints.uploads import CheckpointUploads

        uploads = CheckpointUploads(job.checkpoint_store.open())
    shared: dict[str, Any] = {
        "limits": job.limits, "seed": job.seed, "runtime": job.runtime, "progress": progress,
        "identity": job.identity, "checkpoints": job.checkpoints, "uploads": uploads,
    }  # fmt: skip
    data = job.inputs["data"]
    match job.section:
        case SFTConfig():
            from rlhf.sft import train_sft

            return train_sft(job.section, job.base, data, job.out_dir, **shared)
        case RewardModelConfig():
            from rlhf.reward import train_reward_model

            return train_reward_model(
                job.section, data, job.inputs["sft"], job.out_dir, pairs=job.pairs, **shared
            )
        case PPOConfig():
            from rlhf.ppo.train import train_policy

            approved = None
            if job.verdict is not None:
                approved = require(job.inputs["reward-model"], job.verdict.subject, job.verdict)
            return train_policy(
                job.section, data, job.inputs["sft"], approved, job.out_dir,
                judge=job.inputs.get("judge"), deadline=job.deadline, **shared,
            )  # fmt: skip


def pid_file(folder: Path, rank: int) -> Path:
    """Return the file with a child's process id, written at the child's start."""
    return folder / f"{rank}.pid"


def ended_file(folder: Path, rank: int) -> Path:
    """Return the file in which a child reports its end: time, and error if any."""
    return folder / f"{rank}.ended.json"


def output_file(folder: Path, rank: int) -> Path:
    """Return the file with a child's stdout and stderr."""
    return folder / f"{rank}.output"


def agent_log(folder: Path, node: int) -> Path:
    """Return the file with the output of a machine's launcher."""
    return folder / (f"{node}.{AGENT_LOG}" if node else AGENT_LOG)


def tail_of(file: Path) -> str:
    """Return the last lines of an output; empty without one."""
    text = file.read_text(errors="replace") if file.exists() else ""
    lines = [line for line in text.splitlines() if line.strip()][-_LINES:]
    return "\n".join(lines)[-_CHARACTERS:]


def rebuilt_error(name: str, message: str) -> Exception:
    """Rebuild another process's error by class name; RuntimeError if that is not possible."""
    for module in (errors, builtins):
        cls = getattr(module, name, None)
        if isinstance(cls, type) and issubclass(cls, Exception):
            try:
                return cls(message)
            except TypeError:  # such as UnicodeDecodeError, which takes more arguments
                break
    return RuntimeError(f"{name}: {message}")


def pids(folder: Path) -> dict[int, int]:
    """Return process ids by rank of the children that have not reported their end."""
    running: dict[int, int] = {}
    for file in folder.glob("*.pid"):
        rank = int(file.stem)
        with suppress(ValueError):  # being written
            if not ended_file(folder, rank).exists():
                running[rank] = int(file.read_text())
    return running


def send(folder: Path, number: int) -> None:
    """Send a signal to all running children."""
    for pid in pids(folder).values():
        with suppress(ProcessLookupError):
            os.kill(pid, number)


def alive(pid: int) -> bool:
    """Return whether a process exists; a zombie counts."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
