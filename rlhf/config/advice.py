"""Notes on values that are allowed but outside of their field's advised range."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, cast

from pydantic import BaseModel

from rlhf.config.pipeline import PipelineConfig


def advice(config: PipelineConfig) -> list[str]:
    """One line for each value outside of its advised range."""
    return list(_unusual_values(config, ""))


def _unusual_values(section: BaseModel, prefix: str) -> Iterator[str]:
    for name, field in type(section).model_fields.items():
        value: Any = getattr(section, name)
        if isinstance(value, BaseModel):
            yield from _unusual_values(value, f"{prefix}{name}.")
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
