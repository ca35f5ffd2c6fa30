"""Budget of a run: what is left of it, and the moment at which PPO has to stop.

The result of a training that its budget stopped depends on the machine's speed. It is named so in
its artifact (`STOPPED_AT`), and is recorded apart from that of the whole training, which a run with
a larger budget goes on to.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from pydantic import BaseModel, ConfigDict

from rlhf.config.costs import BudgetConfig

#: Metrics of a training that its budget stopped: the updates that it made, and all it should make.
STOPPED_AT, PLANNED = "budget_stopped_at", "budget_planned"
#: Share of a budget that is held back for the stages after PPO, where their time is not known.
RESERVE = 0.1


class Spending(BaseModel):
    """Time and money that a run's stages took so far, and that those after PPO will take."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    seconds: float = 0.0
    money: float = 0.0
    """That of the stages of which it is known: with `budget.money` none runs without a price."""
    reserve: float | None = None
    """Seconds that the stages after PPO took last time; None if that is not known."""

    def plus(self, seconds: float, money: float | None) -> Spending:
        """Return it with a further stage, or earlier attempts of one."""
        return self.model_copy(
            update={"seconds": self.seconds + seconds, "money": self.money + (money or 0.0)}
        )


class Deadline(BaseModel):
    """Moment at which a training's part of the budget is used up."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)

    at: float
    """Moment on the clock that all processes of the first machine share, `time.monotonic`."""
    reason: str
    """What is used up, for messages."""

    def passes(self, now: float, step: float) -> bool:
        """Return whether it passes before a further step of that many seconds has ended."""
        return now + step > self.at


class Limit(NamedTuple):
    """One of a budget's limits, in its own unit."""

    field: str
    limit: float
    spent: float
    unit: str

    @property
    def left(self) -> float:
        """Rest of a budget; negative if more was spent."""
        return self.limit - self.spent

    def __str__(self) -> str:
        """Return text such as `budget.hours = 2: 1.63 h are used`."""
        return f"{self.field} = {self.limit:g}: {self.spent:.3g} {self.unit} are used"


def limits(budget: BudgetConfig, spent: Spending, currency: str) -> list[Limit]:
    """Return a budget's limits with what was spent."""
    found = []
    if budget.hours is not None:
        found.append(Limit("budget.hours", budget.hours, spent.seconds / 3600, "h"))
    if budget.money is not None:
        found.append(Limit("budget.money", budget.money, spent.money, currency))
    return found


def exhausted(budget: BudgetConfig, spent: Spending, currency: str) -> Limit | None:
    """Return a limit of which nothing is left, or None."""
    return next((x for x in limits(budget, spent, currency) if x.left <= 0), None)


def time_left(
    budget: BudgetConfig, spent: Spending, currency: str, money_per_hour: float | None
) -> tuple[float, Limit] | None:
    """Return the seconds that a training may take, and the limit that decides; None without one.

    What the later stages took last time is held back, or else `RESERVE` of the limit.

    Args:
        budget: The run's budget.
        spent: What the run spent before this attempt of the training.
        currency: Currency of the prices.
        money_per_hour: What the training costs on its devices.
    """
    times: list[tuple[float, Limit]] = []
    for limit in limits(budget, spent, currency):
        per_hour = 1.0 if limit.unit == "h" else money_per_hour
        if per_hour is None:
            continue
        reserve = RESERVE * limit.limit * 3600 / per_hour
        held = reserve if spent.reserve is None else spent.reserve
        times.append((limit.left * 3600 / per_hour - held, limit))
    return min(times, default=None)


def is_stopped(metrics: Mapping[str, Any]) -> bool:
    """Return whether these are metrics of a training that its budget stopped."""
    return STOPPED_AT in metrics


def stop_line(metrics: Mapping[str, Any]) -> str:
    """Return where the budget stopped a training, as a sentence; empty if it did not."""
    if not is_stopped(metrics):
        return ""
    chosen = metrics.get("chosen_update")
    goes_on = "" if chosen is None else f"; the policy of update {chosen:,} goes on"
    return (
        f"PPO was stopped by the budget after {metrics[STOPPED_AT]:,} of {metrics[PLANNED]:,} "
        f"updates{goes_on}"
    )


def budget_text(budget: BudgetConfig, currency: str) -> str:
    """Return a run's budget as text, such as `2 h, 10 EUR`; empty without one."""
    hours = "" if budget.hours is None else f"{budget.hours:g} h"
    money = "" if budget.money is None else f"{budget.money:g} {currency}"
    return ", ".join(filter(None, (hours, money)))
