"""Processes of a training stage: their number, and how they share weights.

They decide where work is done, not what is learnt, so they are no part of a fingerprint.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rlhf.config.section import Section


class ProcessSection(Section):
    """Child processes of a training stage; they share the work of every step."""

    processes: int | None = Field(default=None, ge=1)
    """Child processes that train together, launched as torchrun does, each on its own GPU or its
    share of `runtime.threads`; none trains in the stage's own process. Batch sizes stay those of
    all together, and must be multiples of it."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: `ddp` holds all weights in each, `fsdp` a share of weights, gradients
    and optimiser in each, which needs less memory and more communication."""


#: Fields left out of fingerprints and of checkpoints' identities: they decide where and in what
#: portions work is done, and the result is the same up to rounding.
WHERE = frozenset({*ProcessSection.model_fields, "rollout_batch_size"})


def check_divides(section: ProcessSection, *names: str, by: int = 1) -> None:
    """Check that sizes are multiples of the number of processes.

    Args:
        section: The section that holds the sizes.
        names: Fields of the sizes.
        by: Size of groups that must stay together, such as the replies to one prompt.

    Raises:
        ValueError: One is not, times the size of a group.
    """
    count = section.processes or 1
    for name in names:
        value: Any = getattr(section, name)
        if value % (count * by):
            together = f", in groups of {by} replies," if by > 1 else ""
            raise ValueError(
                f"{name} = {value} can't be shared evenly{together} by processes = {count}; make "
                f"it a multiple of {count * by}, or change processes"
            )
