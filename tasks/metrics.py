"""Sends a stage's metrics to experiment trackers, by accelerate's classes for them."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from uuid import UUID

from prefect.client.orchestration import get_client
from prefect.logging import get_run_logger
from prefect.runtime import flow_run

from rlhf.config import PipelineConfig, TrackingConfig, on_this_machine
from rlhf.config.fields import flatten
from rlhf.config.tracking import Tracker
from rlhf.files import at_home
from rlhf.store import ArtifactRef
from rlhf.store.manifest import canonical_json, sha256_bytes
from rlhf.store.redact import redact

if TYPE_CHECKING:
    from accelerate.tracking import GeneralTracker

log = logging.getLogger("rlhf.tasks")

#: Stages whose steps are an optimiser's, and the section of their hyper-parameters.
TRAINING = {"train-sft": "sft", "train-reward-model": "reward_model", "train-policy": "ppo"}
#: Stages of which only the result is a metric.
EVALUATION = {"evaluate-reward-model": "evaluation", "evaluate-policy": "evaluation"}
SECTIONS = TRAINING | EVALUATION


class StageMetrics:
    """What one stage tells the trackers in one flow run, as a run of theirs named `<run>/<stage>`.

    They are opened with the first metrics: a stage that is found done never loads torch. One that
    fails is warned of and left out from then on; the work goes on without it.
    """

    def __init__(
        self, stage: str, config: PipelineConfig, inputs: Mapping[str, ArtifactRef]
    ) -> None:
        self._stage, self._inputs = stage, inputs
        self._config = on_this_machine(config)
        self._trackers: dict[Tracker, GeneralTracker] | None = None
        self._wanted = bool(config.tracking.trackers)
        self._first = self._step = 0

    def log(self, step: int, metrics: Mapping[str, Any]) -> None:
        """Send the metrics of a training's step; one without any tells where the training began."""
        self._first = self._first or step
        if metrics and self._wanted and self._stage in TRAINING:
            self._send(step, _numbers(metrics))

    def summarise(self, metrics: Mapping[str, Any]) -> None:
        """Send what the stage says of its result, as `final/…`; it is done."""
        if self._wanted and self._stage in SECTIONS:
            numbers = {f"final/{name}": value for name, value in _numbers(metrics).items()}
            self._send(max(self._step, 1), numbers)
            with suppress(OSError):
                self._under_way.unlink()

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
                self._left_out("trackers", error)
        self._step = step
        self._each(lambda tracker: tracker.log(dict(numbers), step=step))

    def _open(self) -> None:
        """Open all trackers, in the run that an earlier try has begun if this one goes on."""
        from accelerate.state import PartialState

        from rlhf.modeling.base import device_of

        # accelerate's trackers log, which needs its state; the training's own, if it has none yet.
        PartialState(cpu=device_of(self._config.runtime).type == "cpu")
        title = f"{_run_name()}/{self._stage}"
        try:
            begun = self._under_way.read_text(encoding="utf-8")
        except FileNotFoundError:
            begun = None
        if begun and self._first > 1:
            title = begun
        self._under_way.parent.mkdir(parents=True, exist_ok=True)
        self._under_way.write_text(title, encoding="utf-8")
        tracking = self._config.tracking
        self._trackers = {
            name: _tracker(name, tracking, title, self._first) for name in tracking.trackers
        }
        self._each(lambda tracker: tracker.start())
        self._each(lambda tracker: tracker.store_init_configuration(self._parameters()))
        if "tensorboard" in self._trackers:
            folder = at_home(tracking.log_dir)
            get_run_logger().info("metrics: %s (tensorboard --logdir %s)", folder / title, folder)

    @cached_property
    def _under_way(self) -> Path:
        """Holds the name of the run while the stage is not done, for another run to go on in it."""
        identity = {
            "config": self._parameters(),
            "inputs": {role: ref.digest for role, ref in self._inputs.items()},
        }
        name = f"{self._stage}-{sha256_bytes(canonical_json(identity))[:16]}"
        return at_home(self._config.runtime.work_dir) / "tracked" / name

    def _parameters(self) -> dict[str, Any]:
        """The stage's section, flat, with the seed; what is no scalar as text."""
        section = getattr(self._config, SECTIONS[self._stage]).model_dump(mode="json")
        found = {"seed": self._config.seed, **dict(flatten(section))}
        scalar = bool | int | float | str | None
        return {key: v if isinstance(v, scalar) else str(v) for key, v in found.items()}

    def _each(self, act: Callable[[GeneralTracker], None]) -> None:
        trackers = self._trackers or {}
        for name, tracker in list(trackers.items()):
            try:
                act(tracker)
            except Exception as error:
                del trackers[name]
                self._left_out(name, error)

    def _left_out(self, name: str, error: Exception) -> None:
        """Tell of a tracker that failed, in Prefect's log and in the terminal."""
        said = redact(" ".join(str(error).split())) or type(error).__name__
        line = f"{self._stage}: {name} gets no more metrics of this stage, which goes on ({said})"
        get_run_logger().warning(line)
        log.warning(line)


def _tracker(name: Tracker, tracking: TrackingConfig, title: str, step: int) -> GeneralTracker:
    """One of accelerate's trackers, not started, for a run that begins with this step."""
    from accelerate import tracking as classes

    run, _, stage = title.partition("/")
    folder = at_home(tracking.log_dir)
    match name:
        case "tensorboard":
            # What a killed try has told of this step and later is told again, and counts no more.
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
    """The metrics that are numbers; true and false are none."""
    return {
        name: float(value)
        for name, value in metrics.items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }


def _run_name() -> str:
    """Name of the whole run, as one folder's; a stage on other hardware is a child of it."""
    name = flow_run.get_name() or "run"
    if flow_run.get_parent_flow_run_id() is not None:
        with get_client(sync_client=True) as client:
            name = client.read_flow_run(UUID(flow_run.get_root_flow_run_id())).name
    return re.sub(r"[^\w.-]+", "-", name).strip(".-") or "run"
