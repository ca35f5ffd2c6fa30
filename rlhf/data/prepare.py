"""Stage `prepare-data`: read preference data, quarantine unusable rows, split by prompt."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.audit import Evidence, left_out_reasons
from rlhf.data.card import write_card
from rlhf.data.collect import (
    Collector,
    Ledger,
    Origin,
    Resolved,
    Totals,
    demonstrations,
    exact_key,
)
from rlhf.data.formats import Layout
from rlhf.data.parts import with_layouts
from rlhf.data.privacy import PersonalData
from rlhf.data.prompt_fields import PromptFields
from rlhf.data.quarantine import Quarantine
from rlhf.data.records import LeftOutError, Record
from rlhf.data.rows import (
    DEMONSTRATIONS,
    PAIRS_EVAL,
    PAIRS_TRAIN,
    PROMPTS_EVAL,
    PROMPTS_TRAIN,
    QUARANTINE,
    SUMMARY,
    Pair,
    PromptRow,
    write_rows,
)
from rlhf.data.sources import Part, open_source, source_name
from rlhf.data.split import MIN_PROMPTS, clusters, held_out_clusters, loose_key, position
from rlhf.data.tallies import Tallies
from rlhf.errors import DataError
from rlhf.files import write_json
from rlhf.stage import Progress, StageResult, silent

#: Rows of a dataset by the name of their file.
Parts = dict[str, Sequence[Any]]


@dataclass
class Reading:
    """Pairs of a source, and everything that a user should know of how it was read."""

    pairs: list[Resolved] = field(default_factory=list)
    held_out: list[Resolved] = field(default_factory=list)
    """Pairs of the source's own test part."""
    rows: int = 0
    ledger: Ledger = field(default_factory=Ledger)
    notes: list[str] = field(default_factory=list)
    """Sentences, each once, in the order of the files."""
    formats: list[str] = field(default_factory=list)
    unused_columns: list[str] = field(default_factory=list)
    totals: Totals = field(default_factory=Totals)
    personal: PersonalData = field(default_factory=lambda: PersonalData(DataConfig()))
    tallies: Tallies = field(default_factory=Tallies)

    def note(self, text: str) -> None:
        """Add a sentence unless it is there; a column's name may hold what UTF-8 can't write."""
        text = self.personal.hide(text.encode("utf-8", "backslashreplace").decode())
        if text not in self.notes:
            self.notes.append(text)


def prepare_data(
    config: DataConfig,
    out_dir: Path,
    *,
    seed: int = 0,
    store_options: StoreConfig | None = None,
    progress: Progress = silent,
) -> StageResult:
    """Write a dataset: demonstrations, pairs and prompts, split by prompt; a summary.

    Every row of the source ends in a split or, with its reason, in `quarantine.jsonl`.

    Args:
        config: Source, format, columns, split.
        out_dir: Empty folder for the dataset.
        seed: Seeds the split (and the world, for `source: world`).
        store_options: S3 options, for an s3:// source.
        progress: Called after reading and after writing.

    Raises:
        ConfigError: The source does not exist, or its format is not known.
        DataError: It can't be parsed, too many rows are unusable, or too few prompts are left.
        StoreError: The S3 server of the source can't be reached.
    """
    if config.source == "world":
        parts, evidence = _from_world(config, seed), Evidence()
        summary = _summary(config, parts, {})
    else:
        path = out_dir / QUARANTINE
        try:
            parts, summary, evidence = _from_source(
                config, store_options or StoreConfig(), seed, path, progress
            )
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    for name, part in parts.items():
        write_rows(out_dir / name, part)
    pairs = [
        p if isinstance(p, Pair) else Pair(p.prompt, p.chosen, p.rejected, p.group)
        for p in itertools.chain(parts[PAIRS_TRAIN], parts[PAIRS_EVAL])
    ]
    summary["findings"] = write_card(out_dir, pairs, evidence, summary)
    write_json(out_dir / SUMMARY, summary)
    progress(2, 2, {})
    metrics = {k: v for k, v in summary.items() if not isinstance(v, dict | list)}
    return StageResult(metrics)


