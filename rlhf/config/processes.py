"""How many processes a training stage runs in. It says where, never what is learnt."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import Field

from rlhf.config.section import Section


class ProcessSection(Section):
    """Child processes of a stage, which share the work of every step."""

    processes: int | None = Field(default=None, ge=1)
    """Child processes that train together, launched as torchrun does, each on its own GPU or its
    share of `runtime.threads`; none trains in the stage's own process. Batch sizes stay those of
    all together, and must be multiples of it."""
    sharding: Literal["ddp", "fsdp"] = "ddp"
    """With several processes: `ddp` holds all weights in each, `fsdp` a share of weights, gradients
    and optimiser in each, which needs less memory and more communication."""


#: Fields that no fingerprint and no checkpoint's identity holds: they say where and in what
#: portions work is done, and the same is learnt, up to rounding.
WHERE = frozenset({*ProcessSection.model_fields, "rollout_batch_size"})


def check_divides(section: ProcessSection, *names: str, by: int = 1) -> None:
    """Refuse sizes that can't be dealt out evenly.

    Args:
        section: Has these fields.
        names: Of the sizes.
        by: What stays together, such as the replies to one prompt.

    Raises:
        ValueError: One is no multiple of the number of processes.
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
