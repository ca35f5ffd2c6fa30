"""Costs of whole runs: an entry per run in the history of its model line, and its reading.

An entry holds no digests: costs keep no artifact from garbage collection. A run that went on, as
after an approval, has several entries under its name, which are read as one.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf.costs import Cost, Forecast, energy_text, memory_text, money_text, total
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.plain_text import one_line
from rlhf.report.model import StageRow
from rlhf.report.text import duration
from rlhf.store import Store
from rlhf.store.manifest import first_problem
from tasks.ledger import RUNS, warn_of_damage

#: Runs of a line that are read.
NEWEST = 200


class _Part(BaseModel):
    # Later versions may write more fields.
    model_config = ConfigDict(frozen=True, extra="ignore", use_attribute_docstrings=True)


class StageCosts(_Part):
    """What a stage took in a run, or when its result was made."""

    name: str
    state: str
    cost: Cost | None = None
    """What it took in this run, with earlier attempts of the same work; None of a cached one."""
    made: Cost | None = None
    """What a cached one took when it was made; None if that is not known."""
    forecast: Forecast | None = None
    """What was expected of it before the run; None where nothing was known."""
    settings: str = ""
    """Digest of the settings that its time depends on, for forecasts."""
    length: float | None = None
    """Value of the setting that its time is proportional to."""


class RunCosts(_Part):
    """What a run took, stage by stage."""

    run: str
    started: str = ""
    line: str = ""
    outcome: str = ""
    budget: str = ""
    """Budget of the run as text; empty without one."""
    stopped: str = ""
    """Where the budget stopped PPO, as a sentence; empty if it did not."""
    stages: list[StageCosts] = Field(default_factory=list[StageCosts])

    @property
    def total(self) -> Cost | None:
        """Sum of the stages that ran."""
        return total([stage.cost for stage in self.stages if stage.cost])

    @property
    def total_made(self) -> Cost | None:
        """Sum of all stages, of cached ones as they were made."""
        costs = [stage.cost or stage.made for stage in self.stages]
        return total([cost for cost in costs if cost])

    @property
    def total_forecast(self) -> Forecast | None:
        """Sum of what was expected of the stages that ran; None if it is not known of one."""
        return forecast_total([s.forecast for s in self.stages if s.cost])


def forecast_total(forecasts: Sequence[Forecast | None]) -> Forecast | None:
    """Return the sum of forecasts; None if one is missing, or there are none."""
    known = [forecast for forecast in forecasts if forecast is not None]
    if not known or len(known) < len(forecasts):
        return None
    money = [forecast.money for forecast in known if forecast.money is not None]
    is_priced = len(money) == len(known) and len({f.currency for f in known}) == 1
    return Forecast(
        seconds=sum(forecast.seconds for forecast in known),
        money=sum(money) if is_priced else None,
        currency=known[0].currency if is_priced else "",
    )


def read_line(store: Store, line: str, count: int = NEWEST) -> list[RunCosts]:
    """Return the costs of a line's newest runs, oldest first; warn once of damaged entries."""
    runs: dict[str, RunCosts] = {}
    entries, problems = store.history.sound(RUNS + line, count)
    for entry in entries:
        try:
            run = RunCosts.model_validate(entry)
        except ValidationError as error:
            problems.append(first_problem(error))
            continue
        before = runs.pop(run.run, None)
        runs[run.run] = run if before is None else _joined(before, run)
    warn_of_damage(RUNS + line, problems)
    return [*runs.values()]


def lines(store: Store) -> list[str]:
    """Return the model lines of which runs have costs."""
    return [name.removeprefix(RUNS) for name in store.history.names(RUNS)]


def find_run(store: Store, text: str) -> RunCosts:
    """Return the run with this name, or the only one whose name begins so; the newest of "".

    Raises:
        ArtifactMissing: There is none.
        ConfigError: Several names begin so.
    """
    runs = [run for line in lines(store) for run in read_line(store, line)]
    runs.sort(key=lambda run: run.started)
    exact = [run for run in runs if run.run == text]
    matches = exact or [run for run in runs if run.run.startswith(text)]
    if text and len(matches) > 1 and not exact:
        some = ", ".join(run.run for run in matches[-5:])
        raise ConfigError(one_line(f"{text!r}: {len(matches)} runs are meant; give more: {some}"))
    if not matches:
        newest = ", ".join(run.run for run in runs[-5:]) or "none"
        raise ArtifactMissing(
            one_line(
                f"{text!r}: no run with costs in {store.uri} is called that; the newest are: "
                f"{newest}"
            )
        )
    return matches[-1]


def cost_lines(rows: Sequence[StageRow], budget: str, stopped: str) -> list[str]:
    """Return what a run cost, a sentence each: its sum beside what was expected, and its budget.

    Args:
        rows: The run's stages.
        budget: Its budget as text; empty without one.
        stopped: Where the budget stopped PPO; empty if it did not.
    """
    costs = [row.cost for row in rows if row.cost]
    lines = [cost_line(total(costs))]
    expected = forecast_total([row.forecast for row in rows if row.cost])
    if expected is not None:
        parts = (duration(expected.seconds), money_text(expected.money, expected.currency))
        lines[0] += f"; expected: {', '.join(filter(None, parts))}"
    made = [row.made for row in rows if row.made]
    if made:
        lines.append(f"cached stages, when they were made: {cost_line(total(made))}")
    if stopped:
        lines.append(f"{stopped}; the budget is {budget}: with more the same command goes on")
    return lines


def line_total(runs: Iterable[RunCosts]) -> Cost | None:
    """Return what runs took together.

    A training that was stopped, or failed, and went on in a later run, has its earlier time in the
    later cost: of the costs of the same work the largest counts.
    """
    costs = [stage.cost for run in runs for stage in run.stages if stage.cost]
    largest: dict[str, Cost] = {}
    rest: list[Cost] = []
    for cost in costs:
        if not cost.work:
            rest.append(cost)
        elif cost.work not in largest or cost.seconds > largest[cost.work].seconds:
            largest[cost.work] = cost
    return total([*largest.values(), *rest])


def cost_line(cost: Cost | None) -> str:
    """Return seconds, memory, energy and money of a cost in one line, as far as they are known."""
    if cost is None:
        return "nothing ran"
    peak = memory_text(cost.memory)
    device = memory_text(cost.device_memory or cost.reserved)
    parts = [
        duration(cost.seconds), f"peak {peak}" if peak else "",
        f"{device} on the device" if device else "", energy_text(cost.energy),
        money_text(cost.money, cost.currency),
    ]  # fmt: skip
    return ", ".join(filter(None, parts))


def _joined(before: RunCosts, after: RunCosts) -> RunCosts:
    """Return two parts of a run as one: stages that were cached in the second as in the first."""
    ran = {stage.name: stage for stage in before.stages if stage.cost}
    stages = [ran.get(stage.name, stage) if stage.cost is None else stage for stage in after.stages]
    return after.model_copy(update={"stages": stages, "started": before.started})
