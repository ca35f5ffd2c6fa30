"""The pipeline's stages: bodies, the table that declares them, their checkpoints.

The only module that joins the library's functions with the artifacts' roles. The bodies stand
before `STAGES`, whose rows name them. Heavy imports
stay inside functions: a run whose stages are all recorded loads no torch, and the command loads
Prefect, which `tasks.promotion` imports, only after it has set Prefect's environment variables.
"""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from rlhf.budget import PLANNED, STOPPED_AT
from rlhf.challenge import PART, compared_with, with_comparison
from rlhf.checkpoints.store import CheckpointStoreConfig, keep_best
from rlhf.config import DataConfig, PipelineConfig, PPOConfig, RewardModelConfig, SFTConfig
from rlhf.config.data import CONSEQUENCES
from rlhf.config.training import UNFINGERPRINTED_FIELDS
from rlhf.data.gate_prompts import PromptSet
from rlhf.data.lineage import forgotten_ids
from rlhf.data.rows import PAIRS_JUDGE, PROMPTS_GATE, PromptRow, read_rows
from rlhf.data.sources import source_digest
from rlhf.data.stored import read_summary
from rlhf.errors import ArtifactMissing, ConfigError, DataError, StoreError
from rlhf.files import expand_home, read_json, write_json
from rlhf.gates import VERDICT, Verdict, judge, read_verdict, require
from rlhf.markdown import Markdown, bold, escape, paragraphs, quotation, rule
from rlhf.modeling.source import CONFIG, ExternalModel
from rlhf.plain_text import one_line
from rlhf.report.samples import read_samples
from rlhf.saved import read_saved
from rlhf.stage import StageResult
from rlhf.store import ArtifactRef, Store
from rlhf.store.manifest import canonical_json, sha256_bytes
from tasks.challenge import OPTIONAL, optional_inputs, reply_settings
from tasks.external_inputs import (
    external_base_model,
    external_judge,
    external_reward_model,
    external_tokenizer,
    judge_settings,
    reward_function_digests,
    reward_settings,
)
from tasks.looks import take_look
from tasks.nodes import nodes_of
from tasks.rehearsal import rehearse_stage
from tasks.stage import Shown, Stage, StageRun, store_of

if TYPE_CHECKING:
    from rlhf.data.model_check import ModelCheck

log = logging.getLogger("rlhf.tasks")
EVALUATION = "evaluation.json"
SAMPLES = "samples.json"
#: Settings of the data that are in the stages' token limits.
_MODEL_SETTINGS = {"max_prompt", "max_reply", "system"}
#: Settings of the data that decide none of its bytes, or are in its digest by their content.
_NOT_IN_DATA = {"source", "eval_source", *_MODEL_SETTINGS, *CONSEQUENCES}
#: Parts of a headline: prompts that a stage shortened or left out.
PROMPT_COUNTS = (
    ("{:,} prompts shortened by whole turns", "prompts_shortened"),
    ("{:,} prompts left out as too long", "prompts_too_long"),
    ("{:,} prompts refused by the chat template", "prompts_refused"),
    ("{:,} system turns refused", "system_turns_refused"),
)


def _prepare_data(run: StageRun) -> StageResult:
    from rlhf.data.prepare import prepare_data

    config = run.config
    return prepare_data(
        _data_section(config), run.out_dir, seed=config.seed, store_options=config.store_options,
        forgotten=forgotten_ids(run.store), model=_model_check(run), progress=run.progress,
    )  # fmt: skip


def _data_section(config: PipelineConfig) -> DataConfig:
    """Return the section of the data; without a judge none of them are for one."""
    data = config.data
    if config.judge.enabled:
        return data
    world = data.world.model_copy(update={"judge_pairs": 0})
    return data.model_copy(update={"judge_fraction": data.judge_fraction or 0.0, "world": world})


def _model_check(run: StageRun) -> ModelCheck | None:
    """Return the check against the base model's tokenizer, if that is known before training."""
    if "base" not in run.folders:
        return None
    from rlhf.data.model_check import ModelCheck
    from rlhf.data.rendering import Renderer
    from rlhf.modeling.base import folder_context
    from rlhf.modeling.tokenizer import load_tokenizer

    folder, limits = run.folders["base"], run.config.token_limits()
    return ModelCheck(Renderer(load_tokenizer(folder)), limits.within(folder_context(folder)))


