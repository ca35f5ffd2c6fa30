"""One retriable Prefect task per stage."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import Task, task
from prefect.artifacts import create_markdown_artifact, create_table_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed
from prefect.tasks import exponential_backoff

from rlhf.config import PipelineConfig
from rlhf.config.placement import INLINE
from rlhf.errors import worth_retrying
from rlhf.files import read_json
from rlhf.gates import require
from rlhf.store import ArtifactRef
from tasks.metrics import StageMetrics
from tasks.progress import StageProgress, harmless
from tasks.remote import run_remotely
from tasks.runner import Outcome, run_stage, store_of
from tasks.stages import STAGES, read_verdict

Refs = dict[str, ArtifactRef]


def retry_condition(_: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Retry what trying again can cure; a config error or a rejection stays what it is."""
    error = state.result(raise_on_failure=False)
    return isinstance(error, BaseException) and worth_retrying(error)


def run_task(name: str, config: PipelineConfig, inputs: Refs) -> State[Outcome]:
    """Run a stage as a task of the current flow, with the configuration's retries."""
    retries = config.retries
    configured = TASKS[name].with_options(
        retries=retries.attempts,
        retry_delay_seconds=exponential_backoff(retries.delay_seconds)(retries.attempts) or 0,
        retry_jitter_factor=retries.jitter,
    )
    return configured(config, inputs, return_state=True)


def _task(name: str) -> Task[[PipelineConfig, Refs], Any]:
    @task(name=name, task_run_name=name, retry_condition_fn=retry_condition, persist_result=False)
    def stage_task(config: PipelineConfig, inputs: Refs) -> State[Outcome]:
        place = config.place_of(name)
        if place == INLINE:
            metrics = StageMetrics(name, config, inputs)
            with StageProgress(name, metrics) as progress:
                outcome = run_stage(STAGES[name], config, inputs, progress)
                if not outcome.cached:
                    metrics.summarise(outcome.metrics)
            with harmless("results"):
                _show_result(outcome, config)
        else:
            outcome = run_remotely(STAGES[name], config, inputs, place)
        if STAGES[name].kind == "verdict":
            _enforce(outcome, inputs, config)
        label = "Cached" if outcome.cached else "Completed"
        return Completed(name=label, message=outcome.headline, data=outcome)

    return stage_task


def _enforce(outcome: Outcome, inputs: Mapping[str, ArtifactRef], config: PipelineConfig) -> None:
    """Raise GateRejected for a rejection, after its verdict was published and shown."""
    verdict = read_verdict(store_of(config).fetch(outcome.ref))
    subject = next(ref for role, ref in inputs.items() if ref.digest == verdict.subject)
    require(subject, subject.digest, verdict)


def _show_result(outcome: Outcome, config: PipelineConfig) -> None:
    """Tables and samples for Prefect's UI."""
    create_table_artifact(
        table=[{"metric": k, "value": v} for k, v in outcome.metrics.items()],
        key=f"{outcome.stage}-result",
        description=f"{outcome.headline} · artifact `{outcome.ref.short}`",
    )
    stage = STAGES[outcome.stage]
    if stage.kind == "verdict":
        verdict = read_verdict(store_of(config).fetch(outcome.ref))
        rows = [
            {"metric": c.metric, "value": c.value, "needs": c.bound, "passed": c.passed}
            for c in verdict.checks
        ]
        create_table_artifact(table=rows, key=f"{outcome.stage}-verdict", description=outcome.stage)
    if outcome.stage == "evaluate-policy":
        samples = read_json(store_of(config).fetch(outcome.ref) / "samples.json")
        create_markdown_artifact(
            key="samples", markdown=_markdown(samples[: config.evaluation.samples])
        )


def _markdown(samples: list[dict[str, Any]]) -> str:
    """Samples as quotations, so that nothing in them acts as markup of ours."""
    blocks = []
    for sample in samples:
        prompt, before, after = (
            str(sample[k]).replace("\n", "\n> ") for k in ("prompt", "before", "after")
        )
        blocks.append(f"**Prompt**\n> {prompt}\n\n*Before*\n> {before}\n\n*After*\n> {after}\n")
    return "\n---\n".join(blocks)


TASKS: dict[str, Task[[PipelineConfig, Refs], Any]] = {name: _task(name) for name in STAGES}
