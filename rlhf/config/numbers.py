"""Types of the configuration's numbers: each has the bounds of what it counts or measures.

A number without an upper bound ends somewhere as a sleep of years, an allocation that no machine
has, an overflow, or (over 64 bits) as a run that Prefect's server stores and can't list any more.
So every number of a section has one of these types; a field's own `Field` adds tighter bounds, as
its lower one. The upper bounds are far beyond what makes sense, not advice.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Annotated, Any, cast

from annotated_types import Ge, Le
from pydantic import AfterValidator

#: Smallest size of a number that is not 0: less is 0 in float32, in which weights are trained.
LEAST = 1e-37
#: Largest price or amount of money.
MOST_MONEY = 10**9
#: Seconds beyond which no wait doubles.
LONGEST_WAIT = 86_400.0
#: Least temperature: logits of a hundred or so, over it, are far from float32's largest number.
_LEAST_TEMPERATURE = 1e-6


def _warm(value: float) -> float:
    """Refuse a temperature by which logits overflow."""
    if 0 < value < _LEAST_TEMPERATURE:
        raise ValueError(
            f"{value:g} divides logits until they overflow; write at least {_LEAST_TEMPERATURE:g}"
        )
    return value


# --- whole numbers ----------------------------------------------------------------------------

#: Rows, replies, prompts, updates or characters in all.
Count = Annotated[int, Le(10**9)]
#: Rows that are in memory together.
BatchSize = Annotated[int, Le(10**6)]
#: Tokens of a text, or candidates of a token; the longest contexts of today have 10 million.
Tokens = Annotated[int, Le(10**8)]
#: Width of a layer, rank of an adapter, or size of a vocabulary.
Width = Annotated[int, Le(2**18)]
#: Layers, heads, or words of an n-gram.
Few = Annotated[int, Le(1024)]
#: Processes or threads of one stage.
Workers = Annotated[int, Le(4096)]
#: Passes over the same data.
Passes = Annotated[int, Le(1000)]
#: Further tries; Prefect takes at most 50 delays.
Tries = Annotated[int, Le(50)]

# --- other numbers ----------------------------------------------------------------------------

#: Passes over the training rows, also parts of one.
Epochs = Annotated[float, Le(1000)]
#: Learning rate of AdamW, whose steps are about as large as the rate.
Rate = Annotated[float, Le(100)]
#: Temperature of sampling or of a comparison.
Temperature = Annotated[float, Le(1000), AfterValidator(_warm)]
#: Coefficient, factor or threshold that can't be negative.
Factor = Annotated[float, Le(10**6)]
#: Weight or reward of either sign.
Signed = Annotated[float, Ge(-(10**6)), Le(10**6)]
#: Value or difference of a measured quantity in its own unit.
Measure = Annotated[float, Ge(-(10**12)), Le(10**12)]
#: Time limit or wait in seconds: at most a week.
Seconds = Annotated[float, Le(7 * 86_400)]
#: Time between two recurring tasks in minutes: at most a week.
Minutes = Annotated[float, Le(7 * 1440)]
#: Age in days: at most a century.
Days = Annotated[float, Le(36_525)]
#: Time of a run in hours: at most ten years.
Hours = Annotated[float, Le(87_600)]
#: Money in any currency.
Money = Annotated[float, Le(MOST_MONEY)]
#: Bytes of a disk in 10^9: at most a petabyte.
Gigabytes = Annotated[float, Le(10**6)]
#: Bytes of one row in 10^6: a row is in memory several times.
RowMegabytes = Annotated[float, Le(4096)]


def doubled(first: float, times: int) -> float:
    """Return a wait in seconds that has doubled so often, at most a day."""
    return min(first * 2**times, LONGEST_WAIT)


def find_vanishing(value: Any) -> float | None:
    """Return a number in a value that is not 0 and is 0 in float32, or None.

    Lists and mappings are searched too.
    """
    if isinstance(value, float):
        return value if 0 < abs(value) < LEAST else None
    if isinstance(value, Mapping):
        value = cast("Mapping[Any, Any]", value).values()
    elif not isinstance(value, list | tuple):
        return None
    items = map(find_vanishing, cast("Iterable[Any]", value))
    return next((item for item in items if item is not None), None)
