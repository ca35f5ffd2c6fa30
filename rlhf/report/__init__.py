"""Run reports: one self-contained HTML page from plain data."""

from rlhf.report.model import (
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
