"""Pairs of a source as columns: texts by their position in a spill, 72 bytes a pair in memory."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf.data.ledger import Ledger, Origin
from rlhf.data.records import LeftOutError
from rlhf.data.rows import Pair, Prompt
from rlhf.data.spill import Spill, runs

Ints = NDArray[np.int64]


class Resolved(NamedTuple):
    """A pair, and the rows that it comes from."""

    pair: Pair
    origins: tuple[Origin, ...]


@dataclass(frozen=True, eq=False)
class Pairs(Sequence[Resolved]):
    """Pairs in their order, each read from the spill when it is asked for.

    All arrays are of shape (pairs,) but `rows`.
    """

    ledger: Ledger
    """Has the rows, and the spill with the texts."""
    prompt: NDArray[np.int32]
    """Number of the pair's prompt: equal prompts of one reading have one."""
    prompt_at: Ints
    chosen_at: Ints
    rejected_at: Ints
    margin: NDArray[np.float64]
    """NaN for none."""
    weight: NDArray[np.float64]
    """How much the pair counts in the reward model's loss, NaN for 1."""
    votes: NDArray[np.int32]
    """How many statements the pair is: its rows, or 1 for one made of rated replies."""
    starts: Ints
    """Where a pair's rows begin in `rows`."""
    counts: NDArray[np.int32]
    """Number of its rows."""
    times: NDArray[np.int32]
    """How often it is used by the weight of its source."""
    rows: NDArray[np.int32]
    """Numbers of rows in the ledger, of any shape."""

    def __len__(self) -> int:
        return len(self.prompt)

    def __getitem__(self, index: int) -> Resolved:  # pyright: ignore[reportIncompatibleMethodOverride]
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        return Resolved(self.pair(index), tuple(map(self.ledger.origin, self.rows_of(index))))

    @property
    def spill(self) -> Spill:
        """The texts."""
        return self.ledger.spill

    def rows_of(self, index: int) -> list[int]:
        """Return the numbers of the rows of a pair."""
        start = int(self.starts[index])
        return self.rows[start : start + int(self.counts[index])].tolist()

    def pair(self, index: int) -> Pair:
        """Read a pair."""
        margin, weight = float(self.margin[index]), float(self.weight[index])
        return Pair(
            self.spill.read(int(self.prompt_at[index])),
            *self.replies(index),
            margin=None if math.isnan(margin) else margin,
            row_ids=merged_ids([self.ledger.id(row)] for row in self.rows_of(index)),
            weight=None if math.isnan(weight) else weight,
        )

    def replies(self, index: int) -> tuple[str, str]:
        """Read the chosen and the rejected reply of a pair."""
        text = self.spill.text
        return text(int(self.chosen_at[index])), text(int(self.rejected_at[index]))

    def prompt_of(self, index: int) -> Prompt:
        """Read the prompt of a pair."""
        return self.spill.read(int(self.prompt_at[index]))

    def select(self, which: Ints | NDArray[np.bool_]) -> Pairs:
        """Return some of the pairs, by index or mask."""
        columns = {f.name: getattr(self, f.name) for f in fields(self)}
        own = {n: c[which] for n, c in columns.items() if n not in ("ledger", "rows")}
        return replace(self, **own)

    def once(self) -> Pairs:
        """Return the pairs without the weights of their sources, as gates see them."""
        return replace(self, times=np.ones_like(self.times))

    def lose(self, reason: LeftOutError, which: Iterable[int] | None = None) -> None:
        """Leave out the pairs, or those of the indices."""
        for i in range(len(self)) if which is None else which:
            places = int(self.prompt_at[i]), int(self.chosen_at[i]), int(self.rejected_at[i])
            self.ledger.lose_stored(self.rows_of(i), reason, places)

    def use(self) -> None:
        """Count the rows of the pairs as used."""
        for index in range(len(self)):
            self.ledger.use(self.rows_of(index))

    def all_rows(self) -> Ints:
        """Return the numbers of all rows of the pairs, in the order of the pairs."""
        ends = np.cumsum(self.counts)
        within = np.arange(int(ends[-1]) if len(ends) else 0) - np.repeat(
            ends - self.counts, self.counts
        )
        return self.rows[np.repeat(self.starts, self.counts) + within].astype(np.int64)

    def first_origins(self) -> Iterator[Origin]:
        """Yield the position of the first row of each pair, as often as the pair is written."""
        for row in np.repeat(self.rows[self.starts], self.times).tolist():
            yield self.ledger.origin(row)

    def indices_by_prompt(self) -> Iterator[list[int]]:
        """Yield the indices of the pairs of each prompt, which stand together."""
        starts, ends = runs(self.prompt)
        for start, end in zip(starts.tolist(), ends.tolist(), strict=True):
            yield [*range(start, end)]

    def by_prompt(self) -> Iterator[list[Pair]]:
        """Yield the pairs of each prompt."""
        for indices in self.indices_by_prompt():
            yield [self.pair(index) for index in indices]

    def prompts(self) -> StoredPrompts:
        """Return the prompts, each once."""
        return StoredPrompts(self.spill, self.prompt_at[runs(self.prompt)[0]])

    def weighted(self) -> int:
        """Return the number of pairs with a weight, each as often as it is written."""
        return int(self.times[~np.isnan(self.weight)].sum())

    def written(self) -> WrittenPairs:
        """Return the pairs as they are written: each as often as its `times` say."""
        return WrittenPairs(self, np.repeat(np.arange(len(self)), self.times))


class WrittenPairs(Sequence[Pair]):
    """Pairs of one reading in any order and number, each read when it is asked for."""

    def __init__(self, pairs: Pairs, indices: Ints) -> None:
        self.pairs, self.indices = pairs, indices

    def __len__(self) -> int:
        return len(self.indices)

    def __getitem__(self, index: int) -> Pair:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self.pairs.pair(int(self.indices[index]))


class StoredPrompts(Sequence[Prompt]):
    """Prompts of a spill by number."""

    def __init__(self, spill: Spill, places: Ints) -> None:
        self._spill, self._places = spill, places

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, index: int) -> Prompt:  # pyright: ignore[reportIncompatibleMethodOverride]
        return self._spill.read(int(self._places[index]))


def joined_pairs(one: Pairs, other: Pairs) -> Pairs:
    """Return the pairs of two collections of one ledger; equal prompts of both stay two."""
    columns = {
        f.name: np.concatenate([getattr(one, f.name), getattr(other, f.name)])
        for f in fields(one)
        if f.name != "ledger"
    }
    first = int(one.prompt.max(initial=-1)) + 1
    columns["prompt"][len(one) :] += first
    columns["starts"][len(one) :] += len(one.rows)
    return replace(one, **columns)


def merged_ids(ids: Iterable[Iterable[str]]) -> tuple[str, ...]:
    """Return ids of rows, each once, in their order."""
    return tuple(dict.fromkeys(itertools.chain.from_iterable(ids)))
