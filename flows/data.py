"""The `rlhf data` command: look at preference data before a run."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated

from cyclopts import App, Parameter
from rich.console import Console
from rich.table import Table
from rich.text import Text

from rlhf.config import PipelineConfig, load_config

if TYPE_CHECKING:
    from rlhf.data.audit import Evidence
    from rlhf.data.prepare import Reading
    from rlhf.data.quarantine import Quarantine
    from rlhf.data.rows import Pair

console = Console()
app = App(name="data", help="Look at preference data.")

#: Exit code for data that a run would stop at, as `flows.cli` has it for all bad input.
BAD_INPUT = 2
#: Pairs that are shown as the model sees them.
SHOWN = 3
#: Most characters of a shown pair's prompt and of each reply.
SHOWN_CHARS = 700

Overrides = Annotated[
    str,
    Parameter(
        allow_leading_hyphen=True,
        help="Overrides of the section data, such as --data.format=comparison.",
    ),
]


@app.command
def inspect(source: str, *overrides: Overrides, rows: int = 5000) -> int:
    """Print a source's format, three pairs as the model sees them, and the rows to leave out.

    The exit code is 2 if a run would stop at these rows.

    Parameters
    ----------
    source
        File, folder, s3:// URI or hub dataset id.
    rows
        Read at most this many rows of each file.
    """
    from rlhf.data.audit import Evidence, left_out_reasons
    from rlhf.data.ledger import in_a_sentence
    from rlhf.data.partition import partition
    from rlhf.data.prepare import read_pairs
    from rlhf.data.prompt_fields import PromptFields
    from rlhf.data.quarantine import Quarantine

    config = load_config(None, [*overrides, f"--data.source={source}"]).config
    quarantine = Quarantine(personal_data=config.data.personal_data)
    fields = PromptFields(config.data)
    reading = read_pairs(config.data, config.store_options, quarantine, fields, limit=rows)
    parts = partition(reading.pairs, reading.held_out, config.data, config.seed, reading.note)
    pairs = [*parts.used().once().written()]
    used = reading.ledger.close(quarantine.add)
    if text := in_a_sentence(reading.ledger.pairs_left_out()):
        reading.note(text)
    reasons = left_out_reasons(quarantine.ordered(), quarantine.examples)
    evidence = Evidence(reading.tallies, reading.totals, reading.rows, reasons)
    _print_format(source, reading, pairs, used, rows)
    would_stop = not pairs
    if quarantine.total:
        would_stop |= _print_left_out(quarantine, reading.rows, config)
    if pairs:
        _print_lengths(pairs)
        _print_findings(pairs, evidence)
        for pair in pairs[:SHOWN]:
            _print_pair(pair)
    return BAD_INPUT if would_stop else 0


def _text(shown: str) -> Text:
    """Return text of a stranger for the terminal: control characters are written out."""
    return Text("".join(c if c.isprintable() or c in "\n\t" else ascii(c)[1:-1] for c in shown))


def _print_format(
    source: str, reading: Reading, pairs: Sequence[Pair], used: int, limit: int
) -> None:
    prompts = len({repr(pair.prompt) for pair in pairs})
    begun = f" (the first {limit:,} of each file)" if reading.rows >= limit else ""
    lines = [
        f"{source}: {reading.rows:,} rows{begun}, format {', '.join(reading.formats) or 'unknown'}",
        f"{len(pairs):,} pairs of {prompts:,} prompts, from {used:,} rows",
        *reading.notes,
        *reading.personal.notes,
    ]
    if reading.unused_columns:
        lines.append(f"columns not used: {', '.join(reading.unused_columns)}")
    if reading.held_out:
        lines.append(f"{len(reading.held_out):,} of the pairs are the source's own held-out part")
    totals = reading.totals
    if totals.merged:
        lines.append(f"{totals.merged:,} rows repeat the pair of another row")
    if totals.agreement not in (None, 1):
        lines.append(
            f"{totals.repeated:,} pairs have several votes, of which {totals.agreement:.0%} agree "
            "with their pair's majority"
        )
    for line in lines:
        console.print(_text(line))


def _print_left_out(quarantine: Quarantine, rows: int, config: PipelineConfig) -> bool:
    """Print a table of the reasons; return whether the stage would stop, which is said."""
    table = Table(title=f"{quarantine.total:,} of {rows:,} rows are left out", title_justify="left")
    table.add_column("rows", justify="right")
    for name in ("reason", "first example", "cure"):
        table.add_column(name, overflow="fold")
    for reason, count in quarantine.ordered():
        origin, example = quarantine.examples[reason]
        position = f"{origin.file}:{origin.line} {example.detail}".strip()
        cells = [f"{count:,}", reason, position, example.shown_cure]
        table.add_row(*(_text(cell) for cell in cells))
    console.print(table)
    limit = config.data.max_bad_fraction
    is_above = quarantine.bad > limit * rows
    if is_above:
        console.print(
            Text(
                f"{quarantine.bad:,} of them have something wrong, more than data.max_bad_fraction "
                f"= {limit:g} allows: a run would stop",
                style="red",
            )
        )
    return is_above


def _print_lengths(pairs: Sequence[Pair]) -> None:
    from rlhf.data.rows import messages_of

    table = Table(title="Lengths in characters", title_justify="left")
    table.add_column("")
    for name in ("shortest", "median", "longest"):
        table.add_column(name, justify="right")
    lengths = {
        "prompt": [sum(len(m["content"]) for m in messages_of(pair.prompt)) for pair in pairs],
        "chosen": [len(pair.chosen) for pair in pairs],
        "rejected": [len(pair.rejected) for pair in pairs],
    }
    for name, values in lengths.items():
        figures = (min(values), round(statistics.median(values)), max(values))
        table.add_row(name, *(f"{figure:,}" for figure in figures))
    console.print(table)


def _print_findings(pairs: Sequence[Pair], evidence: Evidence) -> None:
    """Print what the pairs teach besides quality; languages take too long here."""
    from rlhf.data.audit import audit_pairs
    from rlhf.data.findings import find

    for finding in find(audit_pairs(pairs, evidence, with_languages=False)):
        style = "yellow" if finding.level == "warning" else ""
        console.print(_text(finding.text), style=style)
    console.print()


def _print_pair(pair: Pair) -> None:
    """Print a pair in the chat template of a model trained from scratch."""
    import jinja2

    from rlhf.data.rendering import END, TEMPLATE
    from rlhf.data.rows import messages_of

    template = jinja2.Environment(autoescape=False).from_string(TEMPLATE)
    prompt = template.render(messages=messages_of(pair.prompt), add_generation_prompt=True)
    for name, style, text in (
        ("prompt", "bold", prompt),
        ("chosen", "green", pair.chosen + END),
        ("rejected", "red", pair.rejected + END),
    ):
        shown = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}… ({len(text):,})"
        console.print(Text(f"{name:>8}  ", style=style), _text(shown), sep="")
    console.print()
