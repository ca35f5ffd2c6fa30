"""Drift of a run's data against the data that the model line's champion was trained on."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rlhf.champions import champion
from rlhf.config import PipelineConfig
from rlhf.data.drift import Drift, Shift, compare
from rlhf.data.rows import SUMMARY
from rlhf.data.sketch import Sketch, read_sketch
from rlhf.data.stored import read_summary
from rlhf.errors import DataError, GateRejected
from rlhf.files import write_json
from rlhf.gates import VERDICT, Check, Verdict
from rlhf.store import ArtifactRef, Store
from tasks.runner import producer

#: Name of the gate in verdicts and reports.
GATE = "gate-drift"
DRIFT = "drift.json"


@dataclass(frozen=True)
class DriftCheck:
    """Result of comparing a run's data with the champion's."""

    drift: Drift
    champion_data: str | None = None
    """Digest of the champion's data; None if nothing was compared."""
    verdict: ArtifactRef | None = None
    """The published verdict, with `drift.json`."""
    warnings: tuple[str, ...] = ()
    rejection: GateRejected | None = None
    """The veto, whose verdict has been published."""

    @property
    def headline(self) -> str:
        """The largest value of each measure in one line."""
        return " · ".join(f"{name} {value:.3f}" for name, value in self.drift.largest().items())

    def as_json(self) -> dict[str, Any]:
        """Return the figures for reports."""
        return {
            "champion_data": self.champion_data,
            "warnings": list(self.warnings),
            "notes": list(self.drift.notes),
            "shifts": [asdict(shift) for shift in self.drift.shifts],
            "lengths": self.drift.lengths,
        }


def measure_drift(
    config: PipelineConfig, data: ArtifactRef, store: Store
) -> tuple[Drift, str | None]:
    """Compare a dataset with the champion's; return also the digest of the latter.

    Without a comparison the drift has no shifts, its note gives the reason, and the digest is None.

    Args:
        config: Configuration with the model line.
        data: The dataset.
        store: Where champion and datasets are.

    Raises:
        DataError: A dataset's sketch is damaged.
    """
    try:
        digest = _comparable(config, data, store)
    except LookupError as reason:
        return Drift((), (str(reason.args[0]),)), None
    old = _sketch(store, digest, f"the champion's data {digest[:12]}")
    new = _sketch(store, data, f"the data {data.digest[:12]}")
    return compare(old, new), digest


def _sketch(store: Store, item: str | ArtifactRef, name: str) -> Sketch:
    """Return a dataset's sketch; errors name the artifact."""
    try:
        return read_sketch(store.fetch(item))
    except DataError as error:
        raise DataError(f"{name}: {error}") from None


def check_drift(config: PipelineConfig, data: ArtifactRef, store: Store) -> DriftCheck:
    """Compare a run's data with the champion's; publish the verdict of a comparison.

    A veto is in the result as an error to raise, so that its figures can be reported.

    Args:
        config: Configuration with limits and model line.
        data: The run's dataset.
        store: Receives the verdict.
    """
    drift, digest = measure_drift(config, data, store)
    if digest is None:
        return DriftCheck(drift)
    settings = config.data.drift
    warnings = tuple(
        describe(shift, getattr(settings.warn, shift.measure), "warn")
        for shift in drift.reached(settings.warn)
    )
    verdict = Verdict(GATE, data.digest, not drift.reached(settings.veto), _checks(drift, config))
    vetoed = drift.reached(settings.veto)
    check = DriftCheck(drift, digest, warnings=warnings)
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        write_json(folder / VERDICT, asdict(verdict))
        write_json(folder / DRIFT, check.as_json())
        parents = {"data": data, "champion-data": store.resolve(digest)}
        provenance = producer(GATE, settings.model_dump(mode="json"), config.seed)
        metrics: Mapping[str, Any] = {"approved": verdict.approved, **drift.largest()}
        ref = store.publish(
            folder, "verdict", parents=parents, producer=provenance, metrics=metrics
        )
    rejection = GateRejected(_veto_message(vetoed, config, digest), verdict) if vetoed else None
    return DriftCheck(drift, digest, ref, warnings, rejection)


def describe(shift: Shift, limit: float, action: str) -> str:
    """Return a shift beyond a limit in words: measure, value, limit."""
    values = ""
    if shift.before is not None and shift.after is not None:
        form = (lambda x: f"{x:,.0f}") if shift.measure == "lengths" else (lambda x: f"{x:.1%}")
        values = f", {form(shift.before)} → {form(shift.after)}"
    return (
        f"{shift.measure} of {shift.of}: {shift.value:.3f}{values}; "
        f"data.drift.{action}.{shift.measure} = {limit:g}"
    )


def trigger_reason(config: PipelineConfig, data: ArtifactRef, store: Store) -> str | None:
    """Return why drift alone starts a retraining; None if it does not."""
    limits = config.data.drift.trigger
    if not any(value is not None for value in limits.model_dump().values()):
        return None
    drift, _ = measure_drift(config, data, store)
    reached = drift.reached(limits)
    if not reached:
        return None
    return describe(reached[0], getattr(limits, reached[0].measure), "trigger")


def _comparable(config: PipelineConfig, data: ArtifactRef, store: Store) -> str:
    """Return the digest of the champion's data.

    Raises:
        LookupError: There is nothing to compare with; the argument is the reason.
    """
    line = config.promotion.name
    if not config.data.drift.enabled:
        raise LookupError("not compared: data.drift.enabled = false")
    latest = champion(store, line)
    if latest is None:
        raise LookupError(f"not compared: {line} has no champion yet")
    who = f"the champion {latest.policy[:12]} of {line}"
    if not store.exists(latest.policy):
        raise LookupError(f"not compared: {who} is not in the store")
    digest = store.manifest(latest.policy).parents.get("data")
    if digest is None:
        raise LookupError(f"not compared: {who} names no data, so it was not trained here")
    if digest == data.digest:
        raise LookupError(f"none: these are the data of {who}")
    if not store.exists(digest):
        raise LookupError(f"not compared: the data {digest[:12]} of {who} were removed")
    if _is_world(store.fetch(digest)) and not _is_world(store.fetch(data)):
        raise LookupError(f"not compared: {who} was trained on the generated world")
    return digest


def _is_world(folder: Path) -> bool:
    return (folder / SUMMARY).exists() and read_summary(folder).get("source") == "world"


def _checks(drift: Drift, config: PipelineConfig) -> tuple[Check, ...]:
    veto = config.data.drift.veto
    checks = []
    for shift in drift.shifts:
        limit = getattr(veto, shift.measure)
        if limit is not None:
            bound = f"< {limit:g}, or within noise of {shift.noise:.3g}"
            name = f"{shift.measure} of {shift.of}"
            checks.append(Check(name, shift.value, bound, not shift.reaches(limit)))
    return tuple(checks)


def _veto_message(vetoed: Sequence[Shift], config: PipelineConfig, digest: str) -> str:
    limits = config.data.drift.veto
    first = describe(vetoed[0], getattr(limits, vetoed[0].measure), "veto")
    more = f" ({len(vetoed) - 1} more in the report)" if len(vetoed) > 1 else ""
    accepted = " ".join(f"--data.drift.veto.{m}=none" for m in {s.measure: 0 for s in vetoed})
    return (
        f"the data differ from those of the champion of {config.promotion.name} ({digest[:12]}) in "
        f"{first}{more}; look at both data cards, and accept the data with {accepted}"
    )
