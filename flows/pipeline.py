"""The pipeline as a flow: stages in order, then a report and a final state."""

from __future__ import annotations

import re
import time
from datetime import UTC, datetime
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Failed

from flows.signals import exit_on_sigterm
from rlhf.config import LoadedConfig, PipelineConfig, apply_machine_settings
from rlhf.errors import (
    BAD_INPUT,
    AlreadyChampion,
    ApprovalMissing,
    ApprovalRefused,
    GateRejected,
    NotBetter,
    explain,
    is_bad_input,
)
from rlhf.files import expand_home
from rlhf.report import GREEN, RunOutcome, StageRow, StageState
from rlhf.store import ArtifactRef
from tasks.approvals import ask
from tasks.board import board
from tasks.costs import cost_of_failed, costs_of_stage, expect_costs, record_costs, spending
from tasks.drift import GATE, check_drift
from tasks.gate_check import CHECK, check_gates
from tasks.lost_runs import given_up
from tasks.parameters import NO_OVERRIDES, NO_PRESET, Overrides, Preset, configuration_name, resolve
from tasks.prefect_tasks import run_task
from tasks.preflight import preflight_flow
from tasks.promotion import is_waiting
from tasks.report import PipelineRun, write_report
from tasks.retries import retried
from tasks.run_record import Awaiting
from tasks.runner import Outcome
from tasks.stage import Stage, store_of
from tasks.stages import PREPARE_DATA, STAGES, TRAIN_POLICY

#: Outcome of a run that one of these errors stopped; any other error is a failure.
OUTCOMES = (
    (AlreadyChampion, RunOutcome.PROMOTED),
    (NotBetter, RunOutcome.NOT_BETTER),
    (GateRejected, RunOutcome.GATE_REJECTED),
    (ApprovalMissing, RunOutcome.AWAITING_APPROVAL),
    (ApprovalRefused, RunOutcome.REFUSED),
)


def run_name() -> str:
    """Return a flow run's name: that of the configuration, and the time.

    Prefect calls this again for a retried or resumed run, which keeps its name.
    """
    name = configuration_name(flow_run.parameters)
    before = flow_run.get_name() or ""
    if re.fullmatch(rf"{re.escape(name)}-\d{{8}}-\d{{6}}", before):
        return before
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


@flow(name="rlhf-pipeline", flow_run_name=run_name, persist_result=False)
def pipeline(preset: Preset = NO_PRESET, overrides: Overrides = NO_OVERRIDES) -> State[PipelineRun]:
    """Data prep → SFT → reward model → gate → PPO → gate → promotion, then a report.

    Args:
        preset: Name of a file in `configs/` or RLHF_PRESETS; none means all defaults.
        overrides: What differs from it, for example `{"ppo": {"kl_coef": 0.05}}`.
    """
    late = given_up()
    if late is not None:
        return late
    loaded = resolve(preset, overrides)
    preflight_flow(loaded.config)
    state, _ = run_pipeline(loaded)
    return state


def run_pipeline(loaded: LoadedConfig) -> tuple[State[PipelineRun], PipelineRun]:
    """Run the stages and write the report, as part of the flow that is running."""
    config = loaded.config
    started = datetime.now(UTC).isoformat(timespec="seconds")
    name = flow_run.get_name() or config.name
    run = PipelineRun(config, loaded.sources, name, started)
    run.advice = tuple(loaded.advice())
    for line in run.advice:
        get_run_logger().warning(line)
    work_dir = expand_home(apply_machine_settings(config).runtime.work_dir)
    store = store_of(config).uri
    with (
        exit_on_sigterm(),
        board.running(name, [*STAGES], work_dir, store, config.store_options),
    ):
        run_stages(run)
        write_report(run)
        is_bad = run.outcome == RunOutcome.FAILED and is_bad_input(run.error)
        board.end(
            run.outcome.value, run.reason, BAD_INPUT if is_bad else None, awaiting=_awaiting(run)
        )
    if run.outcome == RunOutcome.PROMOTED:
        return Completed(message=run.reason, data=run), run
    if run.outcome in GREEN:
        return Completed(name=run.outcome.value, message=run.reason, data=run), run
    state = None if run.outcome == RunOutcome.FAILED else run.outcome.value
    # A worker's process ends with the error; the caller of the flow gets the whole run.
    data = run.error if deployment.id else run
    return Failed(name=state, message=run.reason, data=data), run


