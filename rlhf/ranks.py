"""The processes that do one stage's work together; outside of a launch, one that is alone."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.errors import RLHFError, TrainingError

T = TypeVar("T")
#: Bytes that are sent at a time: what is summed is copied for it.
BUCKET = 2**26


def world() -> tuple[int, int]:
    """This process's rank and how many there are, as torchrun says it in the environment."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


class Ranks:
    """Shares work out and brings results together.

    All processes call the same methods in the same order, and all get the same results.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.count = rank, count
        self.device = device or torch.device("cpu")

    @property
    def leads(self) -> bool:
        """Whether this is the process that writes, uploads and tells of progress."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """This process's rows of `n`."""
        return slice(n * self.rank // self.count, n * (self.rank + 1) // self.count)

    def gather(self, mine: T) -> list[T]:
        """What each process has, by rank."""
        if self.count == 1:
            return [mine]
        found: list[Any] = [None] * self.count
        dist.all_gather_object(found, mine)
        return found

    def any(self, flag: bool) -> bool:
        """Whether it is true of any process."""
        return any(self.gather(flag)) if self.count > 1 else flag

    def must_agree(self, what: str, value: float) -> None:
        """See that all have the same.

        Raises:
            TrainingError: They do not, so that what follows would be nobody's result.
        """
        found = self.gather(value)
        if any(other != found[0] for other in found):
            raise TrainingError(
                f"the processes differ in {what} ({found}); the last checkpoint is intact, and "
                "processes = none trains without this risk"
            )

    def add_up(self, *tensors: Tensor) -> None:
        """Put into each tensor the sum of its values in all processes."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([t.detach().flatten() for t in bucket]).to(self.device)
            dist.all_reduce(flat)
            parts = flat.split([t.numel() for t in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def shared(
        self, function: Callable[[Sequence[T]], Sequence[float]]
    ) -> Callable[[Sequence[T]], Sequence[float]]:
        """The same function of a batch, of which each process does its rows."""
        if self.count == 1:
            return function

        def call(batch: Sequence[T]) -> list[float]:
            part = batch[self.share(len(batch))]
            parts = self.gather(list(function(part)) if part else [])
            return [value for values in parts for value in values]

        return call

    def led(
        self, function: Callable[[Sequence[T]], Sequence[float]]
    ) -> Callable[[Sequence[T]], Sequence[float]]:
        """The same function, called by the leading process alone; the others get its results.

        So a service is asked once, and what has a state of its own has one.
        """
        if self.count == 1:
            return function

        def call(batch: Sequence[T]) -> list[float]:
            answer: list[Any] = [None]
            if self.leads:
                try:
                    answer = [list(function(batch))]
                except RLHFError as error:
                    answer = [error]
            dist.broadcast_object_list(answer, 0)
            if isinstance(answer[0], RLHFError):
                raise answer[0]
            return answer[0]

        return call


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Tensors of one kind, a few at a time."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
