"""Records of runs that a command started on this machine: small JSON files in the work folder.

The process that runs writes its own record every few seconds; `rlhf watch` and `rlhf runs` read
them, without a server. Whether a run goes on is asked of the machine: by its process's id and time
of start, since another process may get the id. A killed run writes nothing more, and is called so.
"""

from __future__ import annotations

import os
import re
import socket
import time
from pathlib import Path
from typing import Any

import psutil
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    ValidationError,
    ValidatorFunctionWrapHandler,
    field_validator,
)

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.files import is_file
from rlhf.plain_text import one_line

#: Records that are kept; older ones are removed when a run begins.
KEPT = 200
#: Largest record that is read, in bytes; a real one has a tenth of that.
LARGEST = 1_000_000
#: States of a run beside its outcomes.
RUNNING, KILLED, INTERRUPTED, AWAY = "Running", "Killed", "Interrupted", "RunningElsewhere"
#: States of a stage before its end.
WAITING = "Pending"
#: Seconds by which two readings of a process's start may differ.
_CLOCK = 2.0


class _Part(BaseModel):
    model_config = ConfigDict(extra="ignore")


class StageProgressRecord(_Part):
    """State and progress of one stage of a run."""

    name: str
    state: str = WAITING
    began: float | None = None
    """Time at which it was started, as seconds since 1970."""
    seconds: float | None = None
    """Time that it took; None before its end."""
    step: int = 0
    total: int = 0
    left: float | None = None
    """Seconds left when the record was written; None if not known."""
    text: str = ""
    """Its metrics: those of the last step, or the key metric."""


class Awaiting(_Part):
    """A policy that waits for a person's approval."""

    policy: str
    """Its digest."""
    store: str
    """URI of its store."""
    line: str
    """Its model line."""


class RunRecord(_Part):
    """State of a run, as it is shown while it runs."""

    name: str
    pid: int = 0
    process_start: float = 0.0
    host: str = ""
    started: float = 0.0
    updated: float = 0.0
    store: str = ""
    """URI of the store that it publishes to."""
    store_options: StoreConfig | None = None
    """Options of that store, which can hold no credentials; None where another version's record
    tells none that this one knows."""
    state: str = RUNNING
    reason: str = ""
    waits: str = ""
    """What the run waits for; empty if for nothing."""
    code: int | None = None
    """Exit code of its command; None before the end."""
    awaiting: Awaiting | None = None
    """What a person has to decide; None if nothing."""
    stages: list[StageProgressRecord] = Field(default_factory=list[StageProgressRecord])
    series: dict[str, list[float]] = Field(default_factory=dict[str, list[float]])
    """Last values of the metrics of the training stage that runs, for sparklines."""
    report: str = ""
    """Path of the page of its report; empty before it was written."""
    sample: list[str] = Field(default_factory=list[str])
    """Prompt and reply of the last sample of PPO; empty before the first."""

    @field_validator("store_options", mode="wrap")
    @classmethod
    def _known(cls, value: Any, read: ValidatorFunctionWrapHandler) -> StoreConfig | None:
        # A run is listed, whatever a newer version may write of its store.
        try:
            return read(value)
        except ValidationError:
            return None

    @property
    def is_over(self) -> bool:
        """Whether the run goes on nowhere."""
        return self.state not in (RUNNING, AWAY)


def new_record(
    name: str, stages: list[str], store: str = "", options: StoreConfig | None = None
) -> RunRecord:
    """Return the record of a run that this process begins now."""
    return RunRecord(
        name=name, store=store, store_options=options or StoreConfig(),
        pid=os.getpid(), process_start=psutil.Process().create_time(),
        host=socket.gethostname(), started=time.time(), updated=time.time(),
        stages=[StageProgressRecord(name=stage) for stage in stages],
    )  # fmt: skip


def write_record(record: RunRecord, folder: Path) -> None:
    """Write a record whole or not at all."""
    path = folder / f"{_file_name(record.name)}.json"
    scratch = path.with_suffix(f".{os.getpid()}.tmp")
    folder.mkdir(parents=True, exist_ok=True)
    scratch.write_text(record.model_dump_json(), encoding="utf-8")
    scratch.replace(path)


def remove_old(folder: Path) -> None:
    """Remove all but the newest `KEPT` records."""
    paths = sorted(folder.glob("*.json"), key=_age)
    for path in paths[KEPT:]:
        path.unlink(missing_ok=True)


def read_records(folder: Path) -> list[RunRecord]:
    """Return the records of a folder with their present states, the newest first.

    What is no record is passed over.
    """
    records = []
    for path in folder.glob("*.json"):
        try:
            if not is_file(path) or path.stat().st_size > LARGEST:
                continue
            record = RunRecord.model_validate_json(path.read_bytes())
        except (OSError, ValidationError):
            continue
        records.append(_with_present_state(record))
    return sorted(records, key=lambda record: -record.started)


def find_record(records: list[RunRecord], text: str) -> RunRecord | None:
    """Return the record with this name, or the only one whose name begins so; None for none.

    Raises:
        ConfigError: Several names begin so.
    """
    exact = [record for record in records if record.name == text]
    matches = exact or [record for record in records if text and record.name.startswith(text)]
    if len(matches) > 1 and not exact:
        some = ", ".join(record.name for record in matches[:5])
        raise ConfigError(f"{text!r}: {len(matches)} runs are meant; give more of one: {some}")
    return matches[0] if matches else None


def no_such_run(records: list[RunRecord], text: str, folder: Path) -> ArtifactMissing:
    """Return the error for a name that no run on this machine has."""
    newest = ", ".join(record.name for record in records[:5]) or "none"
    return ArtifactMissing(
        one_line(
            f"{text!r}: no run in {folder} is called that; the newest are: {newest}; for runs of a "
            "Prefect server set PREFECT_API_URL, for another work folder give --work-dir"
        )
    )


def _with_present_state(record: RunRecord) -> RunRecord:
    if record.state != RUNNING:
        return record
    if record.host != socket.gethostname():
        # A shared folder: only that machine knows its processes.
        return record.model_copy(update={"state": AWAY})
    try:
        process = psutil.Process(record.pid)
        alive = process.status() != psutil.STATUS_ZOMBIE
        alive &= abs(process.create_time() - record.process_start) < _CLOCK
    except (psutil.Error, ValueError, OverflowError):
        alive = False
    if alive:
        return record
    reason = "its process is gone; the same command goes on from what is done"
    return record.model_copy(update={"state": KILLED, "reason": reason, "waits": ""})


def _file_name(name: str) -> str:
    return re.sub(r"[^\w.-]+", "-", name).strip(".-")[:150] or "run"


def _age(path: Path) -> float:
    try:
        return -path.stat().st_mtime
    except OSError:
        return 0.0
