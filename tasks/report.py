"""State of a pipeline run, its HTML report in the store, its Markdown summary."""

from __future__ import annotations

import json
import platform
import shutil
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from rlhf.budget import budget_text
from rlhf.config import LoadedConfig, PipelineConfig, apply_machine_settings
from rlhf.config.pipeline import StoreConfig
from rlhf.costs import Forecast
from rlhf.data.stored import read_card, read_summary
from rlhf.files import expand_home, read_json
from rlhf.gates import NOT_JUDGED, NOT_MEASURED, Check, Verdict, read_verdict
from rlhf.markdown import Markdown, bold, bullets, code, command, escape, paragraphs, table, words
from rlhf.report import (
    Answer,
    ConfigRow,
    Lineage,
    LineageNode,
    Overview,
    RunOutcome,
    RunReport,
    StageRow,
    StageState,
    render,
    trust_answers,
)
from rlhf.report.index import write_index
from rlhf.report.reward_model import reward_model_lines
from rlhf.report.samples import listed_samples, read_samples, shown_samples
from rlhf.report.stored import DATA, KIND
from rlhf.report.stored import PAGE as REPORT
from rlhf.report.text import interval
from rlhf.saved import checked, read_saved
from rlhf.store import ArtifactRef, Store
from rlhf.store.manifest import canonical_json, sha256_bytes
from tasks.board import board
from tasks.drift import DriftCheck
from tasks.gate_check import GateCheck
from tasks.overview import overview_markdown, read_overview
from tasks.prefect_pages import show_page
from tasks.retries import retried
from tasks.run_costs import cost_lines
from tasks.runner import code_version, commit, library_versions, producer
from tasks.stage import Stage, store_of
from tasks.stages import (
    EVALUATE_POLICY,
    EVALUATE_REWARD_MODEL,
    EVALUATION,
    GATE_POLICY,
    GATE_REWARD_MODEL,
    PREPARE_DATA,
    SAMPLES,
    TRAIN_POLICY,
)

_read_rows = partial(read_saved, shape=TypeAdapter(list[dict[str, Any]]))


@dataclass
class PipelineRun:
    """State of a pipeline run, updated stage by stage."""

    config: PipelineConfig
    origins: Mapping[str, str]
    name: str
    started: str
    refs: dict[str, ArtifactRef] = field(default_factory=dict)
    rows: list[StageRow] = field(default_factory=list)
    outcome: RunOutcome = RunOutcome.FAILED
    reason: str = ""
    error: BaseException | None = None
    report: Path | None = None
    advice: tuple[str, ...] = ()
    drift: DriftCheck | None = None
    gates: GateCheck | None = None
    kinds: dict[str, dict[str, Any]] = field(default_factory=dict)
    """What the time of each stage depends on (`tasks.forecast`)."""
    forecasts: dict[str, Forecast] = field(default_factory=dict)
    """What the stages will take if they run, as far as that is known."""
    stopped: str = ""
    """Where the budget stopped PPO, as a sentence."""

    @property
    def all_cached(self) -> bool:
        """True if every stage had a record."""
        return all(row.state == StageState.CACHED for row in self.rows)


def write_report(run: PipelineRun) -> Markdown:
    """Write the report to the report folder and the store, and return its summary.

    Sets `run.report`. A run whose stages were all cached gets the page of the run that it repeats.
    The summary is shown in Prefect's UI too. If the store fails, so that a failed run can't be
    reported from it, the page in the report folder has what is known without.
    """
    try:
        summary = retried(run.config, "writing the report", lambda: _stored_report(run))
    except OSError as error:
        if run.error is None:
            raise
        summary = _report_without_store(run, error)
    if run.report is not None:
        board.note_report(run.report)
        write_index(run.report.parent)
    show_page("report", summary, escape(f"Report of {run.name}"))
    return summary


def drift_lines(run: PipelineRun) -> list[str]:
    """Return what is known of the drift of a run's data, a sentence each."""
    if run.drift is None:
        return []
    figures = [f"against the champion's data: {run.drift.headline}"] if run.drift.headline else []
    return [*figures, *run.drift.drift.notes, *(f"warning: {w}" for w in run.drift.warnings)]


def first_answers(run: PipelineRun) -> tuple[Answer, ...]:
    """Return what a run's first screen answers; nothing if the policy was not evaluated."""
    ref = run.refs.get(EVALUATE_POLICY.name)
    if ref is None:
        return ()
    store = store_of(run.config)
    path = store.fetch(ref) / EVALUATION
    verdicts = {verdict.gate: verdict for verdict in _verdicts(run, store)}
    compares = run.config.gates.champion is not None
    verdict = verdicts.get(GATE_POLICY.name)
    return checked(path, lambda: trust_answers(read_saved(path), verdict, compares))


