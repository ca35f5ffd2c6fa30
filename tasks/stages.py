"""The pipeline's stages: what each takes, what of the configuration it depends on, what it makes.

This is the only place that knows both the library's functions and the artifacts' roles. Heavy
imports stay inside the functions: a run that finds everything done never loads torch.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import PipelineConfig
from rlhf.config.processes import WHERE
from rlhf.errors import ArtifactMissing
from rlhf.files import read_json, write_json
from rlhf.gates import VERDICT, Approved, judge, read_verdict, require
from rlhf.modeling.source import ExternalModel
from rlhf.progress import Progress
from rlhf.stage import StageResult
from rlhf.store import ArtifactRef, Producer, Store
from tasks.checkpoints import place_of, uploads_of
from tasks.external_inputs import (
    base_of_others,
    judges_of_others,
    reward_model_of_others,
    reward_settings,
)
from tasks.promotion import is_champion, promote

EVALUATION = "evaluation.json"


@dataclass(frozen=True)
class StageRun:
    """All that a stage's body gets: inputs as verified local folders, and where to write."""

    config: PipelineConfig
    refs: Mapping[str, ArtifactRef]
    folders: Mapping[str, Path]
    out_dir: Path
    checkpoints: Path
    store: Store
    producer: Producer
    progress: Progress


@dataclass(frozen=True)
class Stage:
    """One node of the pipeline.

    `inputs` maps a role to the stage that makes it. `depends_on` picks the configuration that
    changes the result, without paths: what lies there counts, not where it lies. `kind` is the
    kind of artifact made. `foreign` is the model of others that it starts from, if any; its files
    are in `StageRun.folders["base"]`.
    """

    name: str
    kind: str
    inputs: Mapping[str, str]
    depends_on: Callable[[PipelineConfig], Mapping[str, Any]]
    body: Callable[[StageRun], StageResult]
    #: Parts of the one-line summary: a format, and the metrics that it takes.
    headline: tuple[tuple[str, ...], ...] = field(default=())
    foreign: Callable[[PipelineConfig], ExternalModel | None] = field(default=lambda _: None)
    #: Whether what it did outside of its artifact still holds; if not, it is done again.
    holds: Callable[[PipelineConfig, Mapping[str, ArtifactRef], Store], bool] = field(
        default=lambda *_: True
    )

    def needs(self, config: PipelineConfig) -> Mapping[str, str]:
        """The inputs under this configuration: a ready model is published without any."""
        foreign = self.foreign(config)
        return {} if foreign and foreign.ready else self.inputs


def _prepare_data(run: StageRun) -> StageResult:
    from rlhf.data.prepare import prepare_data

    config = run.config
    return prepare_data(
        config.data, run.out_dir, seed=config.seed, store_options=config.store_options,
        progress=run.progress,
    )  # fmt: skip


def _train_sft(run: StageRun) -> StageResult:
    config, base = run.config, run.config.base
    if config.sft.processes and config.sft.enabled:
        from rlhf.launch import train_sft
    else:
        from rlhf.sft import train_sft
    if "base" in run.folders:
        base = base.model_copy(update={"path": str(run.folders["base"]), "revision": None})
    return train_sft(
        config.sft, base, run.folders["data"], run.out_dir, seed=config.seed,
        runtime=config.runtime, progress=run.progress,
    )  # fmt: skip


def _train_reward_model(run: StageRun) -> StageResult:
    ready = reward_model_of_others(run.config)
    if ready and ready.ready:
        from rlhf.adopt import adopt_reward_model

        folder = run.folders["base"]
        return adopt_reward_model(ready, folder, run.out_dir, runtime=run.config.runtime)
    if run.config.reward_model.processes:
        from rlhf.launch import train_reward_model
    else:
        from rlhf.reward import train_reward_model

    config, section = run.config, run.config.reward_model
    if "base" in run.folders:
        section = section.model_copy(update={"base": str(run.folders["base"])})
    return train_reward_model(
        section, run.folders["data"], run.folders["sft"], run.out_dir, seed=config.seed,
        runtime=config.runtime, progress=run.progress,
    )  # fmt: skip


def _evaluate_reward_model(run: StageRun) -> StageResult:
    from rlhf.evaluate import evaluate_reward_model

    config = run.config
    return evaluate_reward_model(
        config.evaluation, config.data, run.folders["data"], run.folders["reward-model"],
        run.out_dir, max_length=config.reward_model.max_length, runtime=config.runtime,
        progress=run.progress,
    )  # fmt: skip


def _train_policy(run: StageRun) -> StageResult:
    config = run.config
    where: dict[str, Any]
    if config.ppo.processes:
        from rlhf.launch import train_policy

        where = {"place": place_of(run)}
    else:
        from rlhf.ppo.train import train_policy

        where = {"uploads": uploads_of(run)}
    # Where a ready reward model came from is no part of a checkpoint's identity; its digest is.
    section = config.ppo.model_copy(update={"reward_model_path": None})
    return train_policy(
        section, run.folders["data"], run.folders["sft"], _approved_reward_model(run),
        run.out_dir, seed=config.seed, checkpoints=run.checkpoints, runtime=config.runtime,
        identity={
            "data": run.refs["data"].digest,
            "base": run.refs["sft"].digest,
            "reward model": run.refs["reward-model"].digest,
        },
        progress=run.progress, **where,
    )  # fmt: skip


