"""Costs of the run in progress: expected before it, spent so far, and recorded as it goes on."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from rlhf.budget import PLANNED, STOPPED_AT, Spending, budget_text, is_stopped, stop_line
from rlhf.costs import Cost, total
from rlhf.errors import BudgetSpent, RLHFError
from rlhf.report.model import StageRow
from rlhf.store import ArtifactRef
from tasks.forecast import forecasts, kinds, reserve
from tasks.ledger import attempts_of, costs_of, record_run
from tasks.report import PipelineRun
from tasks.run_costs import RunCosts, StageCosts
from tasks.runner import Outcome, work_of
from tasks.stage import Stage, store_of
from tasks.stages import STAGES


def expect_costs(run: PipelineRun) -> None:
    """Note what the run's stages will take, as far as earlier runs tell it."""
    store = store_of(run.config)
    run.kinds = kinds(run.config, store)
    run.forecasts = forecasts(run.config, store, run.kinds)


def spending(run: PipelineRun) -> Spending:
    """Return what the run has spent so far, and what the stages after PPO will take."""
    costs = [row.cost for row in run.rows if row.cost]
    names = [*STAGES]
    last = next(name for name, stage in STAGES.items() if stage.stops_at_deadline)
    later = [STAGES[name] for name in names[names.index(last) + 1 :]]
    return Spending(
        seconds=sum(cost.seconds for cost in costs),
        money=sum(cost.money or 0.0 for cost in costs),
        reserve=reserve(run.forecasts, later),
    )


def costs_of_stage(run: PipelineRun, stage: Stage, outcome: Outcome) -> dict[str, Any]:
    """Return the fields of a stage's row about its cost, and note whether a budget stopped it."""
    if is_stopped(outcome.metrics):
        run.stopped = stop_line(outcome.metrics)
        length = run.kinds.get(stage.name, {}).get("length")
        if length is not None:
            share = outcome.metrics[STOPPED_AT] / outcome.metrics[PLANNED]
            run.kinds[stage.name] = {**run.kinds[stage.name], "length": length * share}
    if outcome.cached:
        return {}
    # Of a stage on another machine that keeps no ledger its time is known all the same.
    cost = outcome.cost or Cost(seconds=outcome.seconds)
    return {"cost": cost, "forecast": run.forecasts.get(stage.name)}


def cost_of_failed(run: PipelineRun, stage: Stage, error: Any) -> Cost | None:
    """Return what all attempts of a stage that failed took; None if that is not known.

    Of a stage that the budget did not let begin, this run took nothing: its earlier attempts are
    in the costs of the runs that made them.
    """
    if isinstance(error, BudgetSpent):
        return None
    with suppress(RLHFError, OSError, ValueError, KeyError):
        store = store_of(run.config)
        inputs = _inputs(run, stage.needed_inputs(run.config))
        inputs |= stage.find_optional(run.config, inputs, store)
        key = work_of(stage, run.config, inputs, store).key
        return total(attempts_of(store, stage.name, key))
    return None


def record_costs(run: PipelineRun) -> None:
    """Add the costs of the run so far to the history of its model line.

    Cached stages get what they took when they were made. It is called often, so that what a killed
    run took is known too.
    """
    store = store_of(run.config)
    run.rows = _with_costs_of_cached(run)
    stages = [
        StageCosts(
            name=row.name, state=row.state.value, cost=row.cost, made=row.made,
            forecast=row.forecast, **run.kinds.get(row.name, {}),
        )
        for row in run.rows
    ]  # fmt: skip
    config, line = run.config, run.config.promotion.name
    entry = RunCosts(
        run=run.name, started=run.started, line=line,
        budget=budget_text(config.budget, config.costs.currency),
        outcome=run.outcome.value if run.reason else "", stopped=run.stopped, stages=stages,
    )  # fmt: skip
    record_run(store, line, entry.model_dump(mode="json", exclude_none=True))


def _inputs(run: PipelineRun, roles: Mapping[str, str]) -> dict[str, ArtifactRef]:
    return {role: run.refs[maker] for role, maker in roles.items() if maker in run.refs}


def _with_costs_of_cached(run: PipelineRun) -> list[StageRow]:
    """Return the run's stages, cached ones with what they took when they were made."""
    cached = [
        row.artifact for row in run.rows if row.artifact and row.cost is None and row.made is None
    ]
    made = costs_of(store_of(run.config), cached) if cached else {}
    return [
        row if row.artifact not in made else row.model_copy(update={"made": made[row.artifact]})
        for row in run.rows
    ]
