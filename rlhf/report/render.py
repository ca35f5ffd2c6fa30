"""Rendering of a report as one self-contained HTML page.

The page has no script and loads nothing: no network, no font. The same report gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from rlhf.report import charts, text, trust_charts
from rlhf.report.costs import cost_view
from rlhf.report.data_card import data_card, drift_charts
from rlhf.report.members import members_view
from rlhf.report.model import OUTCOMES, STATES, ConfigRow, RunReport, StageRow, StageState
from rlhf.report.policy import PARTS, PolicyView, policy_view
from rlhf.report.reward_model import reward_model_view
from rlhf.report.samples import sample_groups, sorted_cards
from rlhf.report.text import duration, number, number_of, percent, percent_range, sentence, words
from rlhf.report.verdicts import verdict_views

MAX_TABLE_ROWS = 60
#: Most characters of the reason in the index of reports.
ABOUT_REASON = 300

DATA_ORDER = (
    ("source", "Source"),
    ("format", "Format"),
    ("rows", "Rows read"),
    ("rows_used", "Rows used"),
    ("rows_merged", "Rows merged with an equal one"),
    ("rows_with_personal_data", "Rows with personal data"),
    ("agreement", "Votes that agree with their pair's majority"),
    ("contradictions", "Pairs that a near duplicate contradicts"),
    ("leaks_left_out", "Pairs left out by the leak check"),
    ("pairs_train", "Pairs to train on"),
    ("pairs_eval", "Pairs held out"),
    ("pairs_judge", "Pairs for a judge"),
    ("prompts_train", "Prompts for PPO"),
    ("prompts_eval", "Prompts held out"),
    ("demonstrations", "Demonstrations"),
    ("chosen_longer", "Chosen reply is the longer one"),
    ("unused_columns", "Columns not used"),
)
#: Shown elsewhere: the reasons in a table of their own, notes, findings and sources as sentences.
DATA_PLACED = {key for key, _ in DATA_ORDER} | {
    "left_out", "pairs_left_out", "rows_left_out", "notes", "findings", "sources", "personal_data"
}  # fmt: skip
NOTHING_STOPPED = "Nothing stopped PPO before its end."
#: Shares, shown in per cent.
DATA_SHARES = ("agreement", "chosen_longer")


def render(report: RunReport) -> str:
    """Render a report as HTML with all of its text escaped."""
    policy = policy_view(report.policy, report.verdicts)
    columns, updates, step = curve_table(report.curves)
    changed, defaults = config_parts(report.config_rows)
    return (
        environment()
        .get_template("page.html")
        .render(
            report=report,
            about=about(report),
            outcome=OUTCOMES[report.outcome],
            tiles=tiles(report),
            lanes=lanes(report.stages),
            data_rows=data_rows(report.data),
            left_out=left_out(report.data),
            data_notes=data_notes(report.data),
            card=data_card(report.card),
            drift=report.drift,
            drift_charts=drift_charts(report.drift),
            model=reward_model_view(report.reward_model),
            members=members_view(report.reward_model),
            verdicts=verdict_views(report.verdicts),
            curves=charts.curves_of(report.curves),
            curve_columns=columns,
            curve_rows=updates,
            curve_step=step,
            frontier=trust_charts.frontier_of(report.watchdog),
            frontier_rows=trust_charts.frontier_rows(report.watchdog),
            watchdog=watchdog_finding(report.watchdog, report.stopped),
            costs=cost_view(report.stages),
            policy=policy,
            policy_heading="Policy",
            policy_shown=policy != PolicyView(),
            parts=PARTS,
            samples=sample_groups(report.samples),
            listed=sorted_cards(report.replies, report.replies_of),
            samples_heading="Sample replies",
            samples_lead="",
            changed=changed,
            defaults=defaults,
            parents=parents(report),
        )
    )


def about(report: RunReport) -> dict[str, str]:
    """Return what the index of the report folder lists of a run; the page holds it as JSON."""
    return {
        "run": report.run_name, "started": report.started, "outcome": str(report.outcome),
        "reason": report.reason[:ABOUT_REASON],
    }  # fmt: skip


class Tile(NamedTuple):
    """One key figure at the top of the page."""

    label: str
    value: str
    note: str
    spread: str = ""


def tiles(report: RunReport) -> list[Tile]:
    """Return the key figures that were measured."""
    figures: list[Tile] = []
    model = report.reward_model or {}
    sampled = _mapping((report.policy or {}).get("sampled"))
    if number_of(model.get("accuracy")) is not None:
        figures.append(_rate_tile("Reward model", "accuracy", model, "accuracy"))
    # With the three answers above them, win rates need no tiles.
    rates = () if report.trust else (("reward", ""), ("the judge", "judge_"), ("gold", "gold_"))
    for scorer, prefix in rates:
        if number_of(sampled.get(f"{prefix}win_rate")) is not None:
            figures.append(
                _rate_tile(f"Wins by {scorer}", "over SFT", sampled, f"{prefix}win_rate")
            )
    # In an overview rewards stand with their values before.
    has_figures = report.overview is not None and bool(report.overview.figures)
    if number_of(sampled.get("reward_after")) is not None and not has_figures:
        before = number(sampled.get("reward_before"))
        figures.append(Tile("Reward", number(sampled["reward_after"]), f"was {before} after SFT"))
    if number_of(sampled.get("kl")) is not None:
        figures.append(Tile("KL", number(sampled["kl"]), "nats from the SFT policy"))
    times = [s.seconds for s in report.stages if number_of(s.seconds) is not None]
    if times:
        cached = sum(stage.state is StageState.CACHED for stage in report.stages)
        note = f"{cached} of {len(report.stages)} from cache" if cached else "all stages together"
        figures.append(Tile("Time", duration(sum(t for t in times if t is not None)), note))
    return figures


def lanes(stages: Sequence[StageRow]) -> list[list[StageRow]]:
    """Split the stages into two lanes after the first gate."""
    for i, stage in enumerate(stages[:-1], start=1):
        if stage.name.startswith("gate-"):
            return [list(stages[:i]), list(stages[i:])]
    return [list(stages)] if stages else []


def data_rows(data: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return labels and values of the data summary, known ones first."""
    known = [(key, label) for key, label in DATA_ORDER if data.get(key) is not None]
    rest = [(key, words(key)) for key in sorted(data) if key not in DATA_PLACED]
    return [
        (label, percent(data[key]) if key in DATA_SHARES else _plain_text(data[key]))
        for key, label in known + rest
    ]


