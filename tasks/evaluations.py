"""Reports and evaluations in a store, found by a run's name, a policy or another artifact."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rlhf.champions import champion, model_lines
from rlhf.errors import ArtifactCorrupt, ArtifactMissing, ConfigError, DataError
from rlhf.files import expand_home, is_file
from rlhf.plain_text import one_line
from rlhf.report.samples import read_samples
from rlhf.report.stored import DATA, KIND, SavedReport, read_report
from rlhf.saved import read_saved
from rlhf.store import Artifact, ArtifactRef, Store
from rlhf.store.manifest import is_digest_prefix
from tasks.stages import EVALUATE_POLICY, EVALUATION, SAMPLES

log = logging.getLogger("rlhf.tasks")
#: Word for the champion of a model line, and the beginning of `champion:<line>`.
CHAMPION = "champion"
#: Names of runs that an error lists.
_NAMED = 5


@dataclass(frozen=True)
class StoredReport:
    """The report of a run, and its artifact."""

    ref: ArtifactRef
    report: SavedReport
    parents: Mapping[str, str]
    """Digests of the run's artifacts by stage."""
    age: float = 0.0


@dataclass(frozen=True)
class StoredEvaluation:
    """The evaluation of a policy: its folder, and whose it is."""

    label: str
    """The name that was given, and what was found by it."""
    folder: Path
    ref: ArtifactRef | None = None
    parents: Mapping[str, str] | None = None
    """Digests of the models of the evaluation, by role."""

    @property
    def samples(self) -> list[dict[str, Any]]:
        """All held-out prompts with the replies of each policy."""
        return read_samples(self.folder / SAMPLES)

    @property
    def figures(self) -> dict[str, Any]:
        """The evaluation's metrics, nested."""
        return read_saved(self.folder / EVALUATION)


def read_reports(store: Store, artifacts: Iterable[Artifact] | None = None) -> list[StoredReport]:
    """Return the reports of a store, the newest run first; damaged ones are left out."""
    found: list[StoredReport] = []
    for ref, manifest, age in artifacts if artifacts is not None else store.list():
        if ref.kind != KIND:
            continue
        try:
            report = read_report(store.fetch(ref, [DATA]))
        except (DataError, ArtifactMissing, ArtifactCorrupt) as error:
            log.info("report %s is left out: %s", ref.short, error)
            continue
        found.append(StoredReport(ref, report, manifest.parents, age))
    return sorted(found, key=lambda each: each.report.started, reverse=True)


def find_report(text: str, store: Store) -> StoredReport:
    """Return the report of a run: by its name, how that begins, or the report's digest.

    A run that went on after a failure has several; the one of most stages is its last.

    Raises:
        ArtifactMissing: No run is called that.
        ConfigError: Several are.
    """
    if is_digest_prefix(text):
        ref = store.resolve(text)
        if ref.kind == KIND:
            report = read_report(store.fetch(ref, [DATA]))
            return StoredReport(ref, report, store.manifest(ref).parents)
    reports = read_reports(store)
    names = [*dict.fromkeys(each.report.run_name for each in reports)]
    matches = [name for name in names if name == text] or [
        name for name in names if text and name.startswith(text)
    ]
    if not matches:
        newest = ", ".join(names[:_NAMED]) or "none"
        raise ArtifactMissing(
            one_line(
                f"{text!r}: no run with a report in {store.uri} is called that; the newest are: "
                f"{newest}; name another store by --store or --config"
            )
        )
    if len(matches) > 1:
        some = ", ".join(matches[:_NAMED])
        raise ConfigError(
            one_line(f"{text!r}: {len(matches)} runs are meant; give more of one: {some}")
        )
    own = [each for each in reports if each.report.run_name == matches[0]]
    return max(own, key=lambda each: (len(each.parents), -each.age))