def _awaiting(run: PipelineRun) -> Awaiting | None:
    """Return the policy that `rlhf approve <run>` decides on, if the run waits for that."""
    if run.outcome != RunOutcome.AWAITING_APPROVAL:
        return None
    policy, line = run.refs[TRAIN_POLICY.name], run.config.promotion.name
    return Awaiting(policy=policy.digest, store=store_of(run.config).uri, line=line)


def run_stages(run: PipelineRun) -> None:
    """Run the stages in order until one of them stops the run."""
    expect_costs(run)
    for stage in STAGES.values():
        started, name = time.monotonic(), str(stage.name)
        result = _run(run, stage)
        if isinstance(result, Outcome):
            run.refs[stage.name] = result.ref
            state = StageState.CACHED if result.cached else StageState.COMPLETED
            run.rows.append(
                StageRow(
                    name=name, state=state, seconds=result.seconds, metric=result.headline,
                    artifact=result.ref.digest, **costs_of_stage(run, stage, result),
                )
            )  # fmt: skip
            if stage.tracks_steps and not result.cached:
                record_costs(run)
            board.end_stage(name, state.value, result.seconds, result.headline)
            if stage is not PREPARE_DATA:
                continue
            started = time.monotonic()
            name, result = _check_data(run, result.ref)
            if result is None:
                continue
        run.outcome = next((o for e, o in OUTCOMES if isinstance(result, e)), RunOutcome.FAILED)
        run.reason = explain(result)
        run.error = result
        is_kept = isinstance(result, NotBetter)
        state = StageState.NOT_BETTER if is_kept else StageState(run.outcome.value)
        seconds = time.monotonic() - started
        cost = cost_of_failed(run, stage, result) if name == stage.name else None
        run.rows.append(
            StageRow(name=name, state=state, seconds=seconds, message=run.reason, cost=cost)
        )
        board.end_stage(name, state.value, seconds, run.reason)
        break
    else:
        run.outcome = RunOutcome.PROMOTED
        run.reason = (
            f"The policy {_met(run.config)} is the champion of {run.config.promotion.name}."
        )
    done = {row.name for row in run.rows}
    run.rows += [
        StageRow(name=name, state=StageState.NOT_RUN) for name in STAGES if name not in done
    ]
    record_costs(run)


def _run(run: PipelineRun, stage: Stage) -> Any:
    """Run a stage with its optional inputs, and return its outcome or error."""
    config = run.config
    inputs = {role: run.refs[maker] for role, maker in stage.inputs.items()}
    waits = False
    try:
        if stage.needs_approval:
            policy = inputs["policy"]
            waits = retried(config, "the approval", lambda: is_waiting(config, policy, run.name))
        optional = retried(
            config, f"finding what {stage.name} needs",
            lambda: stage.find_optional(config, inputs, store_of(config)),
        )  # fmt: skip
    except Exception as error:
        return error
    if waits:
        run.outcome = RunOutcome.AWAITING_APPROVAL
        run.reason = f"The policy {_met(config)} waits for a person's approval."
        record_costs(run)
        about = write_report(run)
        try:
            # A run of a deployment ends here, until it is resumed: by a signal that is no
            # Exception, and that no retry may repeat.
            ask(inputs["policy"].digest, about)
        except Exception as error:
            return error
    state = run_task(stage, config, {**inputs, **optional}, dict(run.refs), spending(run))
    return state.result(raise_on_failure=False)


def _check_data(run: PipelineRun, data: ArtifactRef) -> tuple[str, BaseException | None]:
    """Compare the data with the champion's, and check what the gates will need.

    Returns:
        Name of the last check, and the error that stops the run, if there is one.
    """
    config, log = run.config, get_run_logger()
    name = GATE
    try:
        run.drift = retried(config, GATE, lambda: check_drift(config, data, store_of(config)))
        for line in run.drift.warnings:
            log.warning("drift: %s", line)
        if run.drift.rejection is not None:
            return GATE, run.drift.rejection
        name = CHECK
        run.gates = retried(config, CHECK, lambda: check_gates(config, data, store_of(config)))
        for line in run.gates.lines:
            log.info("gates: %s", line)
    except Exception as error:
        return name, error
    return CHECK, None


def _met(config: PipelineConfig) -> str:
    """Return what a promotion rests on, for a sentence on the policy."""
    rules = {"reward_model": config.gates.reward_model, "policy": config.gates.policy}
    absent = [f"gates.{name}" for name, value in rules.items() if value is None]
    if absent:
        return f"passed without a gate ({' and '.join(absent)} = none), and"
    return "met every gate and"