def _data_digest(config: PipelineConfig) -> str:
    """Return the digest of the source without the rows that the store's users forgot."""
    digest = source_digest(config.data, config.store_options)
    if config.data.source == "world":
        return digest
    ids = forgotten_ids(store_of(config))
    return f"{digest} without {sha256_bytes(canonical_json(sorted(ids)))}" if ids else digest


def _show_data(folder: Path, _: PipelineConfig) -> Mapping[str, Shown]:
    """Show how the source was read, and the reasons for leaving rows out."""
    summary = read_summary(folder)
    reasons = [{"reason": k, "rows": v} for k, v in summary.get("left_out", {}).items()]
    facts = [
        {"fact": key.replace("_", " "), "value": str(value)}
        for key, value in summary.items()
        if key not in ("left_out", "pairs_left_out", "notes", "findings", "sources")
    ]
    facts = [{"fact": "finding", "value": text} for text in summary.get("findings", ())] + facts
    facts += [{"fact": "note", "value": note} for note in summary.get("notes", ())]
    return {"data": facts, **({"data-left-out": reasons} if reasons else {})}


def _train_sft(run: StageRun) -> StageResult:
    section, base = run.config.sft, run.config.base
    if not section.enabled:
        # Nothing is trained, so no child processes are needed.
        section = section.model_copy(update={"processes": None, "nodes": 1})
    if "base" in run.folders:
        base = base.model_copy(update={"path": str(run.folders["base"]), "revision": None})
    result = _train(run, "sft", section, base=base, limits=run.config.token_limits("sft"))
    return StageResult({**result.metrics, **_about_base(run)})


def _about_base(run: StageRun) -> Mapping[str, str | None]:
    """Return the base's name for others, for cards; None from scratch.

    Of a folder nothing of its path: the same model elsewhere must give the same artifact, and where
    it lies is nobody else's business.
    """
    external = external_base_model(run.config)
    if external is None:
        return {"base_model": None}
    if external.is_artifact:
        return {"base_model": f"artifact:{run.refs['base'].digest}"}
    if external.uri.startswith("s3://") or external.is_on_hub:
        return {"base_model": external.uri}
    kind = read_json(run.folders["base"] / CONFIG).get("model_type")
    return {"base_model": f"a local model of type {one_line(kind)}"}


def _train_reward_model(run: StageRun) -> StageResult:
    external = external_reward_model(run.config)
    if external and external.ready:
        from rlhf.ready_reward_model import publish_ready_reward_model

        folder = run.folders["base"]
        return publish_ready_reward_model(external, folder, run.out_dir, runtime=run.config.runtime)
    section = run.config.reward_model
    if "base" in run.folders:
        section = section.model_copy(update={"base": str(run.folders["base"])})
    return _train(run, "reward_model", section, limits=run.config.token_limits())


def _train_judge(run: StageRun) -> StageResult:
    from rlhf.judge import has_judge_pairs, judge_section, measure_judge, write_no_judge

    config, data = run.config, run.folders["data"]
    if not config.judge.enabled:
        return write_no_judge(run.out_dir, "judge.enabled = false")
    if not has_judge_pairs(data):
        # The source is no part of the fingerprint, so the reason must fit both kinds.
        setting = "data.judge_fraction (of generated data, data.world.judge_pairs)"
        return write_no_judge(run.out_dir, f"the data have no pairs for one; set {setting}")
    section = judge_section(config.reward_model, run.folders.get("base"), config.judge.negatives)
    limits = config.token_limits()
    try:
        # Another seed than the reward model's, so that it has another head and order of rows.
        result = _train(
            run, "reward_model", section, limits=limits, pairs=PAIRS_JUDGE, seed=config.seed + 1
        )
    except ConfigError as error:
        if external := external_judge(config):
            raise external.error(str(error)) from None
        raise
    except DataError as error:  # its split is small; the other models' data are checked apart
        shutil.rmtree(run.out_dir)
        run.out_dir.mkdir()
        return write_no_judge(run.out_dir, str(error))
    return measure_judge(
        data, run.out_dir, result.metrics, _judge_base(run), limits=limits, runtime=config.runtime
    )


def _judge_base(run: StageRun) -> str:
    """Return what the judge starts from, without a path: artifacts don't depend on places."""
    external = external_judge(run.config)
    if external is None:
        return "the SFT policy"
    if external.is_artifact or external.is_on_hub:
        return external.uri
    return ", ".join(read_json(run.folders["base"] / CONFIG).get("architectures") or ["a model"])