def find_evaluation(text: str, store: Store) -> StoredEvaluation:
    """Return a policy's evaluation: by its run, its policy, `champion[:<line>]`, or itself.

    Of a policy it is the newest one. A folder may be one that `rlhf compare --out` has written.

    Raises:
        ArtifactMissing: Nothing is called that, or its policy was not evaluated.
        ConfigError: Several runs are, or an artifact of another kind.
    """
    if (own := evaluation_folder(text)) is not None:
        return own
    ref = _artifact(text, store)
    if ref is None:
        found = find_report(text, store)
        return _of_report(found.report.run_name, found, store)
    if ref.kind == KIND:
        return _of_report(text, find_report(ref.digest, store), store)
    if ref.kind == "evaluation":
        return _fetched(f"evaluation {ref.short}", ref, store)
    digest = ref.digest if ref.kind == "policy" else store.manifest(ref).parents.get("policy")
    if digest is None:
        raise ConfigError(
            f"{text}: {ref.short} is of kind {ref.kind}; give a run, a policy or an evaluation"
        )
    newest = sorted(
        (a for a in store.list() if a.ref.kind == "evaluation"), key=lambda each: each.age
    )
    for each, manifest, _ in newest:
        if manifest.parents.get("policy") == digest:
            return _fetched(f"policy {digest[:12]}", each, store)
    raise ArtifactMissing(
        f"{text}: policy {digest[:12]} has no evaluation in {store.uri}; an SFT policy has none; "
        "`rlhf compare` samples two policies anew, and --out keeps all replies"
    )


def evaluation_folder(text: str) -> StoredEvaluation | None:
    """Return the evaluation in a folder, which needs no store; None if it is no such folder."""
    folder = expand_home(text)
    return StoredEvaluation(text, folder) if is_file(folder / SAMPLES) else None


def evaluation_of(found: StoredReport, store: Store) -> StoredEvaluation | None:
    """Return the evaluation of a run's policy; None if the run ended before it."""
    digest = found.parents.get(EVALUATE_POLICY.name)
    if digest is None:
        return None
    return _fetched(found.report.run_name, store.resolve(digest), store)


def _artifact(text: str, store: Store) -> ArtifactRef | None:
    """Return the artifact that a text names; None if it may be a run's name."""
    word, colon, line = text.partition(":")
    if word == CHAMPION:
        return _champion(line if colon else "", text, store)
    if is_digest_prefix(text) or text.startswith("artifact:") or "/manifests/" in text:
        return store.resolve(text)
    pinned = store.pins.find(text)
    return store.resolve(text) if pinned is not None else None


def _champion(line: str, text: str, store: Store) -> ArtifactRef:
    lines = model_lines(store)
    if not line and len(lines) > 1:
        raise ConfigError(
            f"{text}: there are {len(lines)} model lines; give one: "
            + ", ".join(f"{CHAMPION}:{each}" for each in lines[:_NAMED])
        )
    name = line or next(iter(lines), "default")
    entry = champion(store, name) if name in lines else None
    if entry is None:
        known = ", ".join(lines) or "none"
        raise ArtifactMissing(
            f"{text}: {store.uri} has no champion of that line; lines that have: {known}"
        )
    return store.resolve(entry.policy)


def _of_report(name: str, found: StoredReport, store: Store) -> StoredEvaluation:
    evaluation = evaluation_of(found, store)
    if evaluation is None:
        why = f"it ended as {found.report.outcome}: {found.report.reason}".rstrip(": ")
        raise ArtifactMissing(
            one_line(f"{name}: its policy was not evaluated, so that there are no replies ({why})")
        )
    return replace(evaluation, label=name)


def _fetched(label: str, ref: ArtifactRef, store: Store) -> StoredEvaluation:
    manifest = store.manifest(ref)
    if SAMPLES not in {file.path for file in manifest.files}:
        raise ConfigError(
            f"{label}: {ref.short} holds no replies; give the evaluation of a policy, not of a "
            "reward model"
        )
    folder = store.fetch(ref, [EVALUATION, SAMPLES])
    return StoredEvaluation(label, folder, ref, manifest.parents)
