"""Sections of prices and of a run's budget; no part of a fingerprint, so that no price retrains.

A price is that of one device for an hour: of a GPU, or without one of the machine. A stage on eight
GPUs therefore costs eight times the price, and one on two machines without GPUs twice.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import BeforeValidator, Field, WithJsonSchema

from rlhf.config.numbers import MOST_MONEY, Hours, Money
from rlhf.config.section import Section

#: Name of the price of every device that has none of its own.
DEFAULT = "default"


def _one_price(value: Any) -> Any:
    """Read a single number, also as text of an environment variable, as the default price."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            raise ValueError("must be a price per hour, or names with prices") from None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return {DEFAULT: value}
    return value


_PRICE = {"type": "number", "exclusiveMinimum": 0, "maximum": MOST_MONEY}
Prices = Annotated[
    dict[str, Annotated[Money, Field(gt=0)]],
    BeforeValidator(_one_price),
    WithJsonSchema({"anyOf": [_PRICE, {"type": "object", "additionalProperties": _PRICE}]}),
]


class CostsConfig(Section):
    """Prices, for what a run costs in money; without one it costs seconds, memory and energy alone.

    A machine's own RLHF_PRICE_PER_HOUR wins.
    """

    currency: str = Field(default="EUR", pattern=r"^[A-Z]{3}$")
    """Currency of all prices and of `budget.money`, in three capitals."""
    price_per_hour: Prices = Field(default_factory=dict[str, float])
    """Price of one device for an hour: a number, or numbers by the name of a deployment (`gpu`), a
    device (`NVIDIA H200`), a type of device (`cuda`, `cpu`), and `default` for all others."""

    def price(self, names: Iterable[str]) -> float | None:
        """Return the price of the first of some names that has one, or the default; else None."""
        prices = {name.casefold(): price for name, price in self.price_per_hour.items()}
        known = (prices.get(name.casefold()) for name in (*names, DEFAULT))
        return next((price for price in known if price is not None), None)


class BudgetConfig(Section):
    """Most that the stages of one run may take together; cached stages take nothing.

    When it is used up, PPO stops after an update, and its best policy is evaluated as always. Any
    other training does not begin.
    """

    hours: Hours | None = Field(default=None, gt=0)
    """Most hours of all stages, one after the other; none sets no limit."""
    money: Money | None = Field(default=None, gt=0)
    """Most money in `costs.currency`, which needs a price; none sets no limit."""

    @property
    def is_set(self) -> bool:
        """Whether there is a limit."""
        return self.hours is not None or self.money is not None