def _approved_reward_model(run: StageRun) -> Approved[Path]:
    """The reward model's folder, with the proof that its gate said yes."""
    ref = run.refs["reward-model"]
    verdict = read_verdict(run.folders["verdict"])
    return require(ref, ref.digest, verdict).map(lambda _: run.folders["reward-model"])


def _evaluate_policy(run: StageRun) -> StageResult:
    from rlhf.evaluate import evaluate_policy

    config = run.config
    return evaluate_policy(
        config.evaluation, config.ppo, run.folders["data"], run.folders["sft"],
        run.folders["policy"], run.folders["reward-model"], run.out_dir, seed=config.seed,
        runtime=config.runtime, progress=run.progress,
    )  # fmt: skip


def _gate(name: str, subject: str, rules: str) -> Callable[[StageRun], StageResult]:
    """A gate's body: it publishes its verdict whatever it is; `verdict_of` raises afterwards."""

    def body(run: StageRun) -> StageResult:
        metrics = read_json(run.folders["evaluation"] / EVALUATION)
        verdict = judge(name, run.refs[subject].digest, metrics, getattr(run.config.gates, rules))
        write_json(run.out_dir / VERDICT, asdict(verdict))
        passed = sum(c.passed for c in verdict.checks)
        return StageResult(
            {"approved": verdict.approved, "passed": passed, "rules": len(verdict.checks)}
        )

    return body


STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        Stage(
            "prepare-data", "dataset", {},
            lambda c: {"data": c.data.model_dump(exclude={"source"})}, _prepare_data,
            (("{:,} pairs", "pairs_train"), ("{:,} prompts", "prompts_train")),
        ),
        Stage(
            "train-sft", "policy", {"data": "prepare-data"},
            lambda c: {
                "sft": c.sft.model_dump(exclude={*WHERE}),
                "base": c.base.model_dump(exclude={"path"}),
            },
            _train_sft,
            (("loss {:.3f}", "loss"), ("{:,} parameters", "parameters")), base_of_others,
        ),
        Stage(
            "train-reward-model", "reward-model", {"data": "prepare-data", "sft": "train-sft"},
            reward_settings, _train_reward_model,
            (("loss {:.3f}", "loss"), ("ready model, {:,} parameters", "parameters")),
            reward_model_of_others,
        ),
        Stage(
            "evaluate-reward-model", "evaluation",
            {"data": "prepare-data", "reward-model": "train-reward-model"},
            lambda c: {
                "evaluation": c.evaluation,
                "world": c.data.world,
                "max_length": c.reward_model.max_length,
            },
            _evaluate_reward_model,
            (
                ("accuracy {:.3f} [{:.3f}, {:.3f}]", "accuracy", "accuracy_low", "accuracy_high"),
                ("longer reply {:.3f}", "baseline_longer"), ("ceiling {:.3f}", "ceiling"),
            ),
        ),
        Stage(
            "gate-reward-model", "verdict",
            {"reward-model": "train-reward-model", "evaluation": "evaluate-reward-model"},
            lambda c: {"rules": c.gates.reward_model},
            _gate("gate-reward-model", "reward-model", "reward_model"),
            (("{} of {} rules met", "passed", "rules"),),
        ),
        Stage(
            "train-policy", "policy",
            {
                "data": "prepare-data", "sft": "train-sft",
                "reward-model": "train-reward-model", "verdict": "gate-reward-model",
            },
            lambda c: {
                "ppo": c.ppo.model_dump(exclude={"reward_model_path", *WHERE}),
                "others": judges_of_others(c.ppo),
            },
            _train_policy,
            (("reward {:.2f}", "reward"), ("KL {:.2f}", "kl")),
        ),
        Stage(
            "evaluate-policy", "evaluation",
            {
                "data": "prepare-data", "sft": "train-sft",
                "policy": "train-policy", "reward-model": "train-reward-model",
            },
            lambda c: {
                "evaluation": c.evaluation,
                "max_new_tokens": c.ppo.max_new_tokens,
                "stop_sequences": c.ppo.generation.stop_sequences,
            },
            _evaluate_policy,
            (
                ("wins {:.1%}", "sampled.win_rate"), ("gold wins {:.1%}", "sampled.gold_win_rate"),
                ("KL {:.2f}", "sampled.kl"),
            ),
        ),
        Stage(
            "gate-policy", "verdict", {"policy": "train-policy", "evaluation": "evaluate-policy"},
            lambda c: {"rules": c.gates.policy}, _gate("gate-policy", "policy", "policy"),
            (("{} of {} rules met", "passed", "rules"),),
        ),
        Stage(
            "promote", "promotion",
            {"data": "prepare-data", "policy": "train-policy", "verdict": "gate-policy"},
            # Who has to approve, and how long an answer may take, change nothing of what is made.
            lambda c: {"promotion": c.promotion.model_dump(include={"name"})}, promote,
            (("champion of {}", "model"),), holds=is_champion,
        ),
    )
}  # fmt: skip


def stage_named(name: str) -> Stage:
    """The stage of that name.

    Raises:
        ArtifactMissing: There is none; the message lists those there are.
    """
    if name not in STAGES:
        raise ArtifactMissing(f"{name!r} is no stage; choose one of {', '.join(STAGES)}")
    return STAGES[name]
