"""Values that are allowed but unusual: outside the range that a field's schema advises."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from pydantic import BaseModel

from rlhf.config.pipeline import PipelineConfig


def advice(config: PipelineConfig) -> list[str]:
    """One line for each value outside its advised range, in the order of the sections."""
    return list(_outside(config, ""))


def _outside(section: BaseModel, prefix: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value: Any = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _outside(value, f"{prefix}{name}.")
            continue
        extra = field.json_schema_extra
        if not isinstance(extra, dict) or "advised" not in extra or value is None:
            continue
        low, high = cast("list[float]", extra["advised"])
        if not low <= value <= high:
            yield (
                f"{prefix}{name} = {value:g} is outside the advised {low:g}–{high:g}; "
                "keep it only if you mean it"
            )
