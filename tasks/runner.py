"""Runs one stage: looks for its record, else fetches inputs, calls the library, publishes, records.

A stage's fingerprint (name, configuration it depends on, input digests, code, seed) keys a record
in the store. A stage whose record exists, and whose artifact is still there, is not run again, in
whatever process, machine or flow run.
"""

from __future__ import annotations

import logging
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

from rlhf.config import PipelineConfig, on_this_machine
from rlhf.data.sources import source_digest
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.paths import at_home
from rlhf.progress import Progress, silent
from rlhf.store import ArtifactRef, Store, open_store
from rlhf.store.manifest import canonical_json, sha256_bytes
from tasks.checkpoints import discard_checkpoints
from tasks.code_version import code_version, producer
from tasks.stages import STAGES, Stage, StageRun
from tasks.transfer import Transfer

_JSON = TypeAdapter(Any)
log = logging.getLogger("rlhf.tasks")


@dataclass(frozen=True)
class Outcome:
    """What became of a stage."""

    stage: str
    ref: ArtifactRef
    cached: bool
    seconds: float
    metrics: Mapping[str, Any]

    @property
    def headline(self) -> str:
        """The metrics that matter, in one short line."""
        parts = [
            (form, [self.metrics.get(name) for name in names])
            for form, *names in STAGES[self.stage].headline
        ]
        return " · ".join(form.format(*values) for form, values in parts if None not in values)


def store_of(config: PipelineConfig) -> Store:
    """The store that the configuration names, with its cache in the work folder of this machine."""
    config = on_this_machine(config)
    return open_store(
        config.store,
        options=config.store_options,
        cache_dir=at_home(config.runtime.work_dir),
        cache_bytes=int(config.runtime.cache_gb * 1e9),
    )


def run_stage(
    stage: Stage,
    config: PipelineConfig,
    inputs: Mapping[str, ArtifactRef],
    progress: Progress = silent,
) -> Outcome:
    """Run a stage, or find that it was run before.

    Raises:
        ArtifactMissing: An input of the stage was not given.
        RLHFError: Whatever the stage's body raises.
    """
    started = time.monotonic()
    config = on_this_machine(config)
    store = store_of(config)
    refs, key = work_of(stage, config, inputs, store)
    depends_on = _JSON.dump_python(dict(stage.depends_on(config)), mode="json")
    work = at_home(config.runtime.work_dir)
    work.mkdir(parents=True, exist_ok=True)
    checkpoints = work / "checkpoints" / f"{stage.name}-{key[:16]}"
    with _alone(work / f"{stage.name}-{key[:16]}.lock", stage):
        done = done_before(stage, config, refs, key, store)
        if done is not None:
            discard_checkpoints(store, checkpoints)  # of a try that did not get so far
            return done
        scratch = f"{stage.name}-{key[:16]}-"
        for left_behind in work.glob(f"{scratch}*"):
            shutil.rmtree(left_behind)  # by a try that was killed; the lock says it is gone
        made_by = producer(stage.name, depends_on, config.seed)
        with tempfile.TemporaryDirectory(dir=work, prefix=scratch) as folder:
            out = Path(folder, "out")
            out.mkdir()
            folders = {
                role: store.fetch(ref, listener=Transfer(f"{stage.name}: fetching {role}"))
                for role, ref in refs.items()
            }
            foreign = stage.foreign(config)
            if foreign is not None and "base" not in folders:
                folders["base"] = foreign.local(Path(folder, "base"))
            run = StageRun(config, refs, folders, out, checkpoints, store, made_by, progress)
            result = stage.body(run)
            ref = store.publish(
                out, stage.kind, parents=refs, producer=made_by, metrics=result.metrics,
                listener=Transfer(f"{stage.name}: publishing"),
            )  # fmt: skip
        store.history.append(_record(stage, key), ref.model_dump(mode="json"))
        discard_checkpoints(store, checkpoints)
    return Outcome(stage.name, ref, False, time.monotonic() - started, result.metrics)


def work_of(
    stage: Stage, config: PipelineConfig, inputs: Mapping[str, ArtifactRef], store: Store
) -> tuple[dict[str, ArtifactRef], str]:
    """All that a stage's work starts from, and its fingerprint; asks the data source once."""
    refs = _with_base(stage, config, inputs, store)
    return refs, fingerprint(stage, config, refs)


