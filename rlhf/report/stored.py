"""Reports as artifacts: their files, and what other commands read of them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict

from rlhf.report.model import ConfigRow
from rlhf.saved import checked

#: Files of a report's artifact: the page, and its data for programs.
PAGE, DATA = "report.html", "report.json"
#: Kind of the artifact.
KIND = "report"


class _Part(BaseModel):
    # Earlier versions wrote fewer fields, later ones may write more.
    model_config = ConfigDict(frozen=True, extra="ignore")


class SavedStage(_Part):
    """A stage of a run, with the time that it took in this run."""

    name: str
    state: str
    seconds: float | None = None


class SavedReport(_Part):
    """Parts of a run's report that lists and comparisons of runs show; untrusted text."""

    run_name: str
    started: str = ""
    outcome: str = ""
    reason: str = ""
    stages: tuple[SavedStage, ...] = ()
    data: dict[str, Any] = {}
    drift: dict[str, Any] | None = None
    reward_model: dict[str, Any] | None = None
    policy: dict[str, Any] | None = None
    config_rows: tuple[ConfigRow, ...] = ()

    def value(self, key: str) -> str | None:
        """Return a value of the run's configuration as text; None if the report has none."""
        return next((row.value for row in self.config_rows if row.key == key), None)


def read_report(folder: Path) -> SavedReport:
    """Read the data of a report's artifact.

    Raises:
        DataError: They are missing or damaged.
    """
    path = folder / DATA
    return checked(path, lambda: SavedReport.model_validate_json(path.read_bytes()))
