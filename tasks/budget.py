"""Budget of a run, stage by stage: what may begin, and when PPO has to stop.

What a run spent is the measured cost of its stages so far, and of all attempts of the stage itself;
stages with a record took nothing. A budget stops no evaluation, gate or promotion: what was trained
is judged.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence

from rlhf.budget import Deadline, Spending, exhausted, time_left
from rlhf.config import PipelineConfig, apply_machine_settings
from rlhf.config.pipeline import INLINE
from rlhf.costs import Cost, total
from rlhf.errors import BudgetSpent, ConfigError
from rlhf.store.manifest import canonical_json, sha256_bytes
from tasks.ledger import Ledger
from tasks.stage import Stage


def check_budget(config: PipelineConfig) -> None:
    """Check that a budget of money has prices to count by.

    Raises:
        ConfigError: There is none, and no stage runs on another machine, which may have its own.
    """
    costs = apply_machine_settings(config).costs
    placed = any(place != INLINE for place in config.placement.values())
    if config.budget.money is not None and not costs.price_per_hour and not placed:
        raise ConfigError(
            f"budget.money = {config.budget.money:g}: needs a price; set costs.price_per_hour to "
            f"what an hour of this machine or of one of its GPUs costs in {costs.currency}, or "
            "give budget.hours instead"
        )


def require_left(stage: Stage, config: PipelineConfig, spent: Spending) -> None:
    """Check that a training may begin: something of the budget is left.

    PPO makes one update in any case: what was trained for it would be lost otherwise.

    Raises:
        BudgetSpent: Nothing is left.
    """
    if stage.stops_at_deadline or not stage.trains(config):
        return
    limit = exhausted(config.budget, spent, config.costs.currency)
    if limit is not None:
        raise BudgetSpent(
            f"{limit} by this run, before {stage.name}, which was not begun; raise {limit.field}, "
            "and run the same again: stages that are done take nothing of it"
        )


def deadline_of(
    ledger: Ledger, spent: Spending, earlier: Sequence[Cost],
    now: Callable[[], float] = time.monotonic,
) -> Deadline | None:  # fmt: skip
    """Return when a stage that begins now has to stop; None if nothing stops it.

    Args:
        ledger: That of the stage.
        spent: What the run's stages before it took.
        earlier: Attempts of the stage, which count too.
        now: The clock.

    Raises:
        ConfigError: The budget is of money, and this machine's device has no price.
    """
    config = ledger.config
    if config.budget.money is not None and ledger.machine.price is None:
        known = ", ".join(config.costs.price_per_hour) or "none"
        raise ConfigError(
            f"budget.money = {config.budget.money:g}: costs.price_per_hour has no price for "
            f"{ledger.machine.device!r}, on which {ledger.stage.name} runs (known: {known}); add "
            "one, or a default"
        )
    if not ledger.stage.stops_at_deadline:
        return None
    before = total(earlier)
    if before is not None:
        # Attempts from before there was a price have that of now.
        at_price = before.priced(ledger.machine.price, config.costs.currency).money
        spent = spent.plus(before.seconds, at_price if before.money is None else before.money)
    left = time_left(config.budget, spent, config.costs.currency, ledger.price_per_hour)
    if left is None:
        return None
    seconds, limit = left
    return Deadline(at=now() + seconds, reason=f"{limit} before this try")


def stopped_key(key: str, config: PipelineConfig) -> str | None:
    """Return the fingerprint of a stage's work as far as the budget lets it; None without one.

    That of the whole work holds no budget: a price or limit changes no result. What a budget
    stopped is found again under the same budget alone, and is no result of the whole work.
    """
    if not config.budget.is_set:
        return None
    budget: Mapping[str, float | None] = config.budget.model_dump()
    # At another price the same money buys another part of the work. Prices of a machine's own are
    # left out: what started the stage must find what another machine recorded.
    costs = config.costs.model_dump() if config.budget.money is not None else None
    return sha256_bytes(canonical_json({"work": key, "budget": budget, "costs": costs}))
