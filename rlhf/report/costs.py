"""The report's table of costs: time, memory, energy and money of each stage, and of all.

A column of which nothing is known is left out. Cached stages took nothing in this run; their row
tells what they took when they were made.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from rlhf.costs import (
    Cost,
    added,
    device_text,
    energy_text,
    memory_text,
    money_text,
    most,
    total,
)
from rlhf.report.model import StageRow, StageState
from rlhf.report.text import duration

#: Columns of the table, in this order.
TIME, EXPECTED, MEMORY, DEVICE, ENERGY, MONEY = (
    "Time", "Expected", "Memory", "Device", "Energy", "Money"
)  # fmt: skip
#: What is shown where nothing was known before the run.
UNKNOWN = "unknown"


class CostRow(NamedTuple):
    """One stage, or the sum: a cell for each column, empty where nothing is known."""

    stage: str
    note: str
    cells: list[str]


class CostView(NamedTuple):
    """The table of costs; without rows nothing is known."""

    columns: list[str]
    rows: list[CostRow]
    notes: list[str]


def cost_view(stages: Sequence[StageRow]) -> CostView:
    """Return the table of costs of a run's stages."""
    known = [stage for stage in stages if stage.cost or stage.made]
    if not known:
        return CostView([], [], [])
    rows = [(stage.name, _note(stage), _cells(stage)) for stage in known]
    rows.append(("Sum of this run", "", _sum(known)))
    hidden = () if any(stage.forecast for stage in known) else (EXPECTED,)
    shown = [
        name
        for name in _COLUMNS
        if name not in hidden and any(cells.get(name) for _, _, cells in rows)
    ]
    table = [
        CostRow(name, note, [cells.get(column, "") for column in shown])
        for name, note, cells in rows
    ]
    return CostView(shown, table, _notes(known))


_COLUMNS = (TIME, EXPECTED, MEMORY, DEVICE, ENERGY, MONEY)


def _cells(stage: StageRow) -> dict[str, str]:
    """Return a stage's cells by column; a cached one took no time."""
    cost, forecast = stage.cost, stage.forecast
    if cost is None:
        return {TIME: "0 s"}
    expected = UNKNOWN if forecast is None else duration(forecast.seconds)
    return {TIME: duration(cost.seconds), EXPECTED: expected, **_figures(cost)}


def _figures(cost: Cost) -> dict[str, str]:
    return {
        MEMORY: memory_text(cost.memory),
        DEVICE: memory_text(cost.device_memory or cost.reserved or cost.allocated),
        ENERGY: energy_text(cost.energy),
        MONEY: money_text(cost.money, cost.currency),
    }


def _note(stage: StageRow) -> str:
    """Return where a stage ran, after how many attempts, or what a cached one took once."""
    cost = stage.cost
    if cost is None:
        made = stage.made
        assert made is not None
        parts = [duration(made.seconds), *filter(None, _figures(made).values())]
        state = "cached" if stage.state == StageState.CACHED else "not run"
        return f"{state}; when it was made: {', '.join(parts)}"
    attempts = f"{cost.attempts} attempts" if cost.attempts > 1 else ""
    where = device_text(cost) if cost.device else ""
    source = f"expected {stage.forecast.source}" if stage.forecast else ""
    return "; ".join(filter(None, (where, attempts, source)))


def _sum(stages: Sequence[StageRow]) -> dict[str, str]:
    """Return the cells of the sum: of times and money, and the largest memory."""
    costs = [stage.cost for stage in stages if stage.cost]
    whole = total(costs)
    if whole is None:
        return {TIME: "0 s"}
    forecasts = [stage.forecast for stage in stages if stage.cost]
    seconds = [forecast.seconds for forecast in forecasts if forecast]
    expected = duration(sum(seconds)) if len(seconds) == len(forecasts) else UNKNOWN
    figures = _figures(whole) | {MEMORY: memory_text(most(costs, "memory"))}
    if whole.energy is not None and any(cost.energy is None for cost in costs):
        figures[ENERGY] = f"at least {energy_text(added(cost.energy for cost in costs))}"
    return {TIME: duration(whole.seconds), EXPECTED: expected, **figures}


def _notes(stages: Sequence[StageRow]) -> list[str]:
    """Return the sentences over the table: what the figures are, and the prices."""
    costs = [stage.cost for stage in stages if stage.cost]
    prices = sorted(
        {f"{money_text(c.price, c.currency)} an hour of {c.device or 'a device'}"
         for c in costs if c.price is not None}
    )  # fmt: skip
    notes = [
        "Cached stages took nothing in this run. All attempts of a stage are counted. Memory is "
        "the peak of the stage’s processes, Device that of one GPU."
    ]
    if prices:
        notes.append(f"Prices: {', '.join(prices)}.")
    return notes
