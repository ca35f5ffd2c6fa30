"""Expected costs of a run's stages, from those of earlier runs; nothing is guessed.

A stage's time is that of the last run of its model line in which it had the same settings, a base
of the same shape, and the same machine, or on another machine the same accelerator. A training that
is to be longer or shorter than that one takes proportionally longer or shorter. Of any other
stage nothing is known.
"""

from __future__ import annotations

import json
import logging
import socket
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from pydantic import TypeAdapter

from rlhf.config import PipelineConfig, apply_machine_settings
from rlhf.config.pipeline import INLINE, place_names
from rlhf.costs import Forecast
from rlhf.errors import RLHFError
from rlhf.limits import MAX_MODEL_BYTES
from rlhf.meter import CPU, device_name
from rlhf.modeling.source import CONFIG
from rlhf.report.model import StageState
from rlhf.store import ArtifactRef, Store
from rlhf.store.manifest import canonical_json, sha256_bytes
from tasks.external_inputs import external_base_model
from tasks.run_costs import StageCosts, read_line
from tasks.runner import recorded_outcome, work_of
from tasks.stage import Stage
from tasks.stages import STAGES

log = logging.getLogger("rlhf.tasks")
_JSON = TypeAdapter(Any)
#: Runs of the line in which a stage is looked for.
RUNS = 20
#: Fields of a model's configuration that decide how long it computes.
_SHAPE = (
    "model_type", "hidden_size", "num_hidden_layers", "intermediate_size", "vocab_size",
    "num_attention_heads", "num_key_value_heads", "num_experts", "num_local_experts",
)  # fmt: skip


def kinds(config: PipelineConfig, store: Store) -> dict[str, dict[str, Any]]:
    """Return `settings` and `length` of each stage: what its time depends on.

    Returns:
        Nothing if the base model can't be read, which its stage reports.
    """
    with _harmless("what a run will take"):
        shape = _base_shape(config, store)
        return {name: _kind(stage, config, shape) for name, stage in STAGES.items()}
    return {}


def forecasts(
    config: PipelineConfig, store: Store, kinds: Mapping[str, Mapping[str, Any]]
) -> dict[str, Forecast]:
    """Return what the stages will take if they run, as far as that is known."""
    found: dict[str, Forecast] = {}
    with _harmless("what a run will take"):
        config = apply_machine_settings(config)
        runs = read_line(store, config.promotion.name, RUNS) if kinds else []
        past = [stage for run in reversed(runs) for stage in run.stages]
        for name in kinds:
            forecast = forecast_of(STAGES[name], config, kinds[name], past)
            if forecast is not None:
                found[name] = forecast
    return found


def forecast_of(
    stage: Stage, config: PipelineConfig, kind: Mapping[str, Any], past: Sequence[StageCosts]
) -> Forecast | None:
    """Return what a stage will take, from stages of earlier runs, the newest first."""
    host, device = socket.gethostname(), device_name(config.runtime.device)
    is_here = config.deployment_of(stage.name) == INLINE
    for before in past:
        cost = before.cost
        is_alike = before.name == stage.name and before.settings == kind["settings"]
        if not is_alike or cost is None or before.state == StageState.FAILED:
            continue
        same_machine = cost.host == host and cost.device == device
        same_device = cost.device == device != CPU
        if is_here and not (same_machine or same_device):
            continue
        factor = _factor(kind.get("length"), before.length)
        where = "on this machine" if same_machine else f"on another machine's {cost.device}"
        source = f"as last time {where}"
        if factor != 1:
            source = f"from {cost.steps:,} measured steps {where}"
        places = place_names(stage.name, config.deployment_of(stage.name))
        names = [*places, cost.device, CPU if cost.device == CPU else "cuda"]
        seconds = factor * cost.seconds
        priced = cost.model_copy(update={"seconds": seconds, "money": None}).priced(
            config.costs.price(names), config.costs.currency
        )
        currency = priced.currency if priced.money is not None else ""
        return Forecast(seconds=seconds, money=priced.money, currency=currency, source=source)
    return None


def recorded_stages(config: PipelineConfig, store: Store) -> set[str]:
    """Return the names of the stages that a run would find recorded, from the first on."""
    refs: dict[str, ArtifactRef] = {}
    with _harmless("what was done before"):
        for name, stage in STAGES.items():
            inputs = {r: refs[made] for r, made in stage.needed_inputs(config).items()}
            inputs |= stage.find_optional(config, inputs, store)
            outcome = recorded_outcome(work_of(stage, config, inputs, store), store)
            if outcome is None:
                break
            refs[name] = outcome.ref
    return {*refs}


def reserve(forecasts: Mapping[str, Forecast], stages: Sequence[Stage]) -> float | None:
    """Return the seconds that some stages will take together; None if one of them is not known."""
    known = [forecasts[stage.name].seconds for stage in stages if stage.name in forecasts]
    return sum(known) if len(known) == len(stages) else None


def _kind(stage: Stage, config: PipelineConfig, shape: str) -> dict[str, Any]:
    settings = _without(_JSON.dump_python(dict(stage.depends_on(config)), mode="json"), stage)
    digest = sha256_bytes(canonical_json({"settings": settings, "base": shape}))
    section = getattr(config, stage.section or "", None)
    length = getattr(section, stage.length, None) if stage.length else None
    # A whole digest would look like that of an artifact, which histories keep.
    return {"settings": digest[:32], "length": None if length is None else float(length)}


def _without(value: Any, stage: Stage) -> Any:
    """Return settings without the one that the stage's time is proportional to."""
    if not isinstance(value, dict):
        return value
    return {k: _without(v, stage) for k, v in value.items() if k != stage.length}


def _base_shape(config: PipelineConfig, store: Store) -> str:
    """Return what of the base model decides how long it computes, as text."""
    external = external_base_model(config)
    if external is None:
        return config.base.architecture.model_dump_json()
    if external.is_artifact:
        ref = store.resolve(external.uri)
        data = (store.fetch(ref, [CONFIG]) / CONFIG).read_bytes()
    else:
        data = external.read(CONFIG, MAX_MODEL_BYTES)
    values: dict[str, Any] = json.loads(data)
    text = values.get("text_config")
    values = {**values, **text} if isinstance(text, dict) else values
    return json.dumps({name: values.get(name) for name in _SHAPE})


def _factor(length: float | None, before: float | None) -> float:
    """Return how many times as long a training is as one before it."""
    return length / before if length and before else 1.0


@contextmanager
def _harmless(what: str) -> Iterator[None]:
    """Log an error, and go on without a forecast: the stages report what concerns them."""
    try:
        yield
    except (RLHFError, OSError, ValueError, KeyError) as error:
        log.info("%s is not known (%s)", what, error)
