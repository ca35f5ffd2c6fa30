"""The run report: one self-contained HTML page, a pure function of plain data."""

from rlhf.report.model import (
    ConfigRow,
    Lineage,
    LineageNode,
    Rule,
    RunReport,
    Sample,
    StageRow,
    Verdict,
)
from rlhf.report.render import render

__all__ = [
    "ConfigRow",
    "Lineage",
    "LineageNode",
    "Rule",
    "RunReport",
    "Sample",
    "StageRow",
    "Verdict",
    "render",
]
