"""A stage's arguments as a job for child processes. Signatures are those of the stages."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rlhf.config import BaseModelConfig, PPOConfig, RewardModelConfig, RuntimeConfig, SFTConfig
from rlhf.config.processes import ProcessSection
from rlhf.gates import Approved
from rlhf.launch.parent import launch
from rlhf.ppo.stored import CheckpointPlace
from rlhf.progress import Progress, silent
from rlhf.stage import StageResult


def train_sft(
    config: SFTConfig,
    base: BaseModelConfig,
    data: Path,
    out_dir: Path,
    *,
    seed: int = 0,
    runtime: RuntimeConfig | None = None,
    progress: Progress = silent,
) -> StageResult:
    """`rlhf.sft.train_sft` in `config.processes` child processes.

    Raises:
        WorkerDied: A process ended without a word; the others were ended.
    """
    job = {"base": base.model_dump(mode="json"), "data": _path(data)}
    return _launch("train-sft", config, job, out_dir, seed, runtime, progress)


def train_reward_model(
    config: RewardModelConfig,
    data: Path,
    sft: Path | str,
    out_dir: Path,
    *,
    seed: int = 0,
    runtime: RuntimeConfig | None = None,
    progress: Progress = silent,
) -> StageResult:
    """`rlhf.reward.train_reward_model` in `config.processes` child processes.

    Raises:
        WorkerDied: A process ended without a word; the others were ended.
    """
    job = {"data": _path(data), "sft": _path(sft) if isinstance(sft, Path) else sft}
    return _launch("train-reward-model", config, job, out_dir, seed, runtime, progress)


def train_policy(
    config: PPOConfig,
    data: Path,
    sft: Path,
    reward_model: Approved[Path] | None,
    out_dir: Path,
    *,
    seed: int = 0,
    identity: Mapping[str, str] | None = None,
    checkpoints: Path | None = None,
    place: CheckpointPlace | None = None,
    runtime: RuntimeConfig | None = None,
    progress: Progress = silent,
) -> StageResult:
    """`rlhf.ppo.train.train_policy` in `config.processes` child processes.

    Args:
        config: Hyper-parameters.
        data: As there.
        sft: As there.
        reward_model: As there; its verdict goes with it.
        out_dir: As there.
        seed: As there.
        identity: As there.
        checkpoints: As there; with them, SIGTERM is passed on and waited for.
        place: Where checkpoints are uploaded to.
        runtime: Device, and the threads of all together.
        progress: Told of every update, in this process.

    Raises:
        WorkerDied: A process ended without a word; the others were ended. The same call goes on
            from the last checkpoint.
    """
    approved = reward_model and {
        "folder": _path(reward_model.subject), "verdict": asdict(reward_model.verdict),
    }  # fmt: skip
    job = {
        "data": _path(data),
        "sft": _path(sft),
        "reward_model": approved,
        "identity": dict(identity or {}),
        "checkpoints": checkpoints and _path(checkpoints),
        "place": place and place.model_dump(mode="json"),
    }
    return _launch("train-policy", config, job, out_dir, seed, runtime, progress)


def _launch(
    stage: str, config: ProcessSection, job: dict[str, Any], out_dir: Path, seed: int,
    runtime: RuntimeConfig | None, progress: Progress,
) -> StageResult:  # fmt: skip
    count = config.processes or 1
    here = runtime or RuntimeConfig()
    share = here.model_copy(update={"threads": max(1, here.threads // count)})
    job |= {
        "stage": stage,
        "config": config.model_dump(mode="json"),
        "out_dir": _path(out_dir),
        "seed": seed,
        "runtime": share.model_dump(mode="json"),
    }
    return launch(job, count, progress)


def _path(path: Path) -> str:
    return str(path.absolute())
