"""Tables, samples and trees that the commands print in the terminal."""

from __future__ import annotations

import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.panel import Panel
from rich.table import Table
from rich.tree import Tree

from rlhf.config import PipelineConfig, StoreConfig, apply_machine_settings
from rlhf.data.rows import QUARANTINE
from rlhf.data.stored import read_summary
from rlhf.errors import ArtifactMissing, ConfigError, DataError
from rlhf.files import expand_home
from rlhf.plain_text import one_line
from rlhf.report import GREEN, STATES, Answer, Overview, StageState, outcome_style
from rlhf.report.samples import read_samples
from rlhf.report.text import duration, figure
from rlhf.store import Ancestor
from tasks.console import PlainConsole, say, styled
from tasks.disk import disk_use
from tasks.report import (
    drift_lines,
    first_answers,
    gate_lines,
    reward_model_evaluation,
    reward_model_facts,
    run_cost_lines,
    run_overview,
)
from tasks.stage import store_of
from tasks.stages import (
    EVALUATE_POLICY,
    GATE_POLICY,
    GATE_REWARD_MODEL,
    PREPARE_DATA,
    SAMPLES,
    TRAIN_POLICY,
    TRAIN_SFT,
)

if TYPE_CHECKING:
    from rich.text import Text

    from tasks.report import PipelineRun

#: Colours of the answers on trust, by tone.
ANSWER_STYLES = {"promoted": "green", "kept": "green", "rejected": "yellow"}
SEVERITY_STYLES = {"serious": "bold red", "warning": "yellow"}


def show_run(console: PlainConsole, run: PipelineRun) -> None:
    """Print a run's stages, replies side by side, the answers on trust, and the report's path."""
    if isinstance(run.error, ConfigError | DataError | ArtifactMissing) or not run.refs:
        # `fail` prints the error and its cure, which a table of what did not run would hide.
        say(f"report: {run.report}", on=console)
        return
    console.print(_stages(run))
    if PREPARE_DATA.name in run.refs:
        show_data(console, store_of(run.config).fetch(run.refs[PREPARE_DATA.name]))
    for line in drift_lines(run):
        say(f"drift: {line}", on=console)
    for line in gate_lines(run):
        say(f"gates: {line}", on=console)
    for line in reward_model_facts(run):
        say(f"reward model: {line}", on=console)
    if EVALUATE_POLICY.name in run.refs:
        folder = store_of(run.config).fetch(run.refs[EVALUATE_POLICY.name])
        samples = read_samples(folder / SAMPLES)[: run.config.evaluation.samples]
        console.print(_samples(samples))
    for line in run_cost_lines(run):
        say(f"cost: {line}", on=console)
    shown = run_overview(run)
    if shown is not None:
        show_overview(console, shown)
    show_answers(console, first_answers(run))
    alarm = f" What stands out: {shown.alarm}, see above." if shown and shown.alarm else ""
    # What is no success is printed as an error at the very end, with its cure.
    reason = f": {run.reason}" if run.outcome in GREEN else "."
    say(f"{run.outcome}{reason}{alarm}", outcome_style(run.outcome, shown), on=console)
    tracking = apply_machine_settings(run.config).tracking
    logs = expand_home(tracking.log_dir)
    if "tensorboard" in tracking.trackers and logs.is_dir():
        say(f"metrics: tensorboard --logdir {logs}", on=console)
    say(f"report: {run.report}", on=console)
    for line in _next_steps(run):
        say(line, "bold", on=console)
    use = disk_use(run.config)
    if use.is_large:
        for line in use.lines():
            say(line, on=console)


def show_overview(console: PlainConsole, shown: Overview) -> None:
    """Print figures before and after PPO, and what stands out with what to change next."""
    if shown.figures:
        say(f"SFT → after PPO{f', on {shown.sample}' if shown.sample else ''}:", on=console)
        figures = Table.grid(padding=(0, 2))
        for wraps in (False, False, True):
            figures.add_column(no_wrap=not wraps)
        for figure in shown.figures:
            before, after = figure.texts
            figures.add_row(f"  {figure.label}", f"{before} → {after}", figure.note)
        console.print(figures)
    if not shown.findings:
        return
    say(f"what stands out{f': {shown.alarm}' if shown.alarm else ''}", "bold", on=console)
    findings = Table.grid(padding=(0, 2))
    for finding in shown.findings:
        mark = styled((f"  {finding.severity}", SEVERITY_STYLES.get(finding.severity, "dim")))
        findings.add_row(mark, one_line(finding.text))
        findings.add_row("", styled(("change next: ", "bold"), one_line(finding.cure)))
    console.print(findings)


