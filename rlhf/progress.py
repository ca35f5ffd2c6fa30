"""How a stage tells the outside how far it is, without knowing who listens."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Receives a stage's progress; called often, so listeners throttle themselves."""

    def __call__(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Tell that `step` of `total` is done, with its metrics (reward, kl, loss …), if any.

        What is known only later is told with the same step again.
        """


def silent(step: int, total: int, metrics: Mapping[str, float]) -> None:
    """Listen to nothing: the default when a stage is called from Python."""
