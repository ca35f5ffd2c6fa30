"""One Prefect task per stage, with retries and a final state."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from prefect import Task, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.states import Completed

from rlhf.budget import Spending
from rlhf.champions import champion
from rlhf.config import PipelineConfig
from rlhf.config.pipeline import INLINE
from rlhf.errors import (
    AlreadyChampion,
    GateRejected,
    NotBetter,
    RLHFError,
    explain,
    explained,
    is_retriable,
)
from rlhf.gates import read_verdict, require
from rlhf.markdown import Markdown, code, escape, words
from rlhf.report.model import StageState
from rlhf.store import ArtifactRef
from tasks.board import board
from tasks.prefect_pages import show_page, show_table
from tasks.progress import StageProgress, harmless
from tasks.remote import run_remotely
from tasks.runner import NOTHING_SPENT, Outcome, run_stage
from tasks.stage import Stage, store_of
from tasks.stages import STAGES
from tasks.trackers import StageMetrics

Refs = dict[str, ArtifactRef]


def run_task(
    stage: Stage, config: PipelineConfig, inputs: Refs, held: Refs | None = None,
    spent: Spending = NOTHING_SPENT,
) -> State[Outcome]:  # fmt: skip
    """Run a stage as a task of the current flow, with the configuration's retries.

    Args:
        stage: The stage.
        config: Configuration of the run.
        inputs: Inputs by role.
        held: Results of earlier stages, which collections leave alone meanwhile.
        spent: What the run's earlier stages took of its budget.
    """
    retries = config.retries
    configured = TASKS[stage.name].with_options(
        retries=retries.attempts,
        retry_delay_seconds=[retries.delay(n) for n in range(retries.attempts)] or 0,
        retry_jitter_factor=retries.jitter,
    )
    return configured(config, inputs, held or {}, spent, return_state=True)


def retry_condition(task: Task[..., Any], run: TaskRun, state: State[Any]) -> bool:
    """Return whether a retry may succeed; not after a config error or a rejection."""
    error = state.result(raise_on_failure=False)
    if not (isinstance(error, BaseException) and is_retriable(error)):
        return False
    if run.run_count <= task.retries:
        times = f"try {run.run_count + 1} of {task.retries + 1}"
        board.wait(f"{task.name} failed and gets {times}: {explain(error)}")
    return True


def _task(stage: Stage) -> Task[..., Any]:
    @task(
        name=stage.name, task_run_name=stage.name, retry_condition_fn=retry_condition,
        persist_result=False,
    )  # fmt: skip
    def stage_task(
        config: PipelineConfig, inputs: Refs, held: Refs, spent: Spending = NOTHING_SPENT
    ) -> State[Any]:
        try:
            return run(config, inputs, held, spent)
        except RLHFError:
            raise
        except Exception as error:
            # What Prefect shows of a task is its exception's text: one line, as of the flow.
            raise explained(error) from error

    def run(config: PipelineConfig, inputs: Refs, held: Refs, spent: Spending) -> State[Any]:
        deployment = config.deployment_of(stage.name)
        if deployment == INLINE:
            metrics = StageMetrics(stage, config, inputs)
            with StageProgress(stage.name, metrics) as progress:
                outcome = run_stage(stage, config, inputs, progress, held.values(), spent)
                if not outcome.cached:
                    metrics.summarise(outcome.metrics)
            with harmless("results"):
                _show_result(stage, outcome, config)
        else:
            board.start_stage(stage.name)
            outcome = run_remotely(stage, config, inputs, deployment, held.values(), spent)
        if stage.kind == "verdict":
            try:
                _enforce(outcome, inputs, config)
            except NotBetter as error:
                # A normal end: the task is green, and its result tells the flow.
                name = StageState.NOT_BETTER.value
                return Completed(name=name, message=str(error), data=error)
        state = StageState.CACHED if outcome.cached else StageState.COMPLETED
        return Completed(name=state.value, message=outcome.headline, data=outcome)

    return stage_task


def _show_result(stage: Stage, outcome: Outcome, config: PipelineConfig) -> None:
    """Create the tables and pages of a result in Prefect's UI."""
    metrics = [{"metric": k, "value": v} for k, v in outcome.metrics.items()]
    about = words(outcome.headline, "· artifact", code(outcome.ref.short))
    show_table(f"{stage.name}-result", metrics, about)
    if stage.show is None:
        return
    for key, shown in stage.show(store_of(config).fetch(outcome.ref), config).items():
        if isinstance(shown, Markdown):
            show_page(key, shown)
        else:
            show_table(key, shown, escape(stage.name))


def _enforce(outcome: Outcome, inputs: Mapping[str, ArtifactRef], config: PipelineConfig) -> None:
    """Raise GateRejected, or NotBetter, after the verdict was published and shown.

    Of a policy that is the champion all the same the error says so.
    """
    store = store_of(config)
    verdict = read_verdict(store.fetch(outcome.ref))
    subject = next(ref for ref in inputs.values() if ref.digest == verdict.subject)
    try:
        require(subject, subject.digest, verdict)
    except GateRejected as error:
        line = config.promotion.name
        entry = champion(store, line)
        if entry is None or entry.policy != subject.digest:
            raise
        fact = f"the champion of {line}{entry}"
        if isinstance(error, NotBetter):
            worse = f"the gate did not find it better than {str(verdict.champion)[:12]}"
            raise AlreadyChampion(
                f"The policy is {fact}; {worse}: {verdict.reason}", verdict
            ) from None
        raise GateRejected(f"{error}; it is {fact} all the same", verdict) from None


TASKS: dict[str, Task[..., Any]] = {name: _task(stage) for name, stage in STAGES.items()}
