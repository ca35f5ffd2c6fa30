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
    outcome_style,
)
from rlhf.report.overview import Overview, make_overview
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
    "Overview",
    "RunOutcome",
    "RunReport",
    "Sample",
    "StageRow",
    "StageState",
    "make_overview",
    "outcome_style",
    "render",
    "trust_answers",
]
