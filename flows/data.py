"""The `rlhf data` command: look at preference data before a run."""

from __future__ import annotations

import statistics
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeAlias

from cyclopts import App, Parameter, validators
from rich.table import Table

from rlhf.config import PipelineConfig, load_config
from rlhf.errors import BAD_INPUT, ConfigError, DataError, NoPreferences
from rlhf.plain_text import one_line
from tasks.console import console, say, styled
from tasks.listing import print_listing

if TYPE_CHECKING:
    from rlhf.data.audit import Evidence
    from rlhf.data.mixing import MixedSource
    from rlhf.data.own_rows import OwnRows
    from rlhf.data.partition import Partition
    from rlhf.data.prepare import Reading
    from rlhf.data.prompt_fields import PromptFields
    from rlhf.data.quarantine import Quarantine
    from rlhf.data.rows import Pair, Prompt

    #: What was read of a source of demonstrations or prompts, its notes, and what is left out.
    OwnReading: TypeAlias = tuple[OwnRows[Any], Reading, Quarantine]

app = App(name="data", help="Look at preference data.")

#: Rows that are shown as the model sees them.
SHOWN = 3
#: Most characters of a shown row's prompt and of each reply.
SHOWN_CHARS = 700
#: Settings of sources other than pairs, by the value of --as, and what such rows are.
OWN = {
    "sft": ("sft_source", "demonstrations for SFT"),
    "prompts": ("prompts_source", "prompts for PPO"),
}

Overrides = Annotated[
    str,
    Parameter(
        allow_leading_hyphen=True,
        help="Overrides of the section data, such as --data.format=comparison.",
    ),
]


@app.command
def inspect(
    source: str,
    *overrides: Overrides,
    use: Annotated[Literal["pairs", "sft", "prompts"] | None, Parameter(name="--as")] = None,
    rows: Annotated[int, Parameter(validator=validators.Number(gte=1, lte=10**9))] = 5000,
) -> int:
    """Print a source's format, three rows as the model sees them, and the rows to leave out.

    Sources that --data.sft_source and --data.prompts_source add are shown too.

    The exit code is 2 if a run would stop at these rows.

    Parameters
    ----------
    source
        File, folder, s3:// URI or hub dataset id; a list, as data.source takes it; or a preset
        (.yaml), of which all sources are shown.
    use
        What its rows are: pairs, sft (demonstrations) or prompts. Rows that hold no preferences are
        taken for demonstrations, or else for prompts.
    rows
        Read at most this many rows of each file.
    """
    if source.lower().endswith((".yaml", ".yml")):
        config = load_config(source, overrides).config
        source = f"data.source of {source}"
    else:
        config = load_config(None, [*overrides, f"--data.source={source}"]).config
    if use in OWN:
        is_stopped = _print_own(use, config, rows, _read_alone(use, config, rows))
        return BAD_INPUT if is_stopped else 0
    try:
        parts, fields, is_stopped = _inspect_pairs(source, config, rows)
    except NoPreferences as error:
        if use == "pairs":
            raise
        return BAD_INPUT if _inspect_without_preferences(config, rows, error) else 0
    for name, (setting, _) in OWN.items():
        if getattr(config.data, setting) is not None:
            read = _read_own(name, config, rows, parts, fields)
            is_stopped |= _print_own(name, config, rows, read)
    return BAD_INPUT if is_stopped else 0


def _inspect_pairs(
    source: str, config: PipelineConfig, rows: int
) -> tuple[Partition, PromptFields, bool]:
    """Print what pairs a source holds.

    Returns:
        The pairs, the fields of their prompts, and whether a run would stop.
    """
    from rlhf.data.audit import Evidence, left_out_reasons
    from rlhf.data.ledger import in_a_sentence
    from rlhf.data.partition import partition
    from rlhf.data.prepare import read_pairs
    from rlhf.data.prompt_fields import PromptFields
    from rlhf.data.quarantine import Quarantine

    quarantine = Quarantine(personal_data=config.data.personal_data)
    fields = PromptFields(config.data)
    reading = read_pairs(config.data, config.store_options, quarantine, fields, limit=rows)
    parts = partition(reading.pairs, reading.held_out, config.data, config.seed, reading.note)
    pairs = [*parts.used().once().written()]
    assert reading.sources is not None
    used = reading.ledger.close(reading.sources.leave_out)
    if text := in_a_sentence(reading.ledger.pairs_left_out()):
        reading.note(text)
    reasons = left_out_reasons(quarantine.ordered(), quarantine.examples)
    evidence = Evidence(reading.tallies, reading.totals, reading.rows, reasons)
    _print_format(source, reading, pairs, used, rows)
    is_stopped = _print_left_out(quarantine, reading.rows, reading.sources.all, config)
    is_stopped |= not pairs
    if reading.rows < rows:  # of the beginning of a file nothing follows
        is_stopped |= _print_too_few(parts, reading, quarantine, config)
    if pairs:
        prompts = [pair.prompt for pair in pairs]
        replies = {name: [getattr(p, name) for p in pairs] for name in ("chosen", "rejected")}
        _print_lengths(prompts, replies)
        _print_findings(pairs, evidence)
        for pair in pairs[:SHOWN]:
            _print_row(pair.prompt, {"chosen": pair.chosen, "rejected": pair.rejected})
    return parts, fields, is_stopped