def run_overview(run: PipelineRun) -> Overview | None:
    """Return a run's figures before and after PPO, and what stands out; None without any."""
    store = store_of(run.config)
    return read_overview(run.config, run.refs, _verdicts(run, store), store)


def reward_model_facts(run: PipelineRun) -> list[str]:
    """Return the figures that tell most of a run's reward model, if it was evaluated."""
    ref = run.refs.get(EVALUATE_REWARD_MODEL.name)
    if ref is None:
        return []
    return reward_model_evaluation(store_of(run.config).fetch(ref))


def reward_model_evaluation(folder: Path) -> list[str]:
    """Return the figures that tell most of a reward model's evaluation.

    Raises:
        DataError: The evaluation is damaged.
    """
    path = folder / EVALUATION
    return checked(path, lambda: reward_model_lines(read_saved(path)))


def run_cost_lines(run: PipelineRun) -> list[str]:
    """Return what a run cost, a sentence each."""
    budget = budget_text(run.config.budget, run.config.costs.currency)
    return cost_lines(run.rows, budget, run.stopped)


def gate_lines(run: PipelineRun) -> list[str]:
    """Return what was known of a run's gates before training, a sentence each."""
    return list(run.gates.lines) if run.gates else []


def _stored_report(run: PipelineRun) -> Markdown:
    """Write the whole report, and return its summary."""
    store = store_of(run.config)
    return _summary(run, _publish(run, store), store)


def _report_without_store(run: PipelineRun, error: OSError) -> Markdown:
    """Write a page with the stages and the reason alone, and return that as a summary."""
    reason = f"{run.reason} (all that the store holds is missing from this report: {error})"
    run.report = _page(run, sha256_bytes(run.name.encode()))
    report = RunReport(**{**_facts(run), "reason": reason})
    run.report.write_text(render(report), encoding="utf-8")
    # An error may hold half of a surrogate pair, which is no UTF-8; JSON writes it out.
    data = json.dumps(report.model_dump(mode="json"), indent=1)
    run.report.with_suffix(".json").write_text(data, encoding="utf-8")
    outcome = words(bold(f"{run.outcome}:"), reason)
    return paragraphs(outcome, words("Report:", code(run.report)))


def _page(run: PipelineRun, key: str) -> Path:
    """Return the path of a report in the report folder, which is made."""
    folder = expand_home(apply_machine_settings(run.config).runtime.report_dir)
    folder.mkdir(parents=True, exist_ok=True)
    return (folder / f"{run.config.name}-{key[:10]}.html").resolve()


def _publish(run: PipelineRun, store: Store) -> str:
    """Publish the report, or find the one of an equal run; return its digest."""
    refs = {name: ref.digest for name, ref in run.refs.items()}
    identity = {"refs": refs, "outcome": run.outcome, "config": run.config.model_dump(mode="json")}
    if run.drift and run.drift.verdict:
        # Of the champion that the data were compared with.
        identity["drift"] = run.drift.verdict.digest
    key = sha256_bytes(canonical_json(identity))
    record = store.history.latest(f"records/report/{key}") if run.all_cached else None
    if record and store.exists(record["digest"]) and store.renew(record["digest"]):
        folder = store.fetch(record["digest"])
        run.report = _page(run, _page_key(key, str(read_json(folder / DATA)["run_name"])))
        _copy_report(folder, run.report)
        return record["digest"]
    run.report = _page(run, _page_key(key, run.name))
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / REPORT
        report = _gather(run, store)
        page.write_text(render(report), encoding="utf-8")
        # For programs; a number that is not finite becomes null.
        (page.parent / DATA).write_text(report.model_dump_json(indent=1), encoding="utf-8")
        ref = store.publish(
            page.parent, KIND, parents=run.refs, metrics={},
            producer=producer("report", {}, run.config.seed),
        )  # fmt: skip
        _copy_report(page.parent, run.report)
    store.history.append(f"records/report/{key}", ref.model_dump(mode="json"))
    return ref.digest


def _page_key(key: str, run: str) -> str:
    """Return what a page is named by: a rejection that is repeated has a page of its own."""
    return sha256_bytes(f"{key} {run}".encode())


def _copy_report(folder: Path, page: Path) -> None:
    """Copy a report's files to its place in the report folder."""
    shutil.copyfile(folder / REPORT, page)
    shutil.copyfile(folder / DATA, page.with_suffix(".json"))


