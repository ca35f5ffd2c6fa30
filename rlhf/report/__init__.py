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
from rlhf.report.trust import Answer, trust_answers

__all__ = [
    "GREEN",
    "OUTCOMES",
    "STATES",
    "Answer",
    "ConfigRow",
    "Lineage",
    "LineageNode",
    "RunOutcome",
    "RunReport",
    "Sample",
    "StageRow",
    "StageState",
    "render",
    "trust_answers",
]
