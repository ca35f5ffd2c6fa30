"""Overview of a pipeline's run, read from its artifacts: before, after, what stands out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rlhf.config import PipelineConfig
from rlhf.config.fields import flatten
from rlhf.data.rows import CARD
from rlhf.gates import Verdict
from rlhf.markdown import Markdown, bold, bullets, paragraphs, words
from rlhf.report import Overview, make_overview
from rlhf.report.symptoms import Facts, Finding
from rlhf.saved import read_saved
from rlhf.store import ArtifactRef, Store
from tasks.stage import Stage
from tasks.stages import (
    EVALUATE_POLICY,
    EVALUATE_REWARD_MODEL,
    EVALUATION,
    PREPARE_DATA,
    TRAIN_POLICY,
    TRAIN_SFT,
)

CURVE, WATCHDOG = "curve.json", "watchdog.json"
_read_rows = partial(read_saved, shape=TypeAdapter(list[dict[str, Any]]))


def read_overview(
    config: PipelineConfig, refs: Mapping[str, ArtifactRef], verdicts: Sequence[Verdict],
    store: Store,
) -> Overview | None:  # fmt: skip
    """Return the overview of a run; None before anything was evaluated.

    Only the files that it needs are fetched: an SFT policy's weights stay where they are.

    Args:
        config: The run's configuration.
        refs: What its stages made, by stage.
        verdicts: Verdicts of its gates.
        store: Where the artifacts are.

    Raises:
        DataError: A file is damaged.
    """
    if EVALUATE_REWARD_MODEL.name not in refs:
        return None

    def part(stage: Stage, file: str, read: Callable[[Path], Any] = read_saved) -> Any:
        ref = refs.get(stage.name)
        if ref is None or all(entry.path != file for entry in store.manifest(ref).files):
            return None
        return read(store.fetch(ref, [file]) / file)

    return make_overview(
        Facts.of(
            policy=part(EVALUATE_POLICY, EVALUATION),
            curve=part(TRAIN_POLICY, CURVE, _read_rows),
            watchdog=part(TRAIN_POLICY, WATCHDOG),
            sft=part(TRAIN_SFT, CURVE, _read_rows),
            sft_metrics=store.manifest(sft).metrics if (sft := refs.get(TRAIN_SFT.name)) else None,
            reward_model=part(EVALUATE_REWARD_MODEL, EVALUATION),
            card=part(PREPARE_DATA, CARD),
            verdicts=verdicts,
            settings=dict(flatten(config.model_dump())),
        )
    )


def overview_markdown(shown: Overview | None) -> Markdown:
    """Return an overview as Markdown, for a summary and the form of an approval."""
    if shown is None:
        return paragraphs()
    parts: list[Markdown] = []
    if shown.figures:
        sample = f", on {shown.sample}" if shown.sample else ""
        parts += [words(f"SFT → after PPO{sample}:"), bullets(f.line for f in shown.figures)]
    if shown.findings:
        alarm = f": {shown.alarm}" if shown.alarm else ""
        parts += [bold(f"What stands out{alarm}"), bullets(map(_finding, shown.findings))]
    return paragraphs(*parts)


def _finding(finding: Finding) -> Markdown:
    mark = () if finding.severity == "note" else (bold(f"{finding.severity.capitalize()}."),)
    return words(*mark, finding.text, bold("Change next:"), finding.cure)
