"""Costs of stages: time, memory, energy and money, and their sums.

A figure that was not measured is None, never 0. Costs stand in records beside the artifacts, since
equal work has equal artifacts, and never takes equally long.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

#: Joules of a watt-hour.
WATT_HOUR = 3600.0


class Cost(BaseModel):
    """Cost of an attempt of a stage, or of all of them."""

    # Later versions may write more fields; a record's numbers may be damaged.
    model_config = ConfigDict(
        frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True
    )

    seconds: float = 0.0
    """Time of the first machine."""
    attempts: int = 1
    """Attempts that it took, killed ones included."""
    steps: int = 0
    """Steps of a training that are done at its end."""
    device: str = ""
    """Name of the device, `cpu` without an accelerator."""
    devices: int = 1
    """Devices that the price counts: GPUs of all processes, or machines."""
    processes: int = 1
    """Processes on all machines."""
    nodes: int = 1
    """Machines."""
    host: str = ""
    """Name of the first machine."""
    memory: int | None = None
    """Peak of the memory in use by the stage's processes on the first machine, in bytes."""
    allocated: int | None = None
    """Peak of torch's tensors on one device, in bytes."""
    reserved: int | None = None
    """Peak of what torch took of one device, in bytes."""
    device_memory: int | None = None
    """Peak of what all programs took of one device, in bytes."""
    energy: float | None = None
    """Energy that the machine counted meanwhile, in joules; that of other programs is in it."""
    price: float | None = None
    """Price of one device for an hour at that time."""
    money: float | None = None
    """Time on all devices at that price."""
    currency: str = ""
    """Currency of price and money."""
    work: str = ""
    """Beginning of the fingerprint of the work, by which its attempts are known as one's."""
    when: str = ""
    """End of the last attempt, UTC in ISO 8601."""

    def priced(self, price: float | None, currency: str) -> Cost:
        """Return it with its money at a price per hour and device; without one it has none."""
        if price is None:
            return self
        money = price * self.devices * self.seconds / 3600
        return self.model_copy(update={"price": price, "money": money, "currency": currency})

    def row(self) -> dict[str, Any]:
        """Return the figures that are known, as JSON values."""
        return {key: value for key, value in self.model_dump().items() if value not in (None, "")}


class Forecast(BaseModel):
    """Expected time and money of a stage, with the source of the expectation."""

    model_config = ConfigDict(
        frozen=True, extra="ignore", allow_inf_nan=False, use_attribute_docstrings=True
    )

    seconds: float
    """Time of the first machine."""
    money: float | None = None
    """Time at the present price; None without one."""
    currency: str = ""
    """Currency of the price."""
    source: str = ""
    """What it is known from, such as `as last time on this machine`."""


def read_cost(entry: Mapping[str, Any] | None) -> Cost | None:
    """Return a recorded cost; None if there is none, or it is damaged."""
    try:
        return Cost.model_validate(entry) if entry else None
    except ValidationError:
        return None


def total(costs: Sequence[Cost]) -> Cost | None:
    """Return the sum of attempts or stages; None of none.

    Peaks are the largest. Energy is that of the parts that know it. Money is known only if it is of
    every part, all in one currency: less would look like a bargain.
    """
    if not costs:
        return None
    currencies = {cost.currency for cost in costs}
    prices = {cost.price for cost in costs}
    money = [cost.money for cost in costs if cost.money is not None]
    has_money = len(money) == len(costs) and len(currencies) == 1
    return costs[-1].model_copy(
        update={
            "seconds": sum(cost.seconds for cost in costs),
            "attempts": sum(cost.attempts for cost in costs),
            "steps": max(cost.steps for cost in costs),
            **{name: most(costs, name) for name in PEAKS},
            "energy": added(cost.energy for cost in costs),
            "money": sum(money) if has_money else None,
            "currency": costs[-1].currency if has_money else "",
            "price": costs[-1].price if has_money and len(prices) == 1 else None,
        }
    )


#: Fields of which a sum has the largest.
PEAKS = ("memory", "allocated", "reserved", "device_memory")


def most(costs: Iterable[Cost], name: str) -> int | None:
    """Return the largest known value of a field."""
    return max((v for cost in costs if (v := getattr(cost, name)) is not None), default=None)


def added(values: Iterable[float | None]) -> float | None:
    """Return the sum of the known values; None if none is known."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


def money_text(money: float | None, currency: str) -> str:
    """Return an amount as text, such as `0.31 EUR`; empty if it is not known."""
    if money is None:
        return ""
    # A run on a small machine costs less than a cent, which is not nothing.
    return f"{money:,.2f} {currency}" if money >= 0.1 or money == 0 else f"{money:.2g} {currency}"


def energy_text(joules: float | None) -> str:
    """Return energy as text, such as `12 Wh` or `3.4 kWh`; empty if it is not known."""
    if joules is None:
        return ""
    hours = joules / WATT_HOUR
    if hours >= 1000:
        return f"{hours / 1000:,.1f} kWh"
    return f"{hours:.0f} Wh" if hours >= 10 else f"{hours:.2g} Wh"


def memory_text(size: int | None) -> str:
    """Return a peak of memory as text, such as `1.2 GB`; empty if it is not known."""
    if size is None:
        return ""
    return f"{size / 1e9:.1f} GB" if size >= 1e9 else f"{size / 1e6:.0f} MB"


def device_text(cost: Cost) -> str:
    """Return where a stage ran, such as `4 × NVIDIA H200` or `cpu, 2 machines`."""
    name = cost.device or "not known"
    if cost.devices > 1 and cost.device != "cpu":
        name = f"{cost.devices} × {name}"
    elif cost.processes > cost.nodes:
        name += f", {cost.processes} processes"
    return f"{name}, {cost.nodes} machines" if cost.nodes > 1 else name
