"""The commands `rlhf config`: a configuration's values, and the metrics that gates may name."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import takewhile
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import App, Parameter
from rich.padding import Padding
from rich.table import Table

from flows.preflight import Overrides
from rlhf.config import LoadedConfig, load_config
from rlhf.config.fields import canonical, flatten, meaning_of, nearest
from rlhf.errors import ConfigError
from rlhf.files import is_file
from rlhf.plain_text import one_line
from tasks.console import PlainConsole, console, say, styled
from tasks.listing import show_json

if TYPE_CHECKING:
    from rlhf.config.metric_meanings import MetricMeaning

app = App(name="config", help="Look at configurations.")

#: Columns from which the meanings have a column of their own.
WIDE = 140
FilterOption = Annotated[
    str | None, Parameter(help="Only rows whose name holds this text, or else their meaning.")
]


@app.command
def show(
    config: Path | None = None, *overrides: Overrides, filter: FilterOption = None,
    explain: bool = False, json: bool = False,
) -> None:  # fmt: skip
    """Print the effective values, where each came from, and what it means.

    A word behind the preset filters too: rlhf config show configs/lora.yaml ppo.

    Parameters
    ----------
    config
        YAML preset; none shows the defaults.
    explain
        Print the meaning of each field below it; on a terminal of 140 columns it stands beside.
    json
        Print JSON.
    """
    config, words, options = _parted(config, overrides)
    if filter is not None:
        words.append(filter)
    loaded = load_config(config, options)
    warn(loaded)
    rows = _rows(loaded, words)
    if json:
        values = dict(flatten(loaded.config.model_dump(mode="json")))
        found = [
            {"field": key, "value": values[key], "from": source, "meaning": meaning}
            for key, _, source, meaning in rows
        ]
        show_json(found)
    elif explain and console.width < WIDE:
        for key, value, source, meaning in rows:
            line = f"{one_line(key)} = {one_line(value)}  ({one_line(source)})"
            console.print(styled((line, "" if source.endswith("default") else "bold")))
            console.print(Padding(styled((one_line(meaning), "dim")), (0, 0, 0, 4)))
    else:
        console.print(_config_table(rows))


@app.command
def metrics(
    filter: FilterOption = None, /, *, gate: Literal["policy", "reward_model"] | None = None,
    json: bool = False,
) -> None:  # fmt: skip
    """List the metrics that the rules of a gate may name, with their meanings.

    Parameters
    ----------
    filter
        Only those whose name or meaning holds this text.
    gate
        Only those of this gate.
    json
        Print JSON.
    """
    from rlhf.config.metric_meanings import END_MEANINGS, metric_meanings

    gates = [gate] if gate else ["reward_model", "policy"]
    text = (filter or "").lower()
    found = [
        each
        for name in gates
        for each in metric_meanings(name)
        if text in each.name.lower() or text in each.meaning.lower()
    ]
    if not found:
        raise ConfigError(
            f"{filter!r}: no metric has that in its name or meaning; try a shorter one"
        )
    if json:
        show_json([each._asdict() for each in found])
        return
    for name in gates:
        if own := [each for each in found if each.gate == name]:
            console.print(_metrics_table(name, own, is_short=not text))
    ends = ", ".join(f"{end} {words}" for end, words in END_MEANINGS.items())
    say("±: has an interval, so that a rule may say `on: low` or `on: high`; beside it are")
    say(f"   {ends}")
    say("*: a name that the data give; _after is of the policy, _before of the other one; rules of")
    say("   gates: docs/gates.md; all names of a part: rlhf config metrics <part>")


def warn(loaded: LoadedConfig) -> None:
    """Print a warning for each of the user's values outside of its advised range."""
    for line in loaded.advice():
        say(f"warning: {line}", "yellow", on=PlainConsole(stderr=True))


def _metrics_table(gate: str, metrics: Sequence[MetricMeaning], *, is_short: bool) -> Table:
    """Return metrics as a table; the short one names alone the parts that are like another."""
    from rlhf.config.metric_meanings import ALIKE

    table = Table("metric", "meaning [only with]", title=f"gates.{gate}", title_justify="left",
                  box=None, padding=(0, 2, 0, 0))  # fmt: skip
    table.columns[0].no_wrap, table.columns[1].overflow = True, "fold"
    names = {each.name for each in metrics}
    shown: set[str] = set()
    for each in metrics:
        like = ALIKE.get(each.part) if is_short else None
        if each.part not in shown:
            shown.add(each.part)
            heading = each.title if like is None else f"{each.title}: as {like}"
            table.add_row(styled((f"{each.part}.…" if each.part else "", "bold")),
                          styled((heading, "bold")))  # fmt: skip
        sides = [each.name.removesuffix(end) for end in ("_before", "_after")]
        # Both sides of a metric have one row.
        is_second = each.name.endswith("_after") and f"{sides[1]}_before" in names
        if like is None and not (is_short and is_second):
            is_first = is_short and f"{sides[0]}_after" in names and each.name != sides[0]
            mark = " ±" if each.has_interval else ""
            name = f"{sides[0]}_after/_before" if is_first else f"{each.name}{mark}"
            meaning = each.meaning.partition(", of the SFT")[0] if is_first else each.meaning
            needs = f" [{', '.join(each.needs)}]" if each.needs else ""
            table.add_row(name, f"{meaning}{needs}")
    return table


def _parted(
    config: Path | None, overrides: Sequence[str]
) -> tuple[Path | None, list[str], list[str]]:
    """Return the preset, the words that filter, and the overrides, which begin with a dash."""
    words = [*takewhile(lambda token: not token.startswith("-"), overrides)]
    options = [*overrides[len(words) :]]
    if config is not None and not is_file(config) and not config.suffix and len(config.parts) == 1:
        # No file, and no name of one: `rlhf config show ppo`.
        return None, [str(config), *words], options
    return config, words, options


def _rows(loaded: LoadedConfig, words: Sequence[str]) -> list[tuple[str, str, str, str]]:
    """Return (name, value, source, meaning) of the values that hold all words.

    Raises:
        ConfigError: None does.
    """
    rows = [(*row, meaning_of(row[0])) for row in loaded.rows()]
    for word in words:
        text = word.lower()
        kept = [row for row in rows if text in row[0].lower()] or [
            row for row in rows if text in row[3].lower()
        ]
        if not kept:
            close = nearest(word)
            cure = f"did you mean {canonical(close)}?" if close else "give a part of a field's name"
            raise ConfigError(
                one_line(
                    f"{word!r}: no field has that in its name, and no file is called so; {cure}"
                )
            )
        rows = kept
    return rows


def _config_table(rows: Sequence[tuple[str, str, str, str]]) -> Table:
    """Return values and their origins as a table, on a wide terminal with their meanings."""
    is_wide = console.width >= WIDE
    table = Table()
    for name in ("field", "value", "from", *(["meaning"] if is_wide else [])):
        # A truncated name could be mistaken for its neighbour's.
        is_whole = name == "field" or (is_wide and name == "from")
        table.add_column(name, no_wrap=is_whole, overflow="fold")
    for key, value, source, meaning in rows:
        style = "dim" if source.endswith("default") else "bold"
        cells = [*map(one_line, (key, value, source))]
        if is_wide:
            cells.append(one_line(meaning))
        table.add_row(*cells, style=style)
    return table
