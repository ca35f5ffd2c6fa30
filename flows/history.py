"""The command `rlhf history`: retrainings of a model line and its champions over the weeks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from cyclopts import Parameter
from rich.table import Table

from flows.artifacts import ConfigOption, StoreOption, open_existing
from flows.models import check_file, write_page
from rlhf.plain_text import one_line
from rlhf.report.history import Entry
from rlhf.report.symptoms import value_of
from rlhf.report.text import duration, figure, figure_range, number
from tasks.console import PlainConsole, console, say, styled
from tasks.listing import show_json

if TYPE_CHECKING:
    from rich.text import Text

#: Least columns of the wide table.
WIDE = 200


def history(
    line: str | None = None, *, wide: bool = False,
    html: Annotated[Path | None, Parameter(help="File of a page with charts to write.")] = None,
    limit: int = 20, json: bool = False, store: StoreOption = None, config: ConfigOption = None,
) -> None:  # fmt: skip
    """Show each retraining, promotion and rollback of a model line, the newest last.

    Parameters
    ----------
    line
        Model line; default: all.
    wide
        Show run, person, time, changes of the data and reasons too, however wide that is.
    limit
        Most entries of each line in the table, the newest.
    json
        Print JSON, with all figures.
    """
    from rlhf.errors import ConfigError
    from tasks.history import read_history

    check_file("--html", html)
    if limit < 1:
        raise ConfigError(f"--limit {limit}: give 1 or more")
    opened = open_existing(store, config)
    entries = read_history(opened, line)
    if html is not None:
        from rlhf.report.history import render_history

        write_page("--html", html, render_history(entries, opened.uri))
    if json:
        rows = [entry.as_json() for entry in entries]
        show_json(rows)
        return
    for name in dict.fromkeys(entry.line for entry in entries):
        own = [entry for entry in entries if entry.line == name]
        shown = own[-limit:]
        earlier = f", the last {limit} of {len(own)}" if len(own) > limit else ""
        say(f"model line {name}{earlier}", "bold")
        if wide:
            PlainConsole(width=max(console.width, WIDE)).print(_wide_table(shown))
        else:
            console.print(_table(shown))
    if not wide:
        say("*: champion now; wins over SFT by the judge (J) or else the reward model (R)", "dim")
        say("--wide shows runs, reasons and what changed in the data; --html a page", "dim")
    if html is not None:
        say(f"page: {html.resolve()}")


def _table(entries: Sequence[Entry]) -> Table:
    """Return the fields that matter, at 80 columns."""
    table = Table(box=None, padding=(0, 1, 0, 0))
    for name in ("when", "outcome", "policy", "wins", "reward", "KL", "EOS", "pairs"):
        is_number = name in ("reward", "KL", "EOS", "pairs")
        table.add_column(name, no_wrap=True, justify="right" if is_number else "left")
    for entry in entries:
        table.add_row(
            one_line(entry.when[:10]), _outcome(entry), _policy(entry, 8), _wins(entry),
            _metric(entry, "reward"), _metric(entry, "kl"), _metric(entry, "eos_rate"),
            _pairs(entry),
        )  # fmt: skip
    return table


def _wide_table(entries: Sequence[Entry]) -> Table:
    table = Table()
    for name in (
        "when", "outcome", "policy", "wins", "over champion", "reward", "KL", "EOS", "tokens",
        "pairs", "time", "run",
    ):  # fmt: skip
        table.add_column(name, no_wrap=True)
    table.add_column("why, and what changed in the data", overflow="fold", min_width=40)
    for entry in entries:
        by = f"by {entry.by}: " if entry.by else ""
        why = [f"{by}{entry.reason}".rstrip(": "), *entry.changes, *entry.drift]
        reward = _metric(entry, "reward")
        if "reward_before" in entry.metrics:
            reward += f" (SFT {_metric(entry, 'reward_before')})"
        table.add_row(
            one_line(entry.when), _outcome(entry), _policy(entry, 12), _wins(entry),
            _share(entry, "champion_win_rate"), reward, _metric(entry, "kl"),
            _metric(entry, "eos_rate"), _metric(entry, "tokens"), _pairs(entry),
            "" if entry.seconds is None else duration(entry.seconds), one_line(entry.run),
            "\n".join(one_line(text) for text in why if text),
        )  # fmt: skip
    return table


def _outcome(entry: Entry) -> Text:
    return styled((one_line(entry.outcome), entry.look.style))


def _policy(entry: Entry, digits: int) -> Text:
    mark = "*" if entry.is_champion else ""
    return styled((f"{one_line(entry.policy or '–')[:digits]}{mark}", "bold" if mark else ""))


def _wins(entry: Entry) -> str:
    scorer, name = entry.wins
    return f"{scorer[:1].upper()} {_share(entry, name)}" if scorer else "–"


def _share(entry: Entry, name: str) -> str:
    low, high = (entry.metrics.get(f"{name}_{end}") for end in ("low", "high"))
    spread = figure_range(low, high, ".2f")
    return figure(entry.metrics.get(name), ".2f") + (f" ({spread})" if spread else "")


def _metric(entry: Entry, name: str) -> str:
    value = value_of(entry.metrics.get(name))
    return "–" if value is None else number(value)


def _pairs(entry: Entry) -> str:
    return figure(entry.metrics.get("pairs"), ",.0f")
