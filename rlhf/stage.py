"""What every training and evaluation stage shares."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Scalar = float | int | str | bool | None


@dataclass(frozen=True)
class StageResult:
    """What a stage says of itself beside the files it wrote.

    `metrics` go into the artifact's manifest, so they must be the same for identical runs:
    no durations, no paths.
    """

    metrics: Mapping[str, Scalar] = field(default_factory=dict)


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON; NaN and infinities are errors, not output."""
    text = json.dumps(value, indent=1, sort_keys=True, allow_nan=False, ensure_ascii=False)
    path.write_text(text + "\n", encoding="utf-8")


def read_json(path: Path) -> Any:
    """Read JSON written by `write_json`."""
    return json.loads(path.read_text(encoding="utf-8"))
