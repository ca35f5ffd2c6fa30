"""Run reports: one self-contained HTML page from plain data."""

from rlhf.report.model import (
    GREEN,
    OUTCOMES,
    STATES,
    ConfigRow,
    Lineage,
    LineageNode,
    RunOutcome,
    RunReport,
    Sample,
    StageRow,
    StageState,
)
from rlhf.report.render import render

__all__ = [
    "GREEN",
    "OUTCOMES",
    "STATES",
    "ConfigRow",
    "Lineage",
    "LineageNode",
    "RunOutcome",
    "RunReport",
    "Sample",
    "StageRow",
    "StageState",
    "render",
]