def _read_own(
    use: str, config: PipelineConfig, rows: int, parts: Partition | None, fields: PromptFields
) -> OwnReading:
    """Read demonstrations or prompts as a run does, without those that the pairs forbid."""
    from rlhf.data.demonstrations import read_demonstrations
    from rlhf.data.ledger import Ledger
    from rlhf.data.prepare import Reading
    from rlhf.data.privacy import PersonalData
    from rlhf.data.prompt_source import read_prompts
    from rlhf.data.quarantine import Quarantine

    quarantine = Quarantine(personal_data=config.data.personal_data)
    reading = Reading(Ledger(), personal=PersonalData(config.data))
    train, held_out = (), []
    if parts is not None:
        train = parts.train.written()
        held_out = [*parts.held_out.prompts(), *parts.judge.prompts()]
    common = (config.data, config.store_options, quarantine)
    rest = (held_out, config.seed, reading.note, reading.personal)
    if use == "sft":
        return read_demonstrations(*common, train, *rest, limit=rows), reading, quarantine
    return read_prompts(*common, fields, *rest, limit=rows), reading, quarantine


def _read_alone(use: str, config: PipelineConfig, rows: int) -> OwnReading:
    """Read `data.source` as demonstrations or prompts.

    Raises:
        ConfigError: The section sets columns of pairs, which such a source does not take.
    """
    from rlhf.data.mixing import settings_of_pairs
    from rlhf.data.prompt_fields import PromptFields

    setting, described = OWN[use]
    for name in settings_of_pairs(config.data, setting):
        raise ConfigError(
            f"data.{name} = {getattr(config.data, name)!r}: is a setting of pairs, and not read "
            f"for {described}; write it beside the source: "
            f"rlhf data inspect '{{source: …, {name}: …}}' --as {use}"
        )
    data = config.data.model_copy(update={setting: config.data.source})
    config = config.model_copy(update={"data": data})
    return _read_own(use, config, rows, None, PromptFields(data))


def _inspect_without_preferences(config: PipelineConfig, rows: int, reason: NoPreferences) -> bool:
    """Print a source that holds no preferences as demonstrations, or else as prompts.

    Returns:
        Whether a run would stop.

    Raises:
        NoPreferences: It holds neither.
    """
    for use, (setting, described) in OWN.items():
        try:
            read = _read_alone(use, config, rows)
        except ConfigError:
            continue
        # Without the file and this command, which end the message of a run.
        say(str(reason).rpartition(" (in ")[0], "yellow")
        shown = f"It is shown as {described} (--as {use}); a run reads it by data.{setting}."
        say(shown)
        return _print_own(use, config, rows, read)
    raise reason


def _print_own(use: str, config: PipelineConfig, limit: int, read: OwnReading) -> bool:
    """Print what a source of demonstrations or prompts holds; return whether a run would stop."""
    from rlhf.data.mixing import describe_counts

    own, reading, quarantine = read
    setting, described = OWN[use]
    names = ", ".join(source.name for source in own.sources)
    formats = dict.fromkeys(name for source in own.sources for name in source.formats)
    prompts = [item.prompt for item in own.items]
    counts = [
        f"{len(own.items):,} {described}, from {own.used:,} rows",
        *(describe_counts(own.counts) if len(own.counts) > 1 else ()),
    ]
    console.rule(style="dim")
    name = f"data.{setting} = {names}"
    _print_head(name, own.rows, limit, [*formats], counts, reading, own.unused_columns)
    is_stopped = _print_left_out(quarantine, own.rows, own.sources, config)
    if not own.items:
        say("no row is left to use: a run would stop", "red")
        return True
    _print_lengths(prompts, {"reply": [i.response for i in own.items]} if use == "sft" else {})
    for item in own.items[:SHOWN]:
        fields = {"reference": item.reference} if use == "prompts" and item.reference else {}
        if use == "prompts" and item.metadata:
            fields["metadata"] = ", ".join(f"{k} = {v!r}" for k, v in item.metadata.items())
        _print_row(item.prompt, {"reply": item.response} if use == "sft" else {}, fields)
    return is_stopped


