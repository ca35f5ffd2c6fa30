"""The command `rlhf costs`, and what `rlhf preflight` prints of the costs to expect."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from rich.table import Table

from flows.artifacts import ConfigOption, StoreOption, open_existing
from rlhf.budget import budget_text
from rlhf.costs import Forecast, energy_text, money_text
from rlhf.plain_text import one_line
from tasks.console import console, say
from tasks.listing import show_json

if TYPE_CHECKING:
    from rlhf.config import PipelineConfig
    from rlhf.store import Store
    from tasks.run_costs import RunCosts


def costs(
    run: str = "", *, line: str | None = None, json: bool = False, store: StoreOption = None,
    config: ConfigOption = None,
) -> None:  # fmt: skip
    """Show what a run cost, stage by stage: time, memory, energy, and money at a price per hour.

    Parameters
    ----------
    run
        Its name, or how it begins; default: the newest run.
    line
        Show all runs of this model line instead, with their sum.
    json
        Print all that is known as JSON.
    """
    from tasks.prefect_server import check_settings

    check_settings()  # what follows imports Prefect
    from tasks.run_costs import find_run, read_line

    opened = open_existing(store, config)
    if line is not None:
        _show_line(opened, line, read_line(opened, line), json)
        return
    found = find_run(opened, run)
    if json:
        show_json(_as_json(found))
        return
    _show_run(found)


def show_forecast(config: PipelineConfig) -> None:
    """Print what each stage of a run will take, and whether that is within its budget.

    Stages that are done take nothing; of what no earlier run tells it says so.
    """
    from tasks.forecast import forecasts, kinds, recorded_stages
    from tasks.run_costs import forecast_total
    from tasks.stage import store_of

    store = store_of(config)
    expected = forecasts(config, store, of_stages := kinds(config, store))
    done = recorded_stages(config, store)
    if not expected and not done:
        line = config.promotion.name
        say(f"costs: unknown, for no run of the model line {line} had these settings here")
        _show_budget(config, None)
        return
    table = _table("stage", "expected", "money", "source")
    for name in of_stages:
        forecast = expected.get(name)
        if name in done:
            table.add_row(name, "0 s", "", "done, its result is in the store")
        elif forecast is None:
            table.add_row(name, "unknown", "", "not run with these settings here")
        else:
            table.add_row(name, *_expected(forecast), one_line(forecast.source))
    console.print(table)
    left = [expected.get(name) for name in of_stages if name not in done]
    whole = forecast_total(left)
    if whole is not None:
        say(f"expected in all: {', '.join(filter(None, _expected(whole)))}")
    _show_budget(config, whole)


def _show_budget(config: PipelineConfig, whole: Forecast | None) -> None:
    """Print a run's budget, and whether what is expected exceeds it."""
    budget = config.budget
    if not budget.is_set:
        return
    text = f"budget: {budget_text(budget, config.costs.currency)}"
    if whole is None:
        say(f"{text}; what the run will take is not known")
        return
    if budget.money is not None and whole.money is None:
        say(f"{text}; what the run will cost is not known, for want of a price", "yellow")
        return
    is_over = budget.hours is not None and whole.seconds > budget.hours * 3600
    is_over |= budget.money is not None and (whole.money or 0.0) > budget.money
    end = "less than expected: PPO will stop early" if is_over else "more than expected"
    say(f"{text}, {end}", "yellow" if is_over else "")


def _show_run(found: RunCosts) -> None:
    from rlhf.report.costs import DEVICE, MEMORY, TIME, cost_view
    from rlhf.report.model import StageRow, StageState
    from tasks.run_costs import cost_lines

    states = {state.value: state for state in StageState}
    rows = [
        StageRow(
            name=stage.name, state=states.get(stage.state, StageState.FAILED), cost=stage.cost,
            made=stage.made, forecast=stage.forecast,
        )
        for stage in found.stages
    ]  # fmt: skip
    view = cost_view(rows)
    cached = {row.name for row in rows if row.state == StageState.CACHED}
    say(f"{found.run}: {found.outcome or 'not ended'}, begun {found.started[:16]}", "bold")
    # The sum is in a sentence below, and of a stage on a GPU the memory is that of the GPU.
    shown = [name for name in view.columns if name != DEVICE]
    table = _table("stage", *map(str.lower, shown))
    for row in view.rows[:-1]:
        cells = dict(zip(view.columns, row.cells, strict=True))
        cells[MEMORY] = cells.get(DEVICE) or cells.get(MEMORY, "")
        cells[TIME] = "cached" if row.stage in cached else cells[TIME]
        table.add_row(one_line(row.stage), *(one_line(cells[name]) for name in shown))
    console.print(table)
    for line in cost_lines(rows, found.budget, found.stopped):
        say(line)


def _show_line(store: Store, line: str, runs: list[RunCosts], json: bool) -> None:
    from rlhf.champions import history
    from rlhf.report.text import duration
    from tasks.run_costs import cost_line, line_total

    champions = {entry.run for entry in history(store, line) if entry.run}
    whole = line_total(runs)
    if json:
        rows = [_as_json(run) | {"champion": run.run in champions} for run in runs]
        show_json({"line": line, "runs": rows, "total": whole and whole.row()})
        return
    if not runs:
        say(f"no run of the model line {line} has costs in {store.uri}")
        return
    table = _table("run", "outcome", "time", "energy", "money")
    for run in runs:
        cost = run.total
        outcome = "champion" if run.run in champions else run.outcome or "not ended"
        outcome = f"{outcome}, budget" if run.stopped else outcome
        table.add_row(
            one_line(run.run), one_line(outcome),
            duration(cost.seconds) if cost else "0 s", energy_text(cost.energy) if cost else "",
            money_text(cost.money, cost.currency) if cost else "",
        )  # fmt: skip
    console.print(table)
    say(f"{len(runs)} runs: {cost_line(whole)}")


def _as_json(run: RunCosts) -> dict[str, Any]:
    """Return a run's costs with their sums; what is not known is left out."""
    totals = {
        "total": run.total and run.total.row(),
        "total_when_made": run.total_made and run.total_made.row(),
        "expected": run.total_forecast and run.total_forecast.model_dump(exclude={"source"}),
    }
    return run.model_dump(mode="json", exclude_none=True) | totals


def _expected(forecast: Forecast) -> tuple[str, str]:
    from rlhf.report.text import duration

    return duration(forecast.seconds), money_text(forecast.money, forecast.currency)


def _table(*columns: str) -> Table:
    """Return a table without frame, which leaves 80 columns to its cells."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for number, name in enumerate(columns):
        right = number > 0 and name not in ("outcome", "source")
        table.add_column(name, justify="right" if right else "left", overflow="fold")
    return table
