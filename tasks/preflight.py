"""What can be known to fail is found out before anything expensive starts."""

from __future__ import annotations

import importlib.util
import logging
import os

from rlhf.config import PipelineConfig, TrackingConfig, on_this_machine
from rlhf.data.sources import source_digest
from rlhf.errors import ConfigError, StoreError
from rlhf.files import at_home
from rlhf.modeling.source import CONFIG, ExternalModel
from rlhf.store import Store
from tasks.external_inputs import check_tokens, judges_of_others
from tasks.runner import store_of
from tasks.stages import STAGES

log = logging.getLogger(__name__)


def preflight(config: PipelineConfig) -> None:
    """Check folders, store, data source and the models that are named.

    Raises:
        ConfigError: One line naming field, value and cure (StoreConfigError for the store).
    """
    config = on_this_machine(config)
    for field in ("work_dir", "report_dir"):
        _check_writable(f"runtime.{field}", getattr(config.runtime, field))
    _check_trackers(config.tracking)
    store = store_of(config)
    store.check()
    _sweep(store)
    source_digest(config.data, config.store_options)
    for stage in STAGES.values():
        foreign = stage.foreign(config)
        if foreign is not None:
            _check_model(foreign, store)
    judges_of_others(config.ppo)
    check_tokens(config.ppo)


def _sweep(store: Store) -> None:
    """What killed publishers left is paid for, and seen by nobody; it can wait for another run."""
    try:
        swept = store.sweep()
    except StoreError as error:
        log.debug("unfinished uploads stay where they are: %s", error)
        return
    if swept:
        log.info("%s: removed %d unfinished uploads of killed runs", store.uri, swept)


def _check_model(foreign: ExternalModel, store: Store) -> None:
    """A model's configuration is small, so it is looked at wherever it lies."""
    if not foreign.is_artifact:
        foreign.check()
        return
    ref = store.resolve(foreign.uri)
    if CONFIG not in [entry.path for entry in store.manifest(ref).files]:
        raise foreign.error(f"this artifact is a {ref.kind}, no model; give that of a model")
    foreign.check_config((store.fetch(ref, [CONFIG]) / CONFIG).read_bytes())


def _check_trackers(tracking: TrackingConfig) -> None:
    """A tracker's package has its name; those that are not the default are extras of ours."""
    for name in tracking.trackers:
        package = importlib.util.find_spec(name)
        # wandb leaves a folder of its name, which would be found as a package without a file.
        if package is None or package.origin is None:
            raise ConfigError(
                f"tracking.trackers = {name!r}: that package is not installed; run "
                f"`pip install {name}`, or choose others (tracking.trackers = [] for none)"
            )
    if {"tensorboard", "wandb"} & set(tracking.trackers):
        _check_writable("tracking.log_dir", tracking.log_dir)


def _check_writable(field: str, place: str) -> None:
    folder = at_home(place)
    if str(folder).startswith("~"):
        raise ConfigError(f"{field} = {place!r}: there is no such user; choose another folder")
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{field} = {str(folder)!r}: can't be created ({error.strerror}); choose another folder"
        ) from error
    if not os.access(folder, os.W_OK):
        raise ConfigError(f"{field} = {str(folder)!r}: not writable; choose another folder")
