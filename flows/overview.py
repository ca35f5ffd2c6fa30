"""The command `rlhf show`: the overview of a finished run."""

from __future__ import annotations

from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flows.artifacts import ConfigOption, StoreOption, open_existing
from flows.run_lookup import read_pull
from flows.runs import duration, find_run, read_run, records_folder
from rlhf.config import PipelineConfig, apply_machine_settings
from rlhf.errors import ArtifactMissing
from rlhf.files import exists, expand_home, is_file
from rlhf.plain_text import one_line
from rlhf.store.manifest import is_digest_prefix
from tasks.console import console, say, styled
from tasks.listing import show_json
from tasks.prefect_server import check_settings, prefect_server
from tasks.run_record import RunRecord, find_record, no_such_run, read_records

if TYPE_CHECKING:
    from rlhf.report.stored_overview import OverviewParts

DATA = "report.json"
#: Name, outcome and reason of the run, where a report was asked for.
_NO_RUN = ("", "", "")


def show(
    run: str = "", *, json: bool = False, work_dir: Path | None = None,
    store: StoreOption = None, config: ConfigOption = None,
) -> None:  # fmt: skip
    """Show a finished run: outcome, figures before and after PPO, and what to change next.

    Parameters
    ----------
    run
        Its name, or how it begins; the name or path of its report; the digest of its stored report;
        of a run on Prefect's server its id too. Default: this machine's newest run.
    json
        Print it as JSON, and nothing else.
    work_dir
        Work folder with the records of this machine's runs; as configured by default.
    """
    from rlhf.report.stored_overview import read_report

    path, asked = _find(run, records_folder(work_dir), store, config)
    report = read_report(path)
    name, note = asked[0] or report.run_name, _not_its_own(report, *asked)
    page = path.with_suffix(".html")
    where = str(page if page.is_file() else path)
    if json:
        facts = {"run": name, **_facts(report, where), "note": note}
        show_json(facts)
        return
    if note:
        say(note, "yellow")
    _print(report, where)


def _not_its_own(report: OverviewParts, name: str, outcome: str, reason: str) -> str:
    """Return whose report it is, in one line, if it is not of the run that was asked for.

    Runs of the same artifacts, configuration and outcome have one page, which the last one wrote.

    Raises:
        ArtifactMissing: It is that of a run with another outcome.
    """
    other = report.run_name
    if name in ("", other):
        return ""
    if outcome not in ("", report.outcome):
        raise ArtifactMissing(
            one_line(
                f"{name}: no report to show: the run ended as {outcome}, and its page is now that "
                f"of {other}, which ended as {report.outcome}; rlhf show {other}"
            )
        )
    is_other = reason not in ("", one_line(report.reason))
    own = f"; its own reason: {reason}" if is_other else ""
    return one_line(f"{name} has the same result as {other}, whose report this is{own}")


def _facts(report: OverviewParts, page: str) -> dict[str, Any]:
    """Return what is shown as JSON values."""
    facts = report.model_dump(mode="json", exclude={"trust", "overview"})
    shown = report.model_dump(mode="json", include={"overview"})["overview"] or {}
    answers = [answer._asdict() for answer in report.trust]
    return {**facts, "seconds": report.seconds, "answers": answers, **shown, "page": page}


def _print(report: OverviewParts, page: str) -> None:
    from flows.terminal import show_answers, show_overview
    from rlhf.report import outcome_style

    shown = report.overview
    alarm = f", {shown.alarm}" if shown and shown.alarm else ""
    style = outcome_style(report.outcome, shown)
    outcome = (f"  {report.outcome}{alarm}", style)
    console.print(styled((one_line(report.run_name), "bold"), outcome))
    console.print(one_line(report.reason))
    say(f"started {_local(report.started)}, {duration(report.seconds)}, seed {report.seed}")
    if shown is not None:
        show_overview(console, shown)
    show_answers(console, report.trust)
    say(f"report: {page}")


def _local(moment: str) -> str:
    try:
        return datetime.fromisoformat(moment).astimezone().strftime("%Y-%m-%d %H:%M")
    except ValueError:
        return moment


def _find(
    text: str, folder: Path, store: str | None, config: Path | None
) -> tuple[Path, tuple[str, str, str]]:  # fmt: skip
    """Return the JSON file of the report that a text names; name, outcome and reason of its run.

    They are empty as far as the text names a report, or nothing is known.

    Raises:
        ArtifactMissing: No run is called that, or it has no report.
        ConfigError: Several are, or the server does not answer.
    """
    if text and (file := _file(text)) is not None:
        return file, _NO_RUN
    if store is not None or config is not None or is_digest_prefix(text):
        return _stored(text, store, config), _NO_RUN
    records = read_records(folder)
    record = find_record(records, text) if text else next(iter(records), None)
    if record is not None:
        return _of_record(record), (record.name, record.state, record.reason)
    check_settings()
    from prefect.settings import PREFECT_API_URL

    if text and PREFECT_API_URL.value():
        return _on_server(text)
    raise no_such_run(records, text, folder)


def _file(text: str) -> Path | None:
    """Return the JSON beside a report's page, named by its path or its name in the report folder.

    Raises:
        ArtifactMissing: There is a page, and no JSON beside it.
    """
    given = expand_home(text)
    folder = expand_home(apply_machine_settings(PipelineConfig()).runtime.report_dir)
    places = [given] if given.suffix in (".html", ".json") else [folder / f"{text}.json"]
    for place in places:
        file = place.with_suffix(".json")
        if is_file(file):
            return file
        if exists(place):
            raise ArtifactMissing(
                f"{place}: there is no {file.name} beside it; give the run's name, or the digest "
                "of its stored report"
            )
    return None


def _of_record(record: RunRecord) -> Path:
    if record.report and (file := _file(record.report)) is not None:
        return file
    if not record.is_over:
        how = f"is {record.state}; rlhf watch {record.name}"
    elif record.report:
        how = f"had it at {record.report}, which is gone; run the same command again"
    else:
        how = f"ended as {record.state} without one; run the same command again"
    raise ArtifactMissing(one_line(f"{record.name}: no report to show: the run {how}"))


def _stored(text: str, store: str | None, config: Path | None) -> Path:
    """Return the JSON of a report in a store, named by its digest.

    Raises:
        ArtifactMissing: It is not there, or is something else.
    """
    opened = open_existing(store, config)
    ref = opened.resolve(text)
    if ref.kind != "report":
        raise ArtifactMissing(f"{text}: {ref.short} is of kind {ref.kind}; give a report's digest")
    return opened.fetch(ref, [DATA]) / DATA


def _on_server(text: str) -> tuple[Path, tuple[str, str, str]]:
    """Return the report of a run on Prefect's server, whose summary tells the store, and its name.

    Raises:
        ArtifactMissing: There is no such run, it has no report, or that is not reachable here.
    """
    with prefect_server(text) as client:
        run = find_run(client, text)
        artifacts = read_run(client, run)[2]
    summary = next((str(a.data) for a in artifacts if a.key == "report"), "")
    found = read_pull(run.name, summary)
    if found is None:
        state = run.state.name if run.state else "Unknown"
        raise ArtifactMissing(
            one_line(f"{run.name}: no report to show: the run is {state}; rlhf status {run.name}")
        )
    # A run whose stages were all cached has the stored report of the run that it repeats.
    return _stored(*found, None), (run.name, "", "")