def _train_policy(run: StageRun) -> StageResult:
    ref = run.refs["reward-model"]
    approved = require(ref, ref.digest, read_verdict(run.folders["verdict"]))
    # A checkpoint's identity holds the digest of a ready reward model, not its location.
    section = run.config.ppo.model_copy(update={"reward_model_path": None})
    return _train(
        run, "ppo", section, verdict=approved.verdict, limits=run.config.token_limits(),
        deadline=run.deadline,
        identity={
            "data": run.refs["data"].digest,
            "base": run.refs["sft"].digest,
            "reward model": ref.digest,
            "judge": run.refs["judge"].digest,
        },
    )  # fmt: skip


def _train(
    run: StageRun, field: str, section: SFTConfig | RewardModelConfig | PPOConfig, **values: Any
) -> StageResult:
    """Train in this process, or in the section's number of child processes and machines.

    Args:
        run: Arguments of the stage's body.
        field: Name of the section in the configuration.
        section: Hyper-parameters.
        values: Further fields of the `Job`.
    """
    from rlhf.launch import Job, launch, train

    nodes = nodes_of(run, STAGES[run.producer.stage], field, section)
    rehearse_stage(run)
    known = {"data": run.refs["data"].digest}
    if "base" in run.folders:  # its folder has another name in every try; the fingerprint knows it
        known["base"] = run.checkpoints.name
    elif "sft" in run.refs:
        known["base"] = run.refs["sft"].digest
    saves = isinstance(section, PPOConfig) or section.checkpoint_minutes is not None
    job = Job(
        stage=run.producer.stage, field=field, section=section, inputs=run.folders,
        out_dir=run.out_dir, runtime=run.config.runtime,
        checkpoints=run.checkpoints if saves else None,
        checkpoint_store=checkpoint_store_of(run) if saves else None,
        **{"seed": run.config.seed, "identity": known, **values},
    )  # fmt: skip
    if section.processes is None:
        return train(job, run.progress)
    return launch(job, run.progress, nodes)


def _evaluate_reward_model(run: StageRun) -> StageResult:
    from rlhf.evaluation import evaluate_reward_model

    config = run.config
    return evaluate_reward_model(
        config.evaluation, config.data, run.folders["data"], run.folders["reward-model"],
        run.out_dir, limits=config.token_limits(), runtime=config.runtime,
        progress=run.progress,
    )  # fmt: skip


def _evaluate_policy(run: StageRun) -> StageResult:
    from rlhf.evaluation import evaluate_policy

    config, folders, champion = run.config, run.folders, run.refs.get("champion")
    frozen = folders.get("champion-evaluation")
    return evaluate_policy(
        config.evaluation, config.ppo, folders["data"], folders["sft"], folders["policy"],
        folders["reward-model"], run.out_dir, judge=folders["judge"],
        champion=folders.get("champion"), champion_digest=champion and champion.digest,
        champion_replies=reply_settings(champion, run.store) if champion else None,
        prompts=frozen and frozen / PROMPTS_GATE, forgotten=forgotten_ids(run.store),
        limits=config.token_limits(), seed=config.seed, runtime=config.runtime,
        progress=run.progress,
    )  # fmt: skip


def _show_samples(folder: Path, config: PipelineConfig) -> Mapping[str, Shown]:
    """Show sample replies as quotations, so that nothing in them acts as Markdown."""
    blocks: list[Markdown] = []
    for sample in read_samples(folder / SAMPLES)[: config.evaluation.samples]:
        blocks += [rule()] if blocks else []
        for key in ("prompt", "before", "after"):
            blocks += [bold(key.capitalize()), quotation(sample[key])]
    return {"samples": paragraphs(*blocks)}


def _gate(subject: str, rules: str) -> Callable[[StageRun], StageResult]:
    """Return a gate's body: it writes the verdict; the task raises if it rejects.

    Args:
        subject: Role of the artifact that is judged.
        rules: Name of its rules in the section `gates`.
    """

    def body(run: StageRun) -> StageResult:
        metrics = read_saved(run.folders["evaluation"] / EVALUATION)
        chosen = getattr(run.config.gates, rules)
        verdict = judge(run.producer.stage, run.refs[subject].digest, metrics, chosen)
        if subject == "policy":
            verdict = _compare(run, verdict, metrics)
        write_json(run.out_dir / VERDICT, asdict(verdict))
        result: dict[str, Any] = {"approved": verdict.approved}
        if verdict.checks:
            passed = sum(c.passed for c in verdict.checks)
            result |= {"passed": passed, "rules": len(verdict.checks)}
        return StageResult(result | ({"note": verdict.approval} if chosen is None else {}))

    return body


