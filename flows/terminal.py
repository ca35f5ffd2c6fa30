"""Tables, samples and trees that the commands print in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text
from rich.tree import Tree

from rlhf.champions import Promotion, printable_line
from rlhf.config import LoadedConfig, apply_machine_settings
from rlhf.data.rows import QUARANTINE
from rlhf.data.stored import read_summary
from rlhf.files import expand_home, read_json
from rlhf.report import OUTCOMES, STATES
from rlhf.report.reward_model import reward_model_lines
from rlhf.store import Ancestor, Artifact
from tasks.report import drift_lines, first_answers, gate_lines, reward_model_facts
from tasks.stage import store_of
from tasks.stages import EVALUATE_POLICY, EVALUATION, PREPARE_DATA

if TYPE_CHECKING:
    from tasks.report import PipelineRun

#: Colours of the answers on trust, by tone.
ANSWER_STYLES = {"promoted": "green", "kept": "green", "rejected": "yellow"}


def show_run(console: Console, run: PipelineRun) -> None:
    """Print a run's stages, replies side by side, the answers on trust, and the report's path."""
    console.print(_stages(run))
    if PREPARE_DATA.name in run.refs:
        show_data(console, store_of(run.config).fetch(run.refs[PREPARE_DATA.name]))
    for line in drift_lines(run):
        console.print(Text(f"drift: {printable_line(line)}"), soft_wrap=True)
    for line in gate_lines(run):
        console.print(Text(f"gates: {printable_line(line)}"), soft_wrap=True)
    for line in reward_model_facts(run):
        console.print(Text(f"reward model: {printable_line(line)}"), soft_wrap=True)
    if EVALUATE_POLICY.name in run.refs:
        folder = store_of(run.config).fetch(run.refs[EVALUATE_POLICY.name])
        samples = read_json(folder / "samples.json")[: run.config.evaluation.samples]
        console.print(_samples(samples))
    for answer in first_answers(run):
        style = ANSWER_STYLES.get(answer.tone, "")
        console.print(Text(printable_line(answer.line), style), soft_wrap=True)
    console.print(Text(f"{run.outcome}: {run.reason}", OUTCOMES[run.outcome].style))
    tracking = apply_machine_settings(run.config).tracking
    logs = expand_home(tracking.log_dir)
    if "tensorboard" in tracking.trackers and logs.is_dir():
        console.print(Text(f"metrics: tensorboard --logdir {logs}"), soft_wrap=True)
    console.print(Text(f"report: {run.report}"), soft_wrap=True)


def show_data(console: Console, folder: Path) -> None:
    """Print how a dataset's source was read, which rows were left out, and the card's warnings."""
    summary = read_summary(folder)
    lines = [*summary.get("notes", ())]
    if summary.get("unused_columns"):
        lines.append(f"columns not used: {summary['unused_columns']}")
    if summary.get("rows_left_out"):
        lines.append(f"{summary['rows_left_out']}; each with its reason in {QUARANTINE}")
    lines += summary.get("findings", ())
    for line in lines:
        console.print(Text(f"data: {printable_line(line)}"), soft_wrap=True)


def show_reward_model(console: Console, folder: Path) -> None:
    """Print the figures that tell most of a reward model's evaluation."""
    for line in reward_model_lines(read_json(folder / EVALUATION)):
        console.print(Text(f"reward model: {printable_line(line)}"), soft_wrap=True)


def config_table(loaded: LoadedConfig) -> Table:
    """Return all values of a configuration and their origins as a table."""
    table = Table()
    for name in ("field", "value", "from"):
        # A truncated name could be mistaken for its neighbour's.
        table.add_column(name, no_wrap=name == "field", overflow="fold")
    for key, value, source in loaded.rows():
        style = "dim" if source.endswith("default") else "bold"
        table.add_row(Text(key, style), Text(value, style), Text(source, style))
    return table


def artifacts_table(artifacts: Sequence[Artifact], marks: Sequence[tuple[str, str]]) -> Table:
    """Return artifacts as a table, the newest last; `marks` are (digest, remark)."""
    table = Table("artifact", "kind", "stage", "seed", "files", "size", "age", "")
    for ref, manifest, age in sorted(artifacts, key=lambda each: -each.age):
        remark = ", ".join(mark for digest, mark in marks if digest == ref.digest)
        table.add_row(
            ref.short, ref.kind, manifest.producer.stage, str(manifest.producer.seed),
            str(len(manifest.files)), f"{ref.size / 1e6:.2f} MB", _age(age), Text(remark, "bold"),
        )  # fmt: skip
    return table


def champions_table(entries: Sequence[Promotion]) -> Table:
    """Return entries of the champions' histories as a table."""
    table = Table("line", "entry", "", "policy", "verdict", "by", "when", "run", "why")
    for entry in entries:
        verdict = "unapproved" if entry.unapproved else (entry.verdict or "")[:12]
        cells = (
            entry.model, str(entry.number), entry.action, entry.policy[:12], verdict,
            entry.by or "", entry.when or "", entry.run or "", entry.why,
        )  # fmt: skip
        table.add_row(*map(Text, cells))
    return table


def lineage_tree(ancestors: Sequence[Ancestor]) -> Tree:
    """Return an artifact's ancestors as a tree."""
    root = Tree(f"{ancestors[0].ref.short} {ancestors[0].ref.kind}")
    path = [root]
    for depth, role, ref in ancestors[1:]:
        path = path[:depth]
        path.append(path[-1].add(f"{role}: {ref.short} {ref.kind}"))
    return root


def _stages(run: PipelineRun) -> Table:
    table = Table(title=run.name)
    for name in ("stage", "state", "time", "key metric", "artifact"):
        table.add_column(name, no_wrap=name != "key metric")
    for row in run.rows:
        time = "" if row.seconds is None else f"{row.seconds:.1f} s"
        state = Text(row.state, STATES[row.state].style)
        metric = row.metric or row.message
        table.add_row(row.name, state, time, Text(metric), (row.artifact or "")[:10])
    return table


def _samples(samples: Sequence[dict[str, object]]) -> Group:
    panels = []
    for sample in samples:
        table = Table("before (SFT)", "after (PPO)", expand=True, box=None)
        table.columns[0].ratio = table.columns[1].ratio = 1
        table.add_row(Text(str(sample["before"])), Text(str(sample["after"])))
        table.add_row(_scores(sample, "before"), _scores(sample, "after"))
        prompt = Text(str(sample["prompt"]), "bold")
        panels.append(Panel(Group(prompt, table)))
    return Group(*panels)


def _scores(sample: dict[str, object], side: str) -> Text:
    parts = [
        f"{name} {sample[f'{name}_{side}']:.2f}"
        for name in ("reward", "judge", "gold")
        if sample.get(f"{name}_{side}") is not None
    ]
    return Text("  ".join(parts), "dim")


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