def read_pairs(
    config: DataConfig,
    options: StoreConfig,
    quarantine: Quarantine,
    fields: PromptFields,
    limit: int | None = None,
) -> Reading:
    """Read a source's pairs; rows that can't be used go into the quarantine.

    Args:
        config: Source, format, columns.
        options: S3 options.
        quarantine: Receives the rows that are left out.
        fields: Receives references and metadata of the prompts.
        limit: Read at most this many rows of each part.

    Raises:
        ConfigError: The source does not exist, or its format is not known.
        DataError: It can't be parsed, or has no rows.
        StoreError: The S3 server can't be reached, or a transfer broke.
    """
    reading = Reading(personal=PersonalData(config))
    with open_source(config, options, reading.note) as parts:
        for held_out in (False, True):
            collector = Collector(config, reading.ledger, reading.totals)
            for part in parts:
                if part.held_out == held_out:
                    _read_part(part, config, reading, collector, quarantine, fields, limit)
            (reading.held_out if held_out else reading.pairs).extend(collector.resolve())
    if reading.personal.note:
        reading.note(reading.personal.note)
    if not reading.rows:
        raise DataError(f"data.source = {config.source!r}: holds no rows; give a file with pairs")
    return reading


def _read_part(
    part: Part,
    config: DataConfig,
    reading: Reading,
    collector: Collector,
    quarantine: Quarantine,
    fields: PromptFields,
    limit: int | None,
) -> None:
    """Add the pairs of one file."""

    def report(layout: Layout) -> None:
        reading.formats += [layout.name] if layout.name not in reading.formats else []
        for text in layout.notes:
            reading.note(text)
        counted = reading.tallies.set_columns(layout.unused)
        unused = [n for n in layout.unused if n not in _extra_columns(config) and n not in counted]
        names = dict.fromkeys(map(reading.personal.hide, unused))
        reading.unused_columns += [n for n in names if n not in reading.unused_columns]

    for record, layout in with_layouts(part, config, limit, report):
        reading.rows += 1
        origin = Origin(record.file, record.line)
        try:
            _add(record, layout, collector, fields, origin, reading)
        except LeftOutError as reason:
            row = record.text if record.fields is None else record.fields
            quarantine.add(origin, reason, row)


def _add(
    record: Record,
    layout: Layout | None,
    collector: Collector,
    fields: PromptFields,
    origin: Origin,
    reading: Reading,
) -> None:
    if record.fields is None or layout is None:
        raise LeftOutError("row can't be parsed", record.fault, "mend the row")
    converted, row = reading.personal.apply(layout.convert(record.fields), record.fields)
    prompts = {
        exact_key(item.prompt): item.prompt for item in (*converted.comparisons, *converted.rated)
    }
    additions = [fields.read(row, prompt) for prompt in prompts.values()]
    collector.add(converted, origin)
    for add in additions:
        add()
    reading.tallies.add(record.fields, converted)
    for text in converted.notes:
        reading.note(text)


def _extra_columns(config: DataConfig) -> set[str]:
    """Return the columns that rewards use."""
    return {*config.metadata_columns, *filter(None, [config.reference_column])}


def _from_source(
    config: DataConfig, options: StoreConfig, seed: int, path: Path, progress: Progress
) -> tuple[Parts, dict[str, Any], Evidence]:
    fields = PromptFields(config)
    with Quarantine(path, config.personal_data) as quarantine:
        reading = read_pairs(config, options, quarantine, fields)
        progress(1, 2, {"pairs": len(reading.pairs) + len(reading.held_out)})
        train, held_out = _sides(reading, config, seed)
        used = reading.ledger.close(quarantine.add)
        quarantine.check(reading.rows, config.max_bad_fraction, config.source)
    _check_sizes(train, held_out, bool(reading.held_out), quarantine, config)
    parts: Parts = {
        DEMONSTRATIONS: demonstrations(train),
        PAIRS_TRAIN: train,
        PAIRS_EVAL: held_out,
        PROMPTS_TRAIN: _prompts(train, fields),
        PROMPTS_EVAL: _prompts(held_out, fields),
    }
    rows: dict[str, Any] = {
        "format": ", ".join(reading.formats),
        "rows": reading.rows,
        "rows_used": used,
        "rows_merged": reading.totals.merged or None,
        "rows_with_personal_data": reading.personal.rows or None,
        "personal_data": dict(reading.personal.kinds) or None,
        "agreement": reading.totals.agreement,
        "rows_left_out": _left_out_line(quarantine, reading.rows),
        "unused_columns": _joined(reading.unused_columns) or None,
        "notes": reading.notes,
        "left_out": dict(quarantine.ordered()),
    }
    evidence = Evidence(
        reading.tallies, reading.totals, reading.rows,
        left_out_reasons(quarantine.ordered(), quarantine.examples),
    )  # fmt: skip
    summary = _summary(config, parts, {k: v for k, v in rows.items() if v is not None})
    return parts, summary, evidence


def _joined(columns: Sequence[str]) -> str:
    return ", ".join(columns).encode("utf-8", "backslashreplace").decode()


def _left_out_line(quarantine: Quarantine, rows: int) -> str | None:
    if not quarantine.total:
        return None
    return f"{quarantine.total:,} of {rows:,} rows left out ({quarantine.in_words()})"


