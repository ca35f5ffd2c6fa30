"""A run in a few lines of Markdown: for Prefect's UI, and for who has to approve of the policy."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rlhf.gates import read_verdict
from tasks.runner import store_of

if TYPE_CHECKING:
    from flows.pipeline import PipelineRun

GATES = ("gate-reward-model", "gate-policy")


def summary(run: PipelineRun, report: str) -> str:
    """Outcome, stages, what the gates checked, and how to get the whole report.

    Args:
        run: What happened so far.
        report: Digest of the report's artifact.
    """
    where = str(run.report)
    pull = f"rlhf artifacts pull {report[:12]} report --store {run.config.store}"
    return "\n\n".join(
        part
        for part in (
            f"**{run.outcome}**: {_text(run.reason)}",
            _table(
                ("stage", "state", "key metric", "artifact"),
                [
                    (row.name, row.state, row.metric or row.message, (row.artifact or "")[:12])
                    for row in run.rows
                ],
            ),
            _table(("gate", "metric", "value", "needs", "passed"), _rules(run)),
            f"Report: `{where}`, on the machine that ran this, or\n\n    {pull}",
        )
        if part
    )


def _rules(run: PipelineRun) -> list[tuple[str, ...]]:
    store = store_of(run.config)
    return [
        (gate, check.metric, f"{check.value:.5g}" if check.value is not None else "missing",
         check.bound, "yes" if check.passed else "**no**")
        for gate in GATES
        if gate in run.refs
        for check in read_verdict(store.fetch(run.refs[gate])).checks
    ]  # fmt: skip


def _table(head: tuple[str, ...], rows: list[tuple[str, ...]]) -> str:
    if not rows:
        return ""
    lines = [head, ("---",) * len(head), *rows]
    return "\n".join("| " + " | ".join(_text(cell) for cell in line) + " |" for line in lines)


def _text(value: str) -> str:
    """One cell: nothing in it ends the cell or the line."""
    return " ".join(value.split()).replace("|", "\\|")