def show_answers(console: PlainConsole, answers: Sequence[Answer]) -> None:
    """Print the answers on trust, a line each."""
    for answer in answers:
        say(answer.line, ANSWER_STYLES.get(answer.tone, ""), on=console)


def show_data(console: PlainConsole, folder: Path) -> None:
    """Print how a dataset's source was read, which rows were left out, and the card's warnings."""
    summary = read_summary(folder)
    lines = [*summary.get("notes", ())]
    if summary.get("unused_columns"):
        lines.append(f"columns not used: {summary['unused_columns']}")
    if summary.get("rows_left_out"):
        lines.append(f"{summary['rows_left_out']}; each with its reason in {QUARANTINE}")
    lines += summary.get("findings", ())
    for line in lines:
        say(f"data: {line}", on=console)


def show_reward_model(console: PlainConsole, folder: Path) -> None:
    """Print the figures that tell most of a reward model's evaluation."""
    for line in reward_model_evaluation(folder):
        say(f"reward model: {line}", on=console)


def lineage_tree(ancestors: Sequence[Ancestor]) -> Tree:
    """Return an artifact's ancestors as a tree."""
    root = Tree(one_line(f"{ancestors[0].ref.short} {ancestors[0].ref.kind}"))
    path = [root]
    for depth, role, ref in ancestors[1:]:
        path = path[:depth]
        path.append(path[-1].add(one_line(f"{role}: {ref.short} {ref.kind}")))
    return root


def _next_steps(run: PipelineRun) -> Iterator[str]:
    """Yield the commands with which one goes on after a gate has said no."""
    gates = {row.name for row in run.rows if row.state == StageState.GATE_REJECTED}
    is_usual = Path(run.config.store).absolute() == Path(PipelineConfig().store).absolute()
    store = "" if is_usual else f" --store {shlex.quote(run.config.store)}"
    if run.config.store_options != StoreConfig():
        store = " --config <this configuration>"
    if GATE_REWARD_MODEL.name in gates:
        yield (
            "next:   change what stands out above, and run again: finished stages are Cached; or "
            "go on without this gate, as a trial: --gates.reward_model=none"
        )
        if TRAIN_SFT.name in run.refs:
            yield f"        rlhf chat {run.refs[TRAIN_SFT.name].short}{store}    # the SFT policy"
    if GATE_POLICY.name in gates and TRAIN_POLICY.name in run.refs:
        policy = run.refs[TRAIN_POLICY.name].short
        yield f"next:   rlhf samples {policy} --lost{store}    # the replies, worst first"
        yield f"        rlhf chat {policy} --versus sft{store}"
        yield (
            f"        rlhf promote {policy} --unapproved --why '<the reason>' --name "
            f"{run.config.promotion.name}{store}    # make it the champion all the same"
        )


def _stages(run: PipelineRun) -> Group:
    """Return the stages, a line each with its key metric below: at 80 columns all of it is read.

    A failed stage's message is the run's reason, which comes at the end.
    """
    lines: list[Text | Padding] = [styled((one_line(run.name), "bold"))]
    for row in run.rows:
        if row.state == StageState.NOT_RUN:
            continue
        style = STATES[row.state].style
        time = "" if row.seconds is None else duration(row.seconds)
        digest = f"  {row.artifact[:10]}" if row.artifact else ""
        lines.append(styled(f"{row.name:<22} ", (f"{row.state:<16}", style), f"{time:>12}{digest}"))
        if about := row.metric or ("" if row.message in run.reason else row.message):
            lines.append(Padding(styled((one_line(about), "dim")), (0, 0, 0, 2)))
    left = [row.name for row in run.rows if row.state == StageState.NOT_RUN]
    if left:
        lines.append(Padding(styled((f"not run: {', '.join(left)}", "dim")), 0))
    return Group(*lines)


def _samples(samples: Sequence[dict[str, object]]) -> Group:
    panels = []
    for sample in samples:
        table = Table("before (SFT)", "after (PPO)", expand=True, box=None)
        table.columns[0].ratio = table.columns[1].ratio = 1
        table.add_row(str(sample["before"]), str(sample["after"]))
        table.add_row(_scores(sample, "before"), _scores(sample, "after"), style="dim")
        prompt = styled((str(sample["prompt"]), "bold"))
        panels.append(Panel(Group(prompt, table)))
    return Group(*panels)


def _scores(sample: dict[str, object], side: str) -> str:
    parts = [
        f"{name} {figure(sample[f'{name}_{side}'], '.2f')}"
        for name in ("reward", "judge", "gold")
        if sample.get(f"{name}_{side}") is not None
    ]
    return "  ".join(parts)