def left_out(data: Mapping[str, Any]) -> list[tuple[str, int]]:
    """Return the reasons for leaving rows out, the most frequent first."""
    counts = [(str(k), int(number_of(v) or 0)) for k, v in _mapping(data.get("left_out")).items()]
    return sorted(counts, key=lambda item: (-item[1], item[0]))


def data_notes(data: Mapping[str, Any]) -> list[str]:
    """Return the sentences on how the source was read."""
    notes = data.get("notes")
    return [_plain_text(note) for note in notes] if isinstance(notes, list) else []


class Finding(NamedTuple):
    """A sentence with an icon."""

    css: str
    headline: str
    evidence: str = ""


def watchdog_finding(watchdog: Mapping[str, Any] | None, budget: str = "") -> Finding | None:
    """Return which checkpoint goes on, and what stopped PPO if anything did.

    Args:
        watchdog: Content of `watchdog.json`.
        budget: Where the run's budget stopped PPO; empty if it did not.
    """
    if not watchdog:
        return None
    chosen, stopped = number_of(watchdog.get("chosen")), _mapping(watchdog.get("stopped"))
    goes_on = "" if chosen is None else f"The policy of update {number(int(chosen))} goes on."
    notes = watchdog.get("notes")
    if isinstance(notes, list) and notes:
        goes_on = " ".join(map(sentence, notes))
    if not stopped:
        found = "The watchdog found no reason to stop." if budget else NOTHING_STOPPED
        return Finding("passed", found, goes_on)
    update = number_of(stopped.get("update"))
    when = "" if update is None else f" after update {number(int(update))}"
    evidence = f"{sentence(stopped.get('evidence'))} {goes_on}".strip()
    detector = words(str(stopped.get("detector") or "unknown"))
    detector = detector.replace("Over optim", "Over-optim")
    detector = detector[:1].lower() + detector[1:]
    return Finding("missed", f"The watchdog stopped PPO{when}: {detector}.", evidence)


def curve_table(rows: Sequence[Mapping[str, Any]]) -> tuple[list[str], list[list[str]], int]:
    """Return the curves' columns, the rows of every n-th update, and n."""
    columns = list(dict.fromkeys(key for row in rows for key in row))
    step = -(-len(rows) // MAX_TABLE_ROWS) or 1
    selected = list(rows[::step])
    if rows and selected[-1] is not rows[-1]:
        selected.append(rows[-1])
    return columns, [[_cell(key, row.get(key)) for key in columns] for row in selected], step


def config_parts(rows: Sequence[ConfigRow]) -> tuple[list[ConfigRow], list[ConfigRow]]:
    """Split the configuration into values that were set and defaults."""
    return [r for r in rows if r.source != "default"], [r for r in rows if r.source == "default"]


def parents(report: RunReport) -> dict[str, list[tuple[str, str]]]:
    """Return each artifact's parents as pairs of digest and kind."""
    kinds = {node.digest: node.kind for node in report.lineage.nodes}
    by_child: dict[str, list[tuple[str, str]]] = {digest: [] for digest in kinds}
    for parent, child in report.lineage.edges:
        by_child.setdefault(child, []).append((parent, kinds.get(parent, "")))
    return by_child


@cache
def environment() -> Environment:
    """Load the templates; unknown names in them are errors."""
    made = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        finalize=text.clean,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    made.filters.update(
        number=text.number,
        exact=text.exact,
        percent=text.percent,
        duration=text.duration,
        moment=text.moment,
        bound=text.bound,
        words=text.words,
        short=text.short,
    )
    made.globals.update(states=STATES, chart=charts, tall=trust_charts.TALL)
    return made


def _rate_tile(label: str, note: str, metrics: Mapping[str, Any], key: str) -> Tile:
    spread = percent_range(metrics.get(f"{key}_low"), metrics.get(f"{key}_high"))
    note = f"{note}, 95\u00a0% interval" if spread else note
    return Tile(label, percent(metrics[key]), note, spread)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}


def _plain_text(value: Any) -> str:
    """Return any value of the data summary as text."""
    if isinstance(value, Mapping):
        return ", ".join(f"{key}: {_plain_text(item)}" for key, item in value.items())
    return str(value) if isinstance(value, str | bool) else number(value)


def _cell(key: str, value: Any) -> str:
    whole = key == "update" and (x := number_of(value)) is not None and x.is_integer()
    return number(int(value) if whole else value)