def _gather(run: PipelineRun, store: Store) -> RunReport:
    """Read the report's parts from the artifacts; stages that did not run have none."""

    def part(stage: Stage, file: str, read: Callable[[Path], Any] = read_saved) -> Any:
        ref = run.refs.get(stage.name)
        path = store.fetch(ref) / file if ref else None
        return read(path) if path and path.is_file() else None

    data = store.fetch(run.refs[PREPARE_DATA.name]) if PREPARE_DATA.name in run.refs else None
    samples = part(EVALUATE_POLICY, SAMPLES, read_samples) or []
    return RunReport(
        **_facts(run),
        data=read_summary(data) if data else {},
        card=read_card(data) if data else None,
        reward_model=part(EVALUATE_REWARD_MODEL, "evaluation.json"),
        policy=part(EVALUATE_POLICY, "evaluation.json"),
        watchdog=part(TRAIN_POLICY, "watchdog.json"),
        curves=tuple(part(TRAIN_POLICY, "curve.json", _read_rows) or ()),
        samples=tuple(shown_samples(samples, run.config.evaluation.samples)),
        overview=run_overview(run),
        replies=tuple(listed_samples(samples)),
        replies_of=sum(1 + len(row.get("more") or ()) for row in samples),
        trust=first_answers(run),
        verdicts=tuple(_verdicts(run, store)),
        lineage=_lineage(run, store),
    )


def _facts(run: PipelineRun) -> dict[str, Any]:
    """Return the report's parts that are known without the store."""
    loaded = LoadedConfig(config=run.config, sources=run.origins)
    return {
        "title": run.config.name,
        "run_name": run.name,
        "started": run.started,
        "outcome": run.outcome,
        "reason": run.reason,
        "seed": run.config.seed,
        "stages": tuple(run.rows),
        "advice": run.advice,
        "drift": run.drift.as_json() if run.drift else None,
        "power": tuple(gate_lines(run)),
        "budget": budget_text(run.config.budget, run.config.costs.currency),
        "stopped": run.stopped,
        "config_rows": tuple(ConfigRow(*row) for row in loaded.rows()),
        "versions": {
            "python": platform.python_version(),
            "rlhf-pipeline": code_version(),
            "commit": commit() or "unknown",
            **library_versions(),
        },
    }


def _verdicts(run: PipelineRun, store: Store) -> list[Verdict]:
    """Return the gates' verdicts, also the one in the run's GateRejected error."""
    verdicts = _published_verdicts(run, store)
    rejection: Verdict | None = getattr(run.error, "verdict", None)
    if rejection is not None and rejection.gate not in {verdict.gate for verdict in verdicts}:
        verdicts.append(rejection)
    return verdicts


def _published_verdicts(run: PipelineRun, store: Store) -> list[Verdict]:
    gates = (GATE_REWARD_MODEL.name, GATE_POLICY.name)
    return [read_verdict(store.fetch(run.refs[gate])) for gate in gates if gate in run.refs]


def _lineage(run: PipelineRun, store: Store) -> Lineage:
    nodes, edges = [], []
    for name, ref in run.refs.items():
        nodes.append(LineageNode(digest=ref.digest, kind=ref.kind, stage=name))
        edges += [(parent, ref.digest) for parent in store.manifest(ref).parents.values()]
    return Lineage(nodes=tuple(nodes), edges=tuple(edges))


def _summary(run: PipelineRun, report: str, store: Store) -> Markdown:
    """Return outcome, stages and gates as Markdown, and how to get the report."""
    stages = [
        (row.name, row.state, row.metric or row.message, (row.artifact or "")[:12])
        for row in run.rows
    ]
    checks = [
        (verdict.gate, check.metric,
         f"{check.value:.5g}" if check.value is not None else "missing",
         interval(check.low, check.high), check.bound, _result(check))
        for verdict in _published_verdicts(run, store)
        for check in verdict.checks
    ]  # fmt: skip
    data = run.refs.get(PREPARE_DATA.name)
    findings = read_summary(store.fetch(data)).get("findings", ()) if data else ()
    pull = f"rlhf artifacts pull {report[:12]} report --store {run.config.store}"
    if run.config.store_options != StoreConfig():
        pull += " --config <the configuration of the run>"
    shown = run_overview(run)
    alarm = (bold(f"What stands out: {shown.alarm}, see below."),) if shown and shown.alarm else ()
    return paragraphs(
        words(bold(f"{run.outcome}:"), run.reason, *alarm),
        bullets(answer.line for answer in first_answers(run)),
        overview_markdown(shown),
        table(("stage", "state", "key metric", "artifact"), stages),
        bullets(f"Reward model: {line}" for line in reward_model_facts(run)),
        bullets(f"Data: {finding}" for finding in findings),
        bullets(f"Drift: {line}" for line in drift_lines(run)),
        bullets(f"Gates: {line}" for line in gate_lines(run)),
        bullets(f"Cost: {line}" for line in run_cost_lines(run)),
        table(("gate", "metric", "value", "interval", "needs", "passed"), checks),
        words("Report:", code(run.report), "on the machine that ran this, or"),
        command(pull),
    )


def _result(check: Check) -> str:
    """Return a check's result as text; one that judged nothing has its note."""
    if not check.passed:
        return bold("no")
    return check.note if check.note.startswith((NOT_MEASURED, NOT_JUDGED)) else "yes"