def done_before(
    stage: Stage, config: PipelineConfig, refs: Mapping[str, ArtifactRef], key: str, store: Store
) -> Outcome | None:
    """What the work of this key made before, on whatever machine; None if it is still to do."""
    started = time.monotonic()
    recorded = recorded_ref(store, stage, key)
    if recorded is None or not stage.holds(config, refs, store):
        return None
    metrics = store.manifest(recorded).metrics
    return Outcome(stage.name, recorded, True, time.monotonic() - started, metrics)


@contextmanager
def _alone(path: Path, stage: Stage) -> Iterator[None]:
    """Two runs of the same work in the same folder: the second waits, and then finds the record."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        log.info("%s: another process is at this very work; waiting for it", stage.name)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


def fingerprint(stage: Stage, config: PipelineConfig, inputs: Mapping[str, ArtifactRef]) -> str:
    """Identity of a stage's work; equal work has an equal fingerprint on every machine."""
    identity = {
        "stage": stage.name,
        "config": _JSON.dump_python(dict(stage.depends_on(config)), mode="json"),
        "inputs": {role: ref.digest for role, ref in inputs.items()},
        "code": code_version(),
        "seed": config.seed,
    }
    if stage.name == "prepare-data":
        identity["source"] = source_digest(config.data, config.store_options)
    foreign = stage.foreign(config)
    if foreign is not None and "base" not in inputs:
        identity["base"] = foreign.digest()
    return sha256_bytes(canonical_json(identity))


def recorded_ref(store: Store, stage: Stage, key: str) -> ArtifactRef | None:
    """The artifact that this work made before, if its record and all of its bytes are there."""
    record = store.history.latest(_record(stage, key))
    if record is None:
        return None
    ref = ArtifactRef.model_validate(record)
    return ref if store.exists(ref) else None


def find_inputs(
    stage: Stage, config: PipelineConfig, given: Mapping[str, ArtifactRef]
) -> dict[str, ArtifactRef]:
    """The inputs of a stage that is run alone: those given, and for the rest what earlier stages
    recorded under this very configuration.

    Raises:
        ArtifactMissing: An earlier stage has not run yet.
        ConfigError: A given role is none of the stage's, or its artifact of another kind.
    """
    needs = stage.needs(config)
    for role, ref in given.items():
        if role not in needs:
            raise ConfigError(
                f"--input {role}: no input of {stage.name}, which takes "
                f"{', '.join(needs) or 'none'}"
            )
        wanted = STAGES[needs[role]].kind
        if ref.kind != wanted:
            raise ConfigError(
                f"--input {role}: {ref.short} is of kind {ref.kind}; give one of kind {wanted}, "
                f"as {needs[role]} makes it"
            )
    store = store_of(config)
    found = dict(given)
    for role, maker in needs.items():
        if role not in found:
            found[role] = _made_by(STAGES[maker], config, store, given, f"{stage.name}: {role}")
    return found


def _made_by(
    stage: Stage,
    config: PipelineConfig,
    store: Store,
    given: Mapping[str, ArtifactRef],
    wanted: str,
) -> ArtifactRef:
    inputs = {
        role: given.get(role) or _made_by(STAGES[maker], config, store, given, wanted)
        for role, maker in stage.needs(config).items()
    }
    _, key = work_of(stage, config, inputs, store)
    ref = recorded_ref(store, stage, key)
    if ref is None:
        raise ArtifactMissing(
            f"{wanted} is missing: {stage.name} has not run with this configuration; run "
            f"`rlhf stage {stage.name}` first, or give --input <role>=<artifact>"
        )
    return ref


def _record(stage: Stage, key: str) -> str:
    return f"records/{stage.name}/{key}"


def _with_base(
    stage: Stage, config: PipelineConfig, inputs: Mapping[str, ArtifactRef], store: Store
) -> dict[str, ArtifactRef]:
    """The inputs the stage needs; a model of others that is an artifact is one, so a parent."""
    missing = [role for role in stage.needs(config) if role not in inputs]
    if missing:
        raise ArtifactMissing(f"{stage.name}: input {missing[0]} is missing; give its artifact")
    refs = {role: inputs[role] for role in stage.needs(config)}
    foreign = stage.foreign(config)
    if foreign is not None and foreign.is_artifact:
        refs["base"] = store.resolve(foreign.place)
    return refs
