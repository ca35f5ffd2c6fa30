"""Summary and card of a dataset artifact, as later stages, the report and the terminal read them.

Their parts are checked as far as they are used; older versions wrote fewer of them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, Field, TypeAdapter

from rlhf.data.rows import CARD, SUMMARY
from rlhf.saved import read_saved

_Count = Annotated[int, Field(strict=True, ge=0)]


class _Rate(BaseModel):
    share: Annotated[float, Field(strict=True, ge=0, le=1)]
    n: Annotated[int, Field(strict=True, ge=1)]


class _Bias(BaseModel):
    wins: _Rate | None = None


class _Repeats(BaseModel):
    pairwise: _Rate | None = None


class _Card(BaseModel):
    position: _Rate | None = None
    repeats: _Repeats | None = None
    formats: dict[str, _Bias] | None = None
    languages: dict[str, _Rate] | None = None
    slices: dict[str, dict[str, _Rate]] | None = None


class _Summary(BaseModel):
    left_out: dict[str, _Count] = {}
    notes: list[str] = []
    findings: list[str] = []
    unused_columns: str | None = None
    rows_left_out: str | None = None


_CARDS = TypeAdapter(_Card)
_SUMMARIES = TypeAdapter(_Summary)


def read_card(folder: Path) -> dict[str, Any] | None:
    """Read `card.json`; None for an older dataset without one.

    Raises:
        DataError: It is damaged.
    """
    path = folder / CARD
    return read_saved(path, _CARDS) if path.exists() else None


def read_summary(folder: Path) -> dict[str, Any]:
    """Read `summary.json`.

    Raises:
        DataError: It is missing or damaged.
    """
    return read_saved(folder / SUMMARY, _SUMMARIES)
