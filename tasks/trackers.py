"""Metrics of a stage for experiment trackers, sent by accelerate's classes."""

from __future__ import annotations

import logging
import re
from collections import Counter
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from rlhf.config import PipelineConfig, TrackingConfig, apply_machine_settings
from rlhf.config.fields import flatten
from rlhf.config.pipeline import Tracker
from rlhf.files import expand_home
from rlhf.store import ArtifactRef
from rlhf.store.manifest import canonical_json, sha256_bytes
from rlhf.store.redact import redact
from tasks.parameters import overridden
from tasks.stage import Stage

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

log = logging.getLogger("rlhf.tasks")
#: Most characters of a tracked run's name that tell what was changed; of the rest, the number.
LONGEST_CHANGES = 60
#: Parts of the configuration that change no figures.
_PLACES = ("store", "store_options", "runtime", "tracking", "retries", "placement", "promotion")


class StageMetrics:
    """One stage's metrics in one flow run; to a tracker, a run named `<run>/<stage>`.

    Trackers are opened with the first metrics: a stage that has a record never loads torch. A
    tracker that fails gets nothing more, which is logged as a warning; the stage goes on.
    """

    def __init__(
        self, stage: Stage, config: PipelineConfig, inputs: Mapping[str, ArtifactRef]
    ) -> None:
        self._stage, self._inputs = stage, inputs
        self._config = apply_machine_settings(config)
        self._trackers: dict[Tracker, GeneralTracker] | None = None
        self._wanted = bool(config.tracking.trackers) and stage.section is not None
        self._first = self._step = 0

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the metrics of a step; the first step, with metrics or without, is the start."""
        self._first = self._first or step
        if metrics and self._wanted and self._stage.tracks_steps:
            self._send(step, _numbers(metrics))

    def summarise(self, metrics: Mapping[str, Any]) -> None:
        """Send the metrics of the completed stage's result, as `final/…`."""
        if self._wanted:
            numbers = {f"final/{name}": value for name, value in _numbers(metrics).items()}
            self._send(max(self._step, 1), numbers)
            with suppress(OSError):
                self._run_file.unlink()

    def close(self) -> None:
        """End the trackers' runs."""
        self._each(lambda tracker: tracker.finish())
        self._trackers = {}

    def _send(self, step: int, numbers: Mapping[str, float]) -> None:
        if self._trackers is None:
            self._trackers = {}
            try:
                self._open()
            except Exception as error:
                self._warn("trackers", error)
        self._step = step
        self._each(lambda tracker: tracker.log(dict(numbers), step=step))

    def _open(self) -> None:
        """Open all trackers, in the run of an earlier try if this try resumes it."""
        from accelerate.state import PartialState

        from rlhf.modeling.device import prepare_device

        # accelerate's trackers log, which needs its state: that of the training, or a new one.
        PartialState(cpu=prepare_device(self._config.runtime).type == "cpu")
        title = f"{_run_name()}{changes(flow_run.parameters or {})}/{self._stage.name}"
        try:
            earlier = self._run_file.read_text(encoding="utf-8")
        except FileNotFoundError:
            earlier = None
        if earlier and self._first > 1:
            title = earlier
        self._run_file.parent.mkdir(parents=True, exist_ok=True)
        self._run_file.write_text(title, encoding="utf-8")
        tracking = self._config.tracking
        self._trackers = {
            name: _tracker(name, tracking, title, self._first) for name in tracking.trackers
        }
        self._each(lambda tracker: tracker.start())
        self._each(lambda tracker: tracker.store_init_configuration(self._parameters()))
        if "tensorboard" in self._trackers:
            folder = expand_home(tracking.log_dir)
            get_run_logger().info("metrics: %s (tensorboard --logdir %s)", folder / title, folder)

    @cached_property
    def _run_file(self) -> Path:
        """File with the tracked run's name, for a run that resumes this stage."""
        identity = {
            "config": self._parameters(),
            "inputs": {role: ref.digest for role, ref in self._inputs.items()},
        }
        name = f"{self._stage.name}-{sha256_bytes(canonical_json(identity))[:16]}"
        return expand_home(self._config.runtime.work_dir) / "tracked" / name

    def _parameters(self) -> dict[str, Any]:
        """Return the stage's section, flat, and the seed; non-scalar values as text."""
        assert self._stage.section is not None  # else no tracker is opened
        section = getattr(self._config, self._stage.section).model_dump(mode="json")
        values = {"seed": self._config.seed, **dict(flatten(section))}
        scalar = bool | int | float | str | None
        return {key: v if isinstance(v, scalar) else str(v) for key, v in values.items()}

    def _each(self, act: Callable[[GeneralTracker], None]) -> None:
        """Call every tracker; one that raises is dropped."""
        trackers = self._trackers or {}
        for name, tracker in list(trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                del trackers[name]
                self._warn(name, error)

    def _warn(self, name: str, error: Exception) -> None:
        """Log the failure of a tracker in Prefect's log and in the terminal."""
        reason = redact(" ".join(str(error).split())) or type(error).__name__
        stage = self._stage.name
        line = f"{stage}: {name} gets no more metrics of this stage, which goes on ({reason})"
        get_run_logger().warning(line)
        log.warning(line)


def changes(parameters: Mapping[str, Any]) -> str:
    """Return what a run's parameters change, for a folder's name that tells runs apart."""
    changed = {
        key: value for key, value in overridden(parameters) if key.partition(".")[0] not in _PLACES
    }
    last = Counter(key.rpartition(".")[2] for key in changed)
    text = ""
    for count, (key, value) in enumerate(changed.items()):
        name = key.rpartition(".")[2]
        part = f",{key if last[name] > 1 else name}={value}"
        part = re.sub(r"[^\w.,=+-]+", "-", part)
        if len(text) + len(part) > LONGEST_CHANGES:
            return f"{text},+{len(changed) - count}"
        text += part
    return text


def _tracker(name: Tracker, tracking: TrackingConfig, title: str, step: int) -> GeneralTracker:
    """Return a tracker of accelerate, not started, for a run that begins at `step`."""
    from accelerate import tracking as classes

    run, _, stage = title.partition("/")
    folder = expand_home(tracking.log_dir)
    match name:
        case "tensorboard":
            # A killed try may have sent this step and later ones, which come again.
            return classes.TensorBoardTracker(title, folder, purge_step=step)
        case "wandb":
            key = sha256_bytes(title.encode())[:16]
            return classes.WandBTracker(
                tracking.project, name=title, group=run, job_type=stage, id=key, resume="allow",
                dir=str(folder),
            )  # fmt: skip
        case "mlflow":
            return classes.MLflowTracker(tracking.project, run_name=title)
        case "trackio":
            return classes.TrackioTracker(tracking.project, name=title, group=run, resume="allow")


def _numbers(metrics: Mapping[str, Any]) -> dict[str, float]:
    """Return the metrics that are numbers; booleans are not."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _run_name() -> str:
    """Return the root flow run's name, made safe for use as a folder name."""
    name = flow_run.get_name() or "run"
    if flow_run.get_parent_flow_run_id() is not None:
        with get_client(sync_client=True) as client:
            name = client.read_flow_run(UUID(flow_run.get_root_flow_run_id())).name
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"