def _sides(reading: Reading, config: DataConfig, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Return the pairs to train on and those held out; the ledger learns of all others."""
    prompts = {id(i.pair.prompt): i.pair.prompt for i in (*reading.pairs, *reading.held_out)}
    cluster = clusters(prompts.values())
    names_by_id = {number: cluster[loose_key(prompt)] for number, prompt in prompts.items()}

    def of(item: Resolved) -> str:
        return names_by_id[id(item.pair.prompt)]

    pairs, held_out = reading.pairs, reading.held_out
    if held_out:
        names = {of(item) for item in held_out}
        leaked = [item for item in pairs if of(item) in names]
        reason = LeftOutError(
            "prompt is held out", "it, or a turn of its conversation, is in the test part",
            is_choice=True,
        )  # fmt: skip
        _lose(leaked, reason, reading.ledger)
        train = _sample([i for i in pairs if of(i) not in names], config, seed, reading.ledger)
    else:
        pairs = _sample(pairs, config, seed, reading.ledger)
        names = held_out_clusters({of(item) for item in pairs}, config.eval_fraction, seed)
        train = [item for item in pairs if of(item) not in names]
        held_out = [item for item in pairs if of(item) in names]
    for item in (*train, *held_out):
        reading.ledger.use(item.origins)
    return [item.pair for item in train], [item.pair for item in held_out]


def _check_sizes(
    train: list[Pair], held_out: list[Pair], is_own: bool, quarantine: Quarantine,
    config: DataConfig,
) -> None:  # fmt: skip
    """Refuse data with too few prompts on a side."""
    counts = [len({loose_key(pair.prompt) for pair in side}) for side in (train, held_out)]
    if min(counts) >= MIN_PROMPTS:
        return
    total = f"{sum(counts)} different prompts with usable pairs"
    if is_own:
        total = f"{counts[0]} different prompts to train on and {counts[1]} held out"
    raise DataError(
        f"data.source = {config.source!r}: {total} are too few to train on {MIN_PROMPTS} and hold "
        f"out {MIN_PROMPTS}; give more rows (left out: {quarantine.in_words() or 'none'})"
    )


def _sample(pairs: list[Resolved], config: DataConfig, seed: int, ledger: Ledger) -> list[Resolved]:
    """Return at most `max_pairs` of the pairs, chosen independently of their order."""
    if config.max_pairs is None or len(pairs) <= config.max_pairs:
        return pairs
    order = sorted(range(len(pairs)), key=lambda i: (position(seed, repr(pairs[i].pair)), i))
    sample = set(order[: config.max_pairs])
    reason = LeftOutError("not in the sample of data.max_pairs", is_choice=True)
    _lose([item for i, item in enumerate(pairs) if i not in sample], reason, ledger)
    return [item for i, item in enumerate(pairs) if i in sample]


def _lose(items: Sequence[Resolved], reason: LeftOutError, ledger: Ledger) -> None:
    for pair, origins in items:
        ledger.lose(origins, reason, pair.prompt, pair.chosen, pair.rejected)


def _prompts(pairs: list[Pair], fields: PromptFields) -> list[PromptRow]:
    unique = {exact_key(pair.prompt): pair.prompt for pair in pairs}
    return [fields.complete(PromptRow(prompt)) for prompt in unique.values()]


def _from_world(config: DataConfig, seed: int) -> Parts:
    from rlhf.world import generate

    try:
        world = generate(config.world, seed)
    except ValueError as error:
        raise DataError(f"data.world: {error}; ask for fewer") from None
    return {
        DEMONSTRATIONS: world.demonstrations,
        PAIRS_TRAIN: [Pair(p.prompt, p.chosen, p.rejected) for p in world.pairs],
        PAIRS_EVAL: world.eval_pairs,
        PROMPTS_TRAIN: [PromptRow(p) for p in world.prompts],
        PROMPTS_EVAL: world.eval_prompts,
    }


def _summary(config: DataConfig, parts: Parts, rows: dict[str, Any]) -> dict[str, Any]:
    train: Sequence[Pair] = parts[PAIRS_TRAIN]
    longer = sum(len(p.chosen) > len(p.rejected) for p in train) / len(train)
    return {
        "source": source_name(config.source),
        "demonstrations": len(parts[DEMONSTRATIONS]),
        "pairs_train": len(train),
        "pairs_eval": len(parts[PAIRS_EVAL]),
        "prompts_train": len(parts[PROMPTS_TRAIN]),
        "prompts_eval": len(parts[PROMPTS_EVAL]),
        "chosen_longer": longer,
        "left_out": {},
        **rows,
    }