def _compare(run: StageRun, verdict: Verdict, metrics: Mapping[str, Any]) -> Verdict:
    """Add the comparison with the champion to a policy's verdict, and count the look."""
    settings = run.config.gates.champion
    compared = compared_with(metrics)
    if settings is None or compared is None:
        return verdict
    line = run.config.promotion.name
    result = sha256_bytes(canonical_json(metrics[PART]))
    prompts = PromptSet(compared.prompts)
    path = run.folders["evaluation"] / PROMPTS_GATE
    if path.exists():  # not in an evaluation of an earlier version
        prompts = replace(PromptSet.of(read_rows(path, PromptRow)), digest=compared.prompts)
    before = take_look(run.store, line, prompts, verdict.subject, result, level=settings.look_level)
    return with_comparison(verdict, metrics, settings, before.count + 1, before.spent)


def _show_verdict(folder: Path, _: PipelineConfig) -> Mapping[str, Shown]:
    verdict = read_verdict(folder)
    rows = [
        {
            "metric": c.metric, "value": c.value, "low": c.low, "high": c.high, "n": c.n,
            "needs": c.bound, "passed": c.passed, "note": c.note,
        }
        for c in verdict.checks
    ]  # fmt: skip
    if not rows:
        return {f"{verdict.gate}-verdict": escape(f"{verdict.gate}: {verdict.approval}")}
    return {f"{verdict.gate}-verdict": rows}


def _promote(run: StageRun) -> StageResult:
    from tasks.promotion import promote

    return promote(run)


def _is_champion(
    config: PipelineConfig, refs: Mapping[str, ArtifactRef], store: Store
) -> bool:  # fmt: skip
    from tasks.promotion import is_champion

    return is_champion(config, refs["policy"], store)


def _limits(
    config: PipelineConfig, section: Literal["sft", "reward_model"] = "reward_model"
) -> Mapping[str, Any]:
    """Return the token limits without what decides only whether a stage stops."""
    limits = config.token_limits(section).model_dump(exclude={"max_bad_fraction"})
    # It is in the limit of prompts; where that is set, other stages need not run again.
    del limits["max_new_tokens"]
    return limits


def _idle_rotation(config: PipelineConfig) -> set[str]:
    """Return the name of the rotation where it changes no data: the world's prompts are its own."""
    return {"rotation"} if config.data.source == "world" else set()


def _base_tokenizer(config: PipelineConfig) -> ExternalModel | None:
    return external_tokenizer(config, PREPARE_DATA.name, TRAIN_SFT.name)


def _reward_limits(config: PipelineConfig) -> Mapping[str, Any]:
    """Return the limits of training a reward model; a ready one has none."""
    return {} if config.ppo.reward_model_path is not None else {"limits": _limits(config)}


PREPARE_DATA = Stage(
    name="prepare-data",
    kind="dataset",
    inputs={},
    depends_on=lambda c: {
        "data": _data_section(c).model_dump(exclude={*_NOT_IN_DATA, *_idle_rotation(c)}),
        **({"limits": _limits(c)} if _base_tokenizer(c) else {}),
    },
    external_model=_base_tokenizer,
    source_digest=_data_digest,
    body=_prepare_data,
    headline=(
        ("{:,} pairs", "pairs_train"),
        ("{:,} prompts", "prompts_train"),
        ("{:,} rows repeat another", "rows_merged"),
        ("{:,} prompts shortened by whole turns", "prompts_shortened"),
        ("{}", "rows_left_out"),
    ),
    show=_show_data,
)

TRAIN_SFT = Stage(
    name="train-sft",
    kind="policy",
    inputs={"data": PREPARE_DATA.name},
    depends_on=lambda c: {
        "sft": c.sft.model_dump(exclude={*UNFINGERPRINTED_FIELDS}),
        "base": c.base.model_dump(exclude={"path"}),
        "limits": _limits(c, "sft"),
    },
    external_model=external_base_model,
    body=_train_sft,
    headline=(
        ("the base as it is: {}", "not_trained"),
        ("loss {:.3f}", "loss"),
        ("held out {:.3f}, before {:.3f}", "heldout_loss", "heldout_loss_before"),
        ("{:,} parameters", "parameters"),
        ("{:,} replies cut at max_length", "replies_cut"),
        *PROMPT_COUNTS,
    ),
    section="sft",
    tracks_steps=True,
    length="epochs",
    is_off=lambda c: not c.sft.enabled,
)

