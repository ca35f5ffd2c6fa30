"""The command `rlhf compare-runs`: what two runs differ in, and what came of it."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter, validators
from rich.console import Group
from rich.rule import Rule
from rich.table import Table

from flows.artifacts import ConfigOption, StoreOption
from flows.models import check_file, excerpt, write_page
from flows.run_lookup import open_for_run
from rlhf.errors import ConfigError
from rlhf.plain_text import one_line
from rlhf.report.text import figure
from tasks.console import console, say, styled
from tasks.listing import show_json

if TYPE_CHECKING:
    from rlhf.report.two_runs import Difference, Metric, PairedReplies, TwoRuns
    from rlhf.store import Store
    from tasks.evaluations import StoredReport


def compare_runs(
    a: str, b: str, *,
    n: Annotated[int, Parameter(validator=validators.Number(gte=0, lte=100_000))] = 3,
    html: Annotated[Path | None, Parameter(help="File of a page to write.")] = None,
    json: bool = False, work_dir: Path | None = None, store: StoreOption = None,
    config: ConfigOption = None,
) -> None:  # fmt: skip
    """Show what two runs differ in: configuration, metrics, replies to the same prompts.

    Nothing is sampled or scored anew; `rlhf compare` does that with any two policies.

    Parameters
    ----------
    a
        A run's name, or how it begins, or its report's digest.
    b
        Likewise.
    n
        Most prompts whose replies are shown.
    json
        Print JSON, with all replies.
    work_dir
        Work folder with the records of this machine's runs; as configured by default.
    """
    from rlhf.report.two_runs import gain_sentence, render_two_runs

    check_file("--html", html)
    found = _compare(a, b, store, config, work_dir)
    if html is not None:
        write_page("--html", html, render_two_runs(found))
    if json:
        show_json(found.as_json())
        return
    for side, run in (("a", found.a), ("b", found.b)):
        say(f"{side}: {run.run_name}, started {run.started}, {run.outcome}: {run.reason}")
    if found.differences:
        console.print(_configuration(found.differences))
    else:
        say("the configurations do not differ, but for folders and machines")
    if found.metrics:
        console.print(_metrics(found.metrics))
    for each in found.replies[:n]:
        console.print(_replies(each))
    if len(found.replies) > n:
        say(f"{len(found.replies):,} prompts were answered by both: --n or --json shows all")
    for note in found.notes:
        say(f"note: {note}")
    if sentence := gain_sentence(found):
        say(sentence)
    if html is not None:
        say(f"page: {html.resolve()}")


def _compare(
    a: str, b: str, store: str | None, config: Path | None, work_dir: Path | None
) -> TwoRuns:  # fmt: skip
    """Read both runs, which may be in different stores, and compare them."""
    from rlhf.report.replies import SCORERS
    from rlhf.report.two_runs import side_by_side
    from tasks.evaluations import evaluation_of, find_report

    stores: list[Store] = []
    reports: list[StoredReport] = []
    for text in (a, b):
        opened, name = open_for_run(text, store, config, work_dir)
        stores.append(opened)
        reports.append(find_report(name, opened))
    if reports[0].ref.digest == reports[1].ref.digest:
        raise ConfigError(f"{a} and {b} are the same run; give two")
    evaluations = [evaluation_of(*each) for each in zip(reports, stores, strict=True)]
    first, second = evaluations
    samples, common = None, []
    if first is not None and second is not None:
        samples = first.samples, second.samples
        # The gold score is no model: it is the same where both have it.
        roles = {"reward": "reward-model", "judge": "judge", "gold": None}
        common = [
            name
            for name in SCORERS
            if (role := roles[name]) is None
            or ((first.parents or {}).get(role) == (second.parents or {}).get(role) is not None)
        ]
        common = [name for name in common if _is_scored(name, samples)]
    return side_by_side(reports[0].report, reports[1].report, samples, common)


def _is_scored(scorer: str, samples: Sequence[Sequence[dict[str, object]]]) -> bool:
    return all(any(r.get(f"{scorer}_after") is not None for r in rows) for rows in samples)


def _configuration(differences: Sequence[Difference]) -> Table:
    table = Table("field", "a", "b", title="configuration", title_justify="left")
    for column in table.columns:
        column.overflow = "fold"
    for each in differences:
        cells = (one_line(value) if value is not None else "–" for value in (each.a, each.b))
        table.add_row(one_line(each.key), *cells)
    return table


def _metrics(metrics: Sequence[Metric]) -> Table:
    table = Table(title="metrics, with 95 % intervals", title_justify="left")
    table.add_column("metric", overflow="fold")
    for name in ("a", "b"):
        table.add_column(name, justify="right", no_wrap=True)
    for metric in metrics:
        cells = (metric.shown(side) for side in ("a", "b"))
        table.add_row(
            metric.name.replace("sampled.", ""),
            *(f"{value}{f' ({spread})' if spread else ''}" for value, spread in cells),
        )
    return table


def _replies(each: PairedReplies) -> Group:
    head = "" if each.difference is None else f"b against a {figure(each.difference, '+.3g')}"
    scores = [_scores(each, place) for place in (0, 1)]
    table = Table(f"a  {scores[0]}", f"b  {scores[1]}", expand=True, box=None, padding=(0, 2, 0, 0))
    for column in table.columns:
        column.ratio, column.overflow = 1, "fold"
    table.add_row(excerpt(each.a), excerpt(each.b))
    prompt = styled((excerpt(each.prompt), "bold"))
    return Group(Rule(head, align="left", style="dim"), prompt, table)


def _scores(each: PairedReplies, place: int) -> str:
    known = ((name, pair[place]) for name, pair in each.scores.items())
    return "  ".join(f"{name} {figure(value, '.3g')}" for name, value in known if value is not None)
