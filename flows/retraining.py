"""The retraining flow: runs the pipeline again when new data have arrived."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.pipeline import run_name, run_pipeline
from rlhf.report.model import RunOutcome
from tasks.drift import trigger_reason
from tasks.lost_runs import given_up
from tasks.parameters import NO_OVERRIDES, NO_PRESET, Overrides, Preset, resolve
from tasks.prefect_tasks import run_task
from tasks.preflight import preflight_flow
from tasks.retraining import new_pairs, record_retraining, situation, warm_started
from tasks.runner import Outcome
from tasks.stage import store_of
from tasks.stages import PREPARE_DATA

NO_NEW_DATA = "NoNewData"


@flow(name="retraining", flow_run_name=run_name, persist_result=False)
def retraining(preset: Preset = NO_PRESET, overrides: Overrides = NO_OVERRIDES) -> State[Any]:
    """Look at the data, and if they are new enough, run the pipeline warm-started.

    Args:
        preset: Name of a file in `configs/` or RLHF_PRESETS; none means all defaults.
        overrides: What differs from it, for example `{"retraining": {"min_new_pairs": 500}}`.
    """
    late = given_up()
    if late is not None:
        return late
    loaded = resolve(preset, overrides)
    config = loaded.config
    preflight_flow(config)
    store = store_of(config)
    state = situation(config, store)
    if state.same_data and not state.overdue:
        return _nothing(f"the data are those of {(state.last or {})['run']}")
    outcome: Outcome = run_task(PREPARE_DATA, config, {}).result()
    count = new_pairs(state, outcome.ref, store)
    least = config.retraining.min_new_pairs
    if not state.overdue and state.last is not None and count < least:
        reason = trigger_reason(config, outcome.ref, store)
        if reason is None:
            return _nothing(f"{count} new pairs, and retraining.min_new_pairs = {least}")
        get_run_logger().info("drift, %s: retraining, with %d new pairs", reason, count)
    else:
        get_run_logger().info("%d new pairs: retraining", count)
    ended, run = run_pipeline(warm_started(loaded, state.champion, store))
    # Vetoed data have not been used: the next retraining takes them if their drift is accepted.
    vetoed = run.drift is not None and run.drift.rejection is not None
    if not vetoed and run.outcome in (
        RunOutcome.PROMOTED,
        RunOutcome.GATE_REJECTED,
        RunOutcome.NOT_BETTER,
        RunOutcome.REFUSED,
    ):
        record_retraining(state, outcome.ref, run.name, run.outcome, store)
    return ended


def _nothing(reason: str) -> State[Any]:
    return Completed(name=NO_NEW_DATA, message=f"Nothing to retrain on: {reason}.", data=None)