TRAIN_REWARD_MODEL = Stage(
    name="train-reward-model",
    kind="reward-model",
    inputs={"data": PREPARE_DATA.name, "sft": TRAIN_SFT.name},
    depends_on=lambda c: {**reward_settings(c), **_reward_limits(c)},
    external_model=external_reward_model,
    body=_train_reward_model,
    headline=(
        ("loss {:.3f}", "loss"),
        ("ready model, {:,} parameters", "parameters"),
        ("{:,} pairs cut at max_length", "pairs_cut"),
        *PROMPT_COUNTS,
        ("{:,} left out, equal when cut", "pairs_equal_when_cut"),
    ),
    section="reward_model",
    tracks_steps=True,
    length="epochs",
)

EVALUATE_REWARD_MODEL = Stage(
    name="evaluate-reward-model",
    kind="evaluation",
    inputs={"data": PREPARE_DATA.name, "reward-model": TRAIN_REWARD_MODEL.name},
    depends_on=lambda c: {
        "evaluation": c.evaluation,
        "world": c.data.world,
        "limits": _limits(c),
    },
    body=_evaluate_reward_model,
    headline=(
        ("accuracy {:.3f} [{:.3f}, {:.3f}]", "accuracy", "accuracy_low", "accuracy_high"),
        ("longer reply {:.3f}", "baseline_longer"),
        ("ceiling {:.3f}", "ceiling"),
        ("{:,} pairs cut at max_length", "pairs_cut"),
        *PROMPT_COUNTS,
        ("{:,} left out, equal when cut", "pairs_equal_when_cut"),
    ),
    section="evaluation",
)

GATE_REWARD_MODEL = Stage(
    name="gate-reward-model",
    kind="verdict",
    inputs={
        "reward-model": TRAIN_REWARD_MODEL.name,
        "evaluation": EVALUATE_REWARD_MODEL.name,
    },
    depends_on=lambda c: {"rules": c.gates.reward_model},
    body=_gate("reward-model", "reward_model"),
    headline=(("{} of {} rules met", "passed", "rules"), ("{}", "note")),
    show=_show_verdict,
)

TRAIN_JUDGE = Stage(
    name="train-judge",
    kind="judge",
    inputs={"data": PREPARE_DATA.name, "sft": TRAIN_SFT.name},
    depends_on=lambda c: {**judge_settings(c), "limits": _limits(c)},
    external_model=external_judge,
    body=_train_judge,
    headline=(
        ("accuracy {:.3f} [{:.3f}, {:.3f}]", "accuracy", "accuracy_low", "accuracy_high"),
        ("no judge: {}", "reason"),
        *PROMPT_COUNTS,
    ),
    section="reward_model",
    tracks_steps=True,
    length="epochs",
    is_off=lambda c: not c.judge.enabled,
)

TRAIN_POLICY = Stage(
    name="train-policy",
    kind="policy",
    inputs={
        "data": PREPARE_DATA.name,
        "sft": TRAIN_SFT.name,
        "reward-model": TRAIN_REWARD_MODEL.name,
        "verdict": GATE_REWARD_MODEL.name,
        "judge": TRAIN_JUDGE.name,
    },
    depends_on=lambda c: {
        "ppo": c.ppo.model_dump(exclude={"reward_model_path", *UNFINGERPRINTED_FIELDS}),
        "others": reward_function_digests(c.ppo),
        "limits": _limits(c),
    },
    body=_train_policy,
    headline=(
        ("reward {:.2f} → {:.2f}", "reward_before", "reward"),
        ("KL {:.2f}", "kl"),
        ("update {:,}", "chosen_update"),
        ("stopped by the budget after {:,} of {:,} updates", STOPPED_AT, PLANNED),
        *PROMPT_COUNTS,
    ),
    section="ppo",
    tracks_steps=True,
    stops_at_deadline=True,
    length="total_episodes",
)

