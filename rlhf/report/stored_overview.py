"""Reports that were written before, read back from `report.json`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from rlhf.errors import DataError
from rlhf.files import read_text
from rlhf.report.model import RunOutcome
from rlhf.report.overview import Overview, make_overview
from rlhf.report.stored import SavedStage
from rlhf.report.symptoms import Facts
from rlhf.report.trust import Answer
from rlhf.saved import FAULTS, damaged


class OverviewParts(BaseModel):
    """The parts of a report that its overview needs; others are passed over."""

    model_config = ConfigDict(extra="ignore")

    title: str
    run_name: str
    started: str
    outcome: RunOutcome
    reason: str
    seed: int
    stages: tuple[SavedStage, ...] = ()
    trust: tuple[Answer, ...] = ()
    overview: Overview | None = None
    policy: Any = Field(default=None, exclude=True)
    reward_model: Any = Field(default=None, exclude=True)
    card: Any = Field(default=None, exclude=True)
    watchdog: Any = Field(default=None, exclude=True)
    curves: Any = Field(default=None, exclude=True)

    @property
    def seconds(self) -> float:
        """Time of all stages together."""
        return sum(stage.seconds or 0.0 for stage in self.stages)


def read_report(path: Path) -> OverviewParts:
    """Read a report; one of an earlier version gets its overview from the figures in it.

    Raises:
        DataError: It is missing, or holds something else.
    """
    try:
        report = OverviewParts.model_validate(json.loads(read_text(path)))
    except ValidationError as error:
        raise damaged(path, error) from None
    except FAULTS as error:
        raise DataError(str(damaged(path, error))) from None
    if report.overview is not None or not (report.policy or report.reward_model):
        return report
    facts = Facts.of(
        policy=report.policy, curve=report.curves, watchdog=report.watchdog,
        reward_model=report.reward_model, card=report.card,
    )  # fmt: skip
    return report.model_copy(update={"overview": make_overview(facts)})
