"""Progress of a stage: the listeners' protocol, and a listener that ignores it."""

from collections.abc import Mapping
from typing import Protocol, runtime_checkable


@runtime_checkable
class Progress(Protocol):
    """Listener to a stage's progress, called often: implementations throttle."""

    def __call__(self, step: int, total: int, metrics: Mapping[str, float]) -> None:
        """Report that `step` of `total` is done, with its metrics (reward, kl …), if any.

        Metrics that are known only later are reported with the same step again.
        """


def silent(step: int, total: int, metrics: Mapping[str, float]) -> None:
    """Ignore progress: the default when a stage is called from Python."""
