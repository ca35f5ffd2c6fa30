"""Gathers what a run published into one report page, and keeps the page as an artifact too."""

from __future__ import annotations

import platform
import shutil
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from prefect.artifacts import create_markdown_artifact

from flows.summary import summary
from rlhf.config import Loaded, on_this_machine
from rlhf.paths import at_home
from rlhf.report import (
    ConfigRow,
    Lineage,
    LineageNode,
    Rule,
    RunReport,
    Sample,
    Verdict,
    render,
)
from rlhf.stage import read_json
from rlhf.store import Store
from rlhf.store.manifest import canonical_json, sha256_bytes
from tasks.code_version import code_version, commit, library_versions, producer
from tasks.runner import store_of
from tasks.stages import read_verdict

if TYPE_CHECKING:
    from flows.pipeline import PipelineRun

REPORT = "report.html"
DATA = "report.json"


def write_report(run: PipelineRun) -> str:
    """Render the run's report into the report folder and the store; sets `run.report`.

    A run in which nothing ran shows the page that it would repeat. Returns its summary, which
    Prefect's UI shows too.
    """
    about = summary(run, _publish(run))
    create_markdown_artifact(key="report", markdown=about, description=f"Report of {run.name}")
    return about


def _publish(run: PipelineRun) -> str:
    """The report's digest."""
    store = store_of(run.config)
    refs = {name: ref.digest for name, ref in run.refs.items()}
    identity = {"refs": refs, "outcome": run.outcome, "config": run.config.model_dump(mode="json")}
    key = sha256_bytes(canonical_json(identity))
    folder = at_home(on_this_machine(run.config).runtime.report_dir)
    folder.mkdir(parents=True, exist_ok=True)
    run.report = (folder / f"{run.config.name}-{key[:10]}.html").resolve()
    record = store.history.latest(f"records/report/{key}") if run.all_cached else None
    if record and store.exists(record["digest"]):
        shutil.copyfile(store.fetch(record["digest"]) / REPORT, run.report)
        return record["digest"]
    with tempfile.TemporaryDirectory() as scratch:
        page = Path(scratch) / REPORT
        report = gather(run, store)
        page.write_text(render(report), encoding="utf-8")
        # The same for machines; what is no number is null there.
        (page.parent / DATA).write_text(report.model_dump_json(indent=1), encoding="utf-8")
        ref = store.publish(
            page.parent, "report", parents=run.refs, metrics={},
            producer=producer("report", {}, run.config.seed),
        )  # fmt: skip
        shutil.copyfile(page, run.report)
    store.history.append(f"records/report/{key}", ref.model_dump(mode="json"))
    return ref.digest


def gather(run: PipelineRun, store: Store) -> RunReport:
    """Read the parts of the report from the artifacts; a part whose stage did not run stays out."""

    def part(stage: str, file: str) -> Any:
        ref = run.refs.get(stage)
        path = store.fetch(ref) / file if ref else None
        return read_json(path) if path and path.is_file() else None

    samples = part("evaluate-policy", "samples.json") or []
    return RunReport(
        title=run.config.name,
        run_name=run.name,
        started=run.started,
        outcome=run.outcome,  # pyright: ignore[reportArgumentType]
        reason=run.reason,
        seed=run.config.seed,
        stages=tuple(run.rows),
        data=part("prepare-data", "summary.json") or {},
        reward_model=part("evaluate-reward-model", "evaluation.json"),
        policy=part("evaluate-policy", "evaluation.json"),
        curves=tuple(part("train-policy", "curve.json") or ()),
        samples=tuple(_sample(s) for s in samples[: run.config.evaluation.samples]),
        verdicts=tuple(_verdicts(run, store)),
        advice=run.advice,
        config_rows=tuple(ConfigRow(*row) for row in Loaded(run.config, run.origins).rows()),
        lineage=_lineage(run, store),
        versions={
            "python": platform.python_version(),
            "rlhf-pipeline": code_version(),
            "commit": commit() or "unknown",
            **library_versions(),
        },
    )


def _sample(row: dict[str, Any]) -> Sample:
    prompt = row["prompt"]
    if not isinstance(prompt, str):
        prompt = "\n".join(f"{m['role']}: {m['content']}" for m in prompt)
    return Sample(**{**row, "prompt": prompt})


def _verdicts(run: PipelineRun, store: Store) -> list[Verdict]:
    """The gates' verdicts; a rejecting gate has no reference in the run, but left its artifact."""
    verdicts = []
    for name in ("gate-reward-model", "gate-policy"):
        error_verdict = getattr(run.error, "verdict", None)
        if name in run.refs:
            verdict = read_verdict(store.fetch(run.refs[name]))
        elif error_verdict is not None and error_verdict.gate == name:
            verdict = error_verdict
        else:
            continue
        rules = tuple(
            Rule(metric=c.metric, value=c.value, bound=c.bound, passed=c.passed)
            for c in verdict.checks
        )
        verdicts.append(Verdict(gate=name, approved=verdict.approved, rules=rules))
    return verdicts


def _lineage(run: PipelineRun, store: Store) -> Lineage:
    nodes, edges = [], []
    for name, ref in run.refs.items():
        nodes.append(LineageNode(digest=ref.digest, kind=ref.kind, stage=name))
        parents = store.manifest(ref).parents.values()
        edges += [(parent, ref.digest) for parent in parents]
    return Lineage(nodes=tuple(nodes), edges=tuple(edges))
