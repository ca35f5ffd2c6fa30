"""The pipeline: every stage in turn, a report whatever happens, one final state that tells."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.runtime import deployment, flow_run
from prefect.states import Completed, Failed

from flows.leaving import before_prefect
from flows.reporting import write_report
from rlhf.config import Loaded, PipelineConfig, advice
from rlhf.errors import ApprovalMissing, ApprovalRefused, GateRejected
from rlhf.report import StageRow
from rlhf.store import ArtifactRef
from tasks.approval import is_waiting, wait_for_approval
from tasks.first import check_first
from tasks.parameters import (
    NO_PRESET,
    NOTHING,
    Overrides,
    Preset,
    configuration_name,
    resolve,
)
from tasks.prefect_tasks import run_task
from tasks.runner import Outcome
from tasks.stages import STAGES

PROMOTED, REJECTED, FAILED = "Promoted", "GateRejected", "Failed"
AWAITING, REFUSED = "AwaitingApproval", "Refused"
#: How a run ends that one of these errors stopped; any other has failed.
OUTCOMES = ((GateRejected, REJECTED), (ApprovalMissing, AWAITING), (ApprovalRefused, REFUSED))


@dataclass
class PipelineRun:
    """What happened, stage by stage; filled while the run goes on."""

    config: PipelineConfig
    origins: Mapping[str, str]
    name: str
    started: str
    refs: dict[str, ArtifactRef] = field(default_factory=dict)
    rows: list[StageRow] = field(default_factory=list)
    outcome: str = FAILED
    reason: str = ""
    error: BaseException | None = None
    report: Path | None = None
    advice: tuple[str, ...] = ()

    @property
    def all_cached(self) -> bool:
        """Whether nothing had to be run."""
        return all(row.state == "Cached" for row in self.rows)


def run_name() -> str:
    """The configuration's name and the time: readable in Prefect's list of runs.

    Prefect asks again when a run is retried or resumed; it keeps the name that it has.
    """
    name = configuration_name(flow_run.parameters)
    before = flow_run.get_name() or ""
    if re.fullmatch(rf"{re.escape(name)}-\d{{8}}-\d{{6}}", before):
        return before
    return f"{name}-{datetime.now(UTC):%Y%m%d-%H%M%S}"


@flow(name="rlhf-pipeline", flow_run_name=run_name, persist_result=False)
def pipeline(preset: Preset = NO_PRESET, overrides: Overrides = NOTHING) -> State[PipelineRun]:
    """Data prep → SFT → reward model → gate → PPO → gate → promotion, then a report.

    Args:
        preset: Name of a file in `configs/`, such as quickstart; none means all defaults.
        overrides: What differs from it, for example `{"ppo": {"kl_coef": 0.05}}`.
    """
    loaded = resolve(preset, overrides)
    check_first(loaded.config)
    state, _ = run_pipeline(loaded)
    return state


def run_pipeline(loaded: Loaded) -> tuple[State[PipelineRun], PipelineRun]:
    """All of the pipeline, as part of the flow that is running."""
    config = loaded.config
    started = datetime.now(UTC).isoformat(timespec="seconds")
    name = flow_run.get_name() or config.name
    run = PipelineRun(config, loaded.sources, name, started)
    run.advice = tuple(advice(config))
    for line in run.advice:
        get_run_logger().warning(line)
    with before_prefect():
        run_stages(run)
        write_report(run)
    if run.outcome == PROMOTED:
        return Completed(message=run.reason, data=run), run
    if run.outcome == AWAITING:
        return Completed(name=AWAITING, message=run.reason, data=run), run
    state = run.outcome if run.outcome in (REJECTED, REFUSED) else None
    # A worker's process ends with the error; who called this flow gets all that happened.
    data = run.error if deployment.id else run
    return Failed(name=state, message=run.reason, data=data), run


def run_stages(run: PipelineRun) -> None:
    """Run the stages in order until one of them stops the run."""
    for stage in STAGES.values():
        if stage.name == "promote" and is_waiting(run.config, run.refs):
            _ask(run)
        inputs = {role: run.refs[producer] for role, producer in stage.inputs.items()}
        begun = time.monotonic()
        state = run_task(stage.name, run.config, inputs)
        result: Any = state.result(raise_on_failure=False)
        if isinstance(result, Outcome):
            run.refs[stage.name] = result.ref
            run.rows.append(_row(result, "Cached" if result.cached else "Completed"))
            continue
        run.outcome = next((o for kind, o in OUTCOMES if isinstance(result, kind)), FAILED)
        run.reason = str(result) or type(result).__name__
        run.error = result
        seconds = time.monotonic() - begun
        run.rows.append(
            StageRow(name=stage.name, state=run.outcome, seconds=seconds, message=run.reason)  # pyright: ignore[reportArgumentType]
        )
        break
    else:
        run.outcome = PROMOTED
        run.reason = (
            f"The policy met every gate and is the champion of {run.config.promotion.name}."
        )
    done = {row.name for row in run.rows}
    run.rows += [StageRow(name=name, state="NotRun") for name in STAGES if name not in done]


def _ask(run: PipelineRun) -> None:
    """Have a person look at the report; a run of a deployment ends here, until it is resumed."""
    run.outcome = AWAITING
    run.reason = "The policy met every gate and waits for a person's approval."
    about = write_report(run)
    wait_for_approval(run.config, run.refs, run.name, about)


def _row(outcome: Outcome, state: Any) -> StageRow:
    return StageRow(
        name=outcome.stage,
        state=state,
        seconds=outcome.seconds,
        metric=outcome.headline,
        artifact=outcome.ref.digest,
    )