EVALUATE_POLICY = Stage(
    name="evaluate-policy",
    kind="evaluation",
    inputs={
        "data": PREPARE_DATA.name,
        "sft": TRAIN_SFT.name,
        "policy": TRAIN_POLICY.name,
        "reward-model": TRAIN_REWARD_MODEL.name,
        "judge": TRAIN_JUDGE.name,
    },
    depends_on=lambda c: {
        "evaluation": c.evaluation,
        "max_new_tokens": c.ppo.max_new_tokens,
        "limits": _limits(c),
        "stop_sequences": c.ppo.generation.stop_sequences,
        "rotation": c.data.rotation,
    },
    optional=OPTIONAL,
    find_optional=optional_inputs,
    body=_evaluate_policy,
    headline=(
        ("wins {:.1%}", "sampled.win_rate"),
        ("judge {:.1%}", "sampled.judge_win_rate"),
        ("reward {:.2f} → {:.2f}", "sampled.reward_before", "sampled.reward_after"),
        ("ended {:.0%} → {:.0%}", "sampled.eos_rate_before", "sampled.eos_rate"),
        ("against the champion {:.1%}", "champion.win_rate"),
        ("gold wins {:.1%}", "sampled.gold_win_rate"),
        ("KL {:.2f}", "sampled.kl"),
        *PROMPT_COUNTS,
    ),
    section="evaluation",
    show=_show_samples,
)

GATE_POLICY = Stage(
    name="gate-policy",
    kind="verdict",
    inputs={"policy": TRAIN_POLICY.name, "evaluation": EVALUATE_POLICY.name},
    depends_on=lambda c: {
        "rules": c.gates.policy,
        "champion": c.gates.champion,
        # Whose looks are counted.
        **({"line": c.promotion.name} if c.gates.champion else {}),
    },
    body=_gate("policy", "policy"),
    headline=(("{} of {} rules met", "passed", "rules"), ("{}", "note")),
    show=_show_verdict,
)

PROMOTE = Stage(
    name="promote",
    kind="promotion",
    inputs={
        "data": PREPARE_DATA.name,
        "policy": TRAIN_POLICY.name,
        "verdict": GATE_POLICY.name,
    },
    # Approval and time limits decide whether there is a promotion, not its content.
    depends_on=lambda c: {"promotion": c.promotion.model_dump(include={"name"})},
    needs_approval=True,
    holds=_is_champion,
    body=_promote,
    headline=(("champion of {}", "model"),),
)

#: All stages by name, in the order of a run.
STAGES: dict[str, Stage] = {
    stage.name: stage
    for stage in (
        PREPARE_DATA, TRAIN_SFT, TRAIN_REWARD_MODEL, EVALUATE_REWARD_MODEL, GATE_REWARD_MODEL,
        TRAIN_JUDGE, TRAIN_POLICY, EVALUATE_POLICY, GATE_POLICY, PROMOTE,
    )
}  # fmt: skip


def stage_named(name: str) -> Stage:
    """Return a stage by its name.

    Raises:
        ArtifactMissing: No stage has that name; the message lists those that exist.
    """
    if name not in STAGES:
        raise ArtifactMissing(f"{name!r} is no stage; choose one of {', '.join(STAGES)}")
    return STAGES[name]


def checkpoint_store_of(run: StageRun) -> CheckpointStoreConfig | None:
    """Return the store for a run's checkpoints; None if it uploads none."""
    config = run.config
    if not config.runtime.upload_checkpoints:
        return None
    return CheckpointStoreConfig(
        uri=config.store, options=config.store_options, name=_store_name(run.checkpoints),
        work_dir=str(expand_home(config.runtime.work_dir)),
        cache_bytes=int(config.runtime.cache_gb * 1e9), producer=run.producer,
    )  # fmt: skip


def discard_checkpoints(store: Store, checkpoints: Path) -> None:
    """Remove the checkpoints of a completed stage, if it had any.

    Of those in the store the best one stays until the next garbage collection.
    """
    if not checkpoints.exists():
        return
    stored = store.child(_store_name(checkpoints))
    try:
        keep_best(stored)
    except StoreError as error:
        log.warning("the checkpoints in %s are no longer needed, but stay (%s)", stored.uri, error)
    shutil.rmtree(checkpoints, ignore_errors=True)


def _store_name(checkpoints: Path) -> str:
    """Return the name within the pipeline's store, from the local folder's name."""
    return f"checkpoints/{checkpoints.name}"