def _print_format(
    source: str, reading: Reading, pairs: Sequence[Pair], used: int, limit: int
) -> None:
    prompts = len({repr(pair.prompt) for pair in pairs})
    counts = [f"{len(pairs):,} pairs of {prompts:,} prompts, from {used:,} rows"]
    unused = reading.unused_columns
    _print_head(source, reading.rows, limit, reading.formats, counts, reading, unused)
    lines: list[str] = []
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
        say(line)


def _print_head(
    name: str, rows: int, limit: int, formats: Sequence[str], counts: Sequence[str],
    reading: Reading, unused: Sequence[str],
) -> None:  # fmt: skip
    """Print how a source was read: rows, format, counts, notes, columns that are not used."""
    begun = f" (the first {limit:,} of each file)" if rows >= limit else ""
    lines = [
        f"{name}: {rows:,} rows{begun}, format {', '.join(formats) or 'unknown'}",
        *counts,
        *reading.notes,
        *reading.personal.notes,
    ]
    if unused:
        lines.append(f"columns not used: {', '.join(unused)}")
    for line in lines:
        say(line)


def _print_left_out(
    quarantine: Quarantine, rows: int, sources: Sequence[MixedSource], config: PipelineConfig
) -> bool:
    """Print a table of the reasons, and whether a run would stop, which is returned."""
    if not quarantine.total:
        return False
    table = Table(title=f"{quarantine.total:,} of {rows:,} rows are left out", title_justify="left")
    table.add_column("rows", justify="right")
    for name in ("reason", "first example", "cure"):
        table.add_column(name, overflow="fold")
    for reason, count in quarantine.ordered():
        origin, example = quarantine.examples[reason]
        position = f"{origin.file}:{origin.line} {example.detail}".strip()
        cells = [f"{count:,}", reason, position, example.shown_cure]
        table.add_row(*map(one_line, cells))
    print_listing(table, table)
    limit = config.data.max_bad_fraction
    is_stopped = False
    for source in sources:
        bad = source.quarantine.bad
        if bad > limit * source.rows:
            is_stopped = True
            which = f"those of {source.name}" if len(sources) > 1 else "them"
            warning = (
                f"{bad:,} of {which} have something wrong, more than data.max_bad_fraction = "
                f"{limit:g} allows: a run would stop"
            )
            say(warning, "red")
    return is_stopped


def _print_too_few(
    parts: Partition, reading: Reading, quarantine: Quarantine, config: PipelineConfig
) -> bool:
    """Print why a run would stop for want of prompts, if it would."""
    from rlhf.data.partition import check_sizes

    left_out, cure = quarantine.in_words(), quarantine.main_cure(reading.rows)
    try:
        check_sizes(parts, bool(reading.held_out), left_out, config.data, cure)
    except DataError as error:
        say(f"a run would stop: {error}", "red")
        return True
    return False


def _print_lengths(prompts: Sequence[Prompt], replies: Mapping[str, Sequence[str]]) -> None:
    from rlhf.data.rows import messages_of

    table = Table(title="Lengths in characters", title_justify="left")
    table.add_column("")
    for name in ("shortest", "median", "longest"):
        table.add_column(name, justify="right")
    lengths = {"prompt": [sum(len(m["content"]) for m in messages_of(p)) for p in prompts]}
    lengths |= {name: [*map(len, texts)] for name, texts in replies.items()}
    for name, values in lengths.items():
        figures = (min(values), round(statistics.median(values)), max(values))
        table.add_row(name, *(f"{figure:,}" for figure in figures))
    print_listing(table, table)


def _print_findings(pairs: Sequence[Pair], evidence: Evidence) -> None:
    """Print what the pairs teach besides quality; languages take too long here."""
    from rlhf.data.audit import audit_pairs
    from rlhf.data.findings import find

    for finding in find(audit_pairs(pairs, evidence, with_languages=False)):
        style = "yellow" if finding.level == "warning" else ""
        say(finding.text, style)
    console.print()


def _print_row(
    prompt: Prompt, replies: Mapping[str, str], fields: Mapping[str, str] | None = None
) -> None:
    """Print a row in the chat template of a model trained from scratch."""
    import jinja2

    from rlhf.data.rendering import END, TEMPLATE
    from rlhf.data.rows import messages_of

    template = jinja2.Environment(autoescape=False).from_string(TEMPLATE)
    rendered = template.render(messages=messages_of(prompt), add_generation_prompt=True)
    styles = {"prompt": "bold", "rejected": "red"}
    texts = {"prompt": rendered, **{name: text + END for name, text in replies.items()}}
    for name, text in {**texts, **(fields or {})}.items():
        style = styles.get(name, "green" if name in replies else "dim")
        shown = text if len(text) <= SHOWN_CHARS else f"{text[:SHOWN_CHARS]}… ({len(text):,})"
        console.print(styled((f"{name:>8}  ", style), shown))
    console.print()
