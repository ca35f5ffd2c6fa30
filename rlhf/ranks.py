"""Collectives over the processes of a training stage; no-ops for a single process."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from rlhf.errors import RLHFError, TrainingError

T = TypeVar("T")

#: Bytes that are sent at a time; the values are copied into a buffer for it.
BUCKET = 2**26


def rank_and_count() -> tuple[int, int]:
    """Return rank and number of processes, from torchrun's environment variables."""
    return int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))


def is_on_one_node() -> bool:
    """Return whether all processes are on this machine, and so see the same files."""
    return os.environ.get("GROUP_WORLD_SIZE", "1") == "1"


def is_first_of_other_node() -> bool:
    """Return whether this is the first process on a machine that is not the leader's."""
    environment = os.environ
    return environment.get("LOCAL_RANK") == "0" and environment.get("GROUP_RANK", "0") != "0"


class Ranks:
    """Splits work among processes and combines their results.

    All processes must call the same methods in the same order; all get the same results.
    """

    def __init__(self, rank: int = 0, count: int = 1, device: torch.device | None = None) -> None:
        self.rank, self.count = rank, count
        self.device = device or torch.device("cpu")

    @property
    def is_leader(self) -> bool:
        """True in the leader: the process that writes, uploads and reports progress."""
        return self.rank == 0

    def share(self, n: int) -> slice:
        """Return the slice of this process's rows out of `n`."""
        return slice(n * self.rank // self.count, n * (self.rank + 1) // self.count)

    def barrier(self) -> None:
        """Wait until all processes have called it."""
        self.gather(None)

    def gather(self, value: T) -> list[T]:
        """Return the values of all processes, by rank."""
        if self.count == 1:
            return [value]
        values: list[Any] = [None] * self.count
        dist.all_gather_object(values, value)
        return values

    def any(self, flag: bool) -> bool:
        """Return whether the flag is true in any process."""
        return any(self.gather(flag)) if self.count > 1 else flag

    def from_leader(self, value: T) -> T:
        """Return the leader's value."""
        if self.count == 1:
            return value
        values: list[Any] = [value]
        dist.broadcast_object_list(values, 0)
        return values[0]

    def bytes_from_leader(self, data: bytes, size: int) -> bytes:
        """Return the leader's `data`, of that size; that of the others does not count."""
        buffer = bytearray(data) if self.is_leader else bytearray(size)
        if self.count > 1 and size:
            tensor = torch.frombuffer(buffer, dtype=torch.uint8).to(self.device)
            dist.broadcast(tensor, 0)
            return tensor.cpu().numpy().tobytes()
        return bytes(buffer)

    def check_equal(self, what: str, value: float | str) -> None:
        """Check that all processes have the same value; `what` names it in the error.

        Raises:
            TrainingError: They differ, so the training can't be trusted.
        """
        values = self.gather(value)
        if any(other != values[0] for other in values):
            raise TrainingError(
                f"the processes differ in {what} ({values}); the last checkpoint is intact, and "
                "processes = none trains without this risk"
            )

    def all_reduce(self, *tensors: Tensor) -> None:
        """Replace each tensor by its sum over all processes, in place."""
        if self.count == 1:
            return
        for bucket in _buckets(tensors):
            flat = torch.cat([t.detach().flatten() for t in bucket]).to(self.device)
            dist.all_reduce(flat)
            parts = flat.split([t.numel() for t in bucket])
            for tensor, part in zip(bucket, parts, strict=True):
                tensor.copy_(part.view_as(tensor))

    def split_batches(
        self, function: Callable[[Sequence[T]], Sequence[float]]
    ) -> Callable[[Sequence[T]], Sequence[float]]:
        """Wrap a function of a batch so that each process computes its own rows of it."""
        if self.count == 1:
            return function

        def call(batch: Sequence[T]) -> list[float]:
            part = batch[self.share(len(batch))]
            parts = self.gather(list(function(part)) if part else [])
            return [value for values in parts for value in values]

        return call

    def on_leader(
        self, function: Callable[[Sequence[T]], Sequence[float]]
    ) -> Callable[[Sequence[T]], Sequence[float]]:
        """Wrap a function so that only the leader calls it; all get its result or error.

        So a service is called once, and a stateful function has one state.
        """
        if self.count == 1:
            return function

        def call(batch: Sequence[T]) -> list[float]:
            result: list[Any] = [None]
            if self.is_leader:
                try:
                    result = [list(function(batch))]
                except RLHFError as error:
                    result = [error]
            answer = self.from_leader(result[0])
            if isinstance(answer, RLHFError):
                raise answer
            return answer

        return call


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Yield groups of tensors of one dtype, of up to `BUCKET` bytes."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(t.nbytes for t in bucket) + tensor.nbytes > BUCKET
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket
