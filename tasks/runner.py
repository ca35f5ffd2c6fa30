"""Run of one stage, unless a record shows that the same work was done before.

A run fetches the inputs, calls the body, publishes its files and writes a record. Its key is the
stage's fingerprint: name, configuration it depends on, input digests, code and seed. A stage whose
record and artifact exist is not run again by any process, machine or flow run. The versions of
code and libraries, which fingerprints and manifests hold, are here too.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import logging
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from pydantic import TypeAdapter

import rlhf
from rlhf.budget import Spending, is_stopped
from rlhf.config import PipelineConfig, apply_machine_settings
from rlhf.costs import Cost
from rlhf.errors import ArtifactMissing, ConfigError
from rlhf.files import expand_home, file_sha256
from rlhf.meter import Meter
from rlhf.stage import Progress, silent
from rlhf.store import ArtifactRef, Producer, Store
from rlhf.store.manifest import canonical_json, sha256_bytes
from rlhf.store.retention import in_use
from tasks.board import board
from tasks.budget import deadline_of, require_left, stopped_key
from tasks.ledger import Ledger, left_attempts
from tasks.progress import Transfer
from tasks.stage import Stage, StageRun, store_of
from tasks.stages import STAGES, discard_checkpoints

log = logging.getLogger("rlhf.tasks")
#: What a stage alone has spent before.
NOTHING_SPENT = Spending()
_JSON = TypeAdapter(Any)
#: Libraries whose version can change the result of a stage.
LIBRARIES = ("accelerate", "datasets", "peft", "tokenizers", "torch", "transformers", "trl")


@dataclass(frozen=True)
class Outcome:
    """Result of a stage: its artifact, and whether a record of earlier work gave it."""

    stage: str
    ref: ArtifactRef
    cached: bool
    seconds: float
    metrics: Mapping[str, Any]
    cost: Cost | None = None
    """What it took, with earlier attempts; None if a record gave it, or that is not known."""

    @property
    def headline(self) -> str:
        """The most important metrics in one line."""
        parts = [
            (form, [self.metrics.get(name) for name in names])
            for form, *names in STAGES[self.stage].headline
        ]
        return " · ".join(form.format(*values) for form, values in parts if None not in values)


@dataclass(frozen=True)
class Work:
    """A stage and everything that its result depends on; `key` is the fingerprint."""

    stage: Stage
    config: PipelineConfig
    refs: Mapping[str, ArtifactRef]
    settings: Mapping[str, Any]
    key: str

    @property
    def stopped_key(self) -> str | None:
        """The fingerprint under which a result is recorded that the budget stopped."""
        stops = self.stage.stops_at_deadline
        return stopped_key(self.key, self.config) if stops else None

    @property
    def name(self) -> str:
        """Name of the work's local folders: stage and fingerprint."""
        return f"{self.stage.name}-{self.key[:16]}"


def run_stage(
    stage: Stage,
    config: PipelineConfig,
    inputs: Mapping[str, ArtifactRef],
    progress: Progress = silent,
    held: Iterable[ArtifactRef] = (),
    spent: Spending = NOTHING_SPENT,
) -> Outcome:
    """Run a stage, or return its recorded outcome.

    Collections leave its inputs alone meanwhile, and the artifacts `held` for later stages. The
    budget is what the run's other stages have not `spent` of it.

    Raises:
        ArtifactMissing: An input of the stage is not given.
        BudgetSpent: It trains, and nothing of the budget is left.
        RLHFError: An error of the stage's body.
    """
    started = time.monotonic()
    config = apply_machine_settings(config)
    store = store_of(config)
    work = work_of(stage, config, inputs, store)
    work_dir = expand_home(config.runtime.work_dir)
    work_dir.mkdir(parents=True, exist_ok=True)
    checkpoints = work_dir / "checkpoints" / work.name
    with _exclusive(work_dir / f"{work.name}.lock", stage):
        recorded = recorded_outcome(work, store)
        if recorded is not None:
            if left_attempts(work_dir, work.name):
                ledger = Ledger(stage, work.key, work.name, config, store, work_dir)
                ledger.settle(recorded.ref.digest, whole=not is_stopped(recorded.metrics))
            if not is_stopped(recorded.metrics):
                discard_checkpoints(store, checkpoints)  # left by a try that was killed
            return recorded
        ledger = Ledger(stage, work.key, work.name, config, store, work_dir)
        earlier = ledger.earlier()
        require_left(stage, config, spent)
        deadline = deadline_of(ledger, spent, earlier)
        for scratch in work_dir.glob(f"{work.name}-*"):
            shutil.rmtree(scratch)  # left by a killed try; this process holds the lock
        provenance = producer(stage.name, work.settings, config.seed)
        with (
            ledger.attempt() as meter,
            used(work, store, held),
            tempfile.TemporaryDirectory(dir=work_dir, prefix=f"{work.name}-") as scratch,
        ):
            out = Path(scratch, "out")
            out.mkdir()
            folders = _fetch_inputs(work, store, Path(scratch, "base"))
            run = StageRun(
                config, work.refs, folders, out, checkpoints, store, provenance,
                _counted(meter, progress), deadline,
            )  # fmt: skip
            result = stage.body(run)
            ref = store.publish(
                out, stage.kind, parents=work.refs, producer=provenance, metrics=result.metrics,
                listener=Transfer(f"{stage.name}: publishing"),
            )  # fmt: skip
            is_whole = not is_stopped(result.metrics)
            key = work.key if is_whole else work.stopped_key or work.key
            store.history.append(_record_name(stage, key), ref.model_dump(mode="json"))
        cost = ledger.conclude(ref.digest, earlier, whole=is_whole)
        if is_whole:  # else a run with a larger budget goes on from them
            discard_checkpoints(store, checkpoints)
    return Outcome(stage.name, ref, False, time.monotonic() - started, result.metrics, cost)


@contextmanager
def used(work: Work, store: Store, held: Iterable[ArtifactRef] = ()) -> Iterator[None]:
    """Keep a work's inputs, and what is held for later stages, from collections until it is done.

    If it fails they stay for as long as its checkpoints, so that it can go on.
    """
    refs = {ref.digest: ref for ref in (*work.refs.values(), *held)}.values()
    for ref in refs:
        store.renew(ref)  # one that is gone is reported when it is read
    with in_use(store.history, f"{work.stage.name}/{work.key}", refs):
        yield


def work_of(
    stage: Stage, config: PipelineConfig, inputs: Mapping[str, ArtifactRef], store: Store
) -> Work:
    """Return a stage's work; reads the state of data and models outside of the store.

    Raises:
        ArtifactMissing: An input of the stage is not given.
    """
    needed = stage.needed_inputs(config)
    for role in needed:
        if role not in inputs:
            raise ArtifactMissing(f"{stage.name}: input {role} is missing; give its artifact")
    refs = {role: inputs[role] for role in (*needed, *stage.optional) if role in inputs}
    external = stage.external_model(config)
    if external is not None and external.is_artifact:
        # As an input it becomes a parent of the result, and is fetched like the others.
        refs["base"] = store.resolve(external.uri)
    settings = _settings(stage, config)
    return Work(stage, config, refs, settings, fingerprint(stage, config, refs, settings))


def fingerprint(
    stage: Stage,
    config: PipelineConfig,
    inputs: Mapping[str, ArtifactRef],
    settings: Mapping[str, Any] | None = None,
) -> str:
    """Return the identity of a stage's work, equal for equal work on any machine."""
    identity = {
        "stage": stage.name,
        "config": _settings(stage, config) if settings is None else settings,
        "inputs": {role: ref.digest for role, ref in inputs.items()},
        "code": code_version(),
        "seed": config.seed,
    }
    if stage.source_digest is not None:
        identity["source"] = stage.source_digest(config)
    external = stage.external_model(config)
    if external is not None and "base" not in inputs:
        identity["base"] = external.digest()
    return sha256_bytes(canonical_json(identity))


def recorded_outcome(work: Work, store: Store) -> Outcome | None:
    """Return the recorded result of the same work on any machine, or None."""
    started = time.monotonic()
    ref = recorded_ref(store, work.stage, work.key)
    if ref is None and work.stopped_key is not None:
        ref = recorded_ref(store, work.stage, work.stopped_key)
    if ref is None or not work.stage.holds(work.config, work.refs, store):
        return None
    metrics = store.manifest(ref).metrics
    return Outcome(work.stage.name, ref, True, time.monotonic() - started, metrics)


def recorded_ref(store: Store, stage: Stage, key: str) -> ArtifactRef | None:
    """Return the artifact that a record names, if the store still has it whole."""
    record = store.history.latest(_record_name(stage, key))
    if record is None:
        return None
    ref = ArtifactRef.model_validate(record)
    return ref if store.exists(ref) and store.renew(ref) else None


def find_inputs(
    stage: Stage, config: PipelineConfig, given: Mapping[str, ArtifactRef],
    *, optional: bool = True,
) -> dict[str, ArtifactRef]:  # fmt: skip
    """Return the inputs of a stage that runs alone: as given, else as recorded.

    Args:
        stage: The stage.
        config: Configuration of the run.
        given: Inputs by role.
        optional: Whether to find optional inputs too; a pipeline that has found them for a stage on
            another machine gives them all.

    Raises:
        ArtifactMissing: An earlier stage has no record.
        ConfigError: A given role is none of the stage's, or its artifact of another kind.
    """
    needed = stage.needed_inputs(config)
    kinds = {role: STAGES[maker].kind for role, maker in needed.items()} | {**stage.optional}
    for role, ref in given.items():
        if role not in kinds:
            raise ConfigError(
                f"--input {role}: no input of {stage.name}, which takes "
                f"{', '.join(kinds) or 'none'}"
            )
        if ref.kind != kinds[role]:
            maker = f", as {needed[role]} makes it" if role in needed else ""
            raise ConfigError(
                f"--input {role}: {ref.short} is of kind {ref.kind}; give one of kind "
                f"{kinds[role]}{maker}"
            )
    store = store_of(config)
    inputs = dict(given)
    for role, maker in needed.items():
        if role not in inputs:
            label = f"{stage.name}: {role}"
            inputs[role] = _recorded_result(STAGES[maker], config, store, given, label)
    if optional and not stage.optional.keys() & given.keys():
        inputs |= stage.find_optional(config, inputs, store)
    return inputs


def producer(stage: str, config: Mapping[str, Any], seed: int) -> Producer:
    """Return a manifest's record of an artifact's origin: stage, settings, code."""
    return Producer(
        stage=stage,
        code_version=code_version(),
        dirty=commit().endswith("-dirty") if commit() else None,
        config=dict(config),
        lock_digest=lock_digest(),
        seed=seed,
        versions=library_versions(),
    )


@cache
def code_version() -> str:
    """Return a hash of the library's sources, equal for equal code, committed or not.

    `rlhf/report` is left out: it shows results, and must not cause training to run again.
    """
    root = Path(rlhf.__file__).parent
    digest = hashlib.sha256()
    for path in sorted([*root.rglob("*.py"), *root.rglob("*.yaml")]):
        if path.relative_to(root).parts[0] != "report":
            digest.update(str(path.relative_to(root)).encode() + b"\0" + path.read_bytes())
    return f"{rlhf.__version__}+{digest.hexdigest()[:16]}"


@cache
def library_versions() -> dict[str, str]:
    """Return the installed versions of `LIBRARIES`."""
    return {name: importlib.metadata.version(name) for name in LIBRARIES}


@cache
def lock_digest() -> str | None:
    """Return the sha256 of the checkout's constraints.txt; None outside of a checkout."""
    path = Path(rlhf.__file__).parent.parent / "constraints.txt"
    return file_sha256(path) if path.is_file() else None


@cache
def commit() -> str:
    """Return the checkout's commit, `-dirty` if changed; empty outside of a checkout."""
    root = Path(rlhf.__file__).parent.parent
    try:
        return subprocess.run(
            ["git", "describe", "--always", "--dirty"],
            cwd=root,
            capture_output=True,
            text=True,
            check=True,
            timeout=10,
        ).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


def _fetch_inputs(work: Work, store: Store, base: Path) -> dict[str, Path]:
    """Fetch a stage's inputs, an external model to `base`; return their folders by role."""
    folders = {
        role: store.fetch(ref, listener=Transfer(f"{work.stage.name}: fetching {role}"))
        for role, ref in work.refs.items()
    }
    external = work.stage.external_model(work.config)
    if external is not None and "base" not in folders:
        folders["base"] = external.fetch(base).folder
    return folders


def _counted(meter: Meter, progress: Progress) -> Progress:
    """Return a listener that notes the steps that are done, and passes them on."""

    def listen(step: int, total: int, metrics: Mapping[str, float]) -> None:
        meter.steps = max(step, meter.steps)
        progress(step, total, metrics)

    return listen


@contextmanager
def _exclusive(path: Path, stage: Stage) -> Iterator[None]:
    """Hold a file lock, for which a second run of the same work waits."""
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        what = f"{stage.name}: another process is at this very work; waiting for it"
        log.info("%s", what)
        with board.waiting(what):
            lock.acquire()
    try:
        yield
    finally:
        lock.release()


def _settings(stage: Stage, config: PipelineConfig) -> Mapping[str, Any]:
    """Return the configuration that a stage depends on, as JSON values."""
    return _JSON.dump_python(dict(stage.depends_on(config)), mode="json")


def _record_name(stage: Stage, key: str) -> str:
    return f"records/{stage.name}/{key}"


def _recorded_result(
    stage: Stage,
    config: PipelineConfig,
    store: Store,
    given: Mapping[str, ArtifactRef],
    label: str,
) -> ArtifactRef:
    """Return a stage's recorded artifact, with its inputs found in the same way.

    Args:
        stage: The stage that makes it.
        config: Configuration of the run.
        store: Where the records are.
        given: Artifacts by role that take the place of recorded ones.
        label: Stage and role that need it, for the error message.
    """
    inputs = {
        role: given.get(role) or _recorded_result(STAGES[maker], config, store, given, label)
        for role, maker in stage.needed_inputs(config).items()
    }
    inputs |= stage.find_optional(config, inputs, store)
    outcome = recorded_outcome(work_of(stage, config, inputs, store), store)
    if outcome is None:
        raise ArtifactMissing(
            f"{label} is missing: {stage.name} has not run with this configuration; run "
            f"`rlhf stage {stage.name}` first, or give --input <role>=<artifact>"
        )
    return outcome.ref
