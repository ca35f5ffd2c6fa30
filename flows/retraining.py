"""The pipeline again, when there is something new: on a schedule, or when data have landed."""

from __future__ import annotations

from typing import Any

from prefect import flow, get_run_logger
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.pipeline import PROMOTED, REFUSED, REJECTED, run_name, run_pipeline
from tasks.first import check_first
from tasks.parameters import NO_PRESET, NOTHING, Overrides, Preset, resolve
from tasks.prefect_tasks import run_task
from tasks.retraining import Situation, new_pairs, remember, situation, warm_started
from tasks.runner import Outcome, store_of

NO_NEW_DATA = "NoNewData"


@flow(name="retraining", flow_run_name=run_name, persist_result=False)
def retraining(preset: Preset = NO_PRESET, overrides: Overrides = NOTHING) -> State[Any]:
    """Look at the data, and if they are new enough, run the pipeline warm-started.

    Args:
        preset: Name of a file in `configs/`, such as quickstart; none means all defaults.
        overrides: What differs from it, for example `{"retraining": {"min_new_pairs": 500}}`.
    """
    loaded = resolve(preset, overrides)
    config = loaded.config
    check_first(config)
    store = store_of(config)
    found = situation(config, store)
    if found.same_data and not found.overdue:
        return _nothing(f"the data are those of {(found.last or {})['run']}")
    prepared: Any = run_task("prepare-data", config, {})
    outcome: Outcome = prepared.result()
    count = new_pairs(found, outcome.ref, store)
    if reason := _too_few(found, count):
        return _nothing(reason)
    get_run_logger().info("%d new pairs: retraining", count)
    warm = warm_started(loaded, found.champion, store)
    state, run = run_pipeline(warm)
    if run.outcome in (PROMOTED, REJECTED, REFUSED):
        remember(found, outcome.ref, run.name, run.outcome, store)
    return state


def _too_few(found: Situation, count: int) -> str:
    """Why these data are not worth a retraining; empty if they are."""
    rules = found.config.retraining
    if found.overdue or found.last is None or count >= rules.min_new_pairs:
        return ""
    return f"{count} new pairs, and retraining.min_new_pairs = {rules.min_new_pairs}"


def _nothing(reason: str) -> State[Any]:
    return Completed(name=NO_NEW_DATA, message=f"Nothing to retrain on: {reason}.", data=None)
