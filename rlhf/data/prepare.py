"""Stage `prepare-data`: read preferences, quarantine unusable rows, split by prompts."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Sequence
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
    merged_ids,
    source_rows,
)
from rlhf.data.demonstrations import read_demonstrations
from rlhf.data.formats import Layout
from rlhf.data.mixing import MixedSource, Sources, describe_counts, not_in_share, repeated
from rlhf.data.own_rows import OwnRows
from rlhf.data.partition import Partition, check_sizes, partition
from rlhf.data.parts import with_layouts
from rlhf.data.privacy import PersonalData
from rlhf.data.prompt_fields import PromptFields
from rlhf.data.prompt_source import read_prompts
from rlhf.data.quarantine import Quarantine
from rlhf.data.records import LeftOutError, Record
from rlhf.data.rows import (
    DEMONSTRATIONS,
    PAIRS_EVAL,
    PAIRS_JUDGE,
    PAIRS_TRAIN,
    PROMPTS_EVAL,
    PROMPTS_TRAIN,
    QUARANTINE,
    ROWS,
    SUMMARY,
    Demonstration,
    Pair,
    PromptRow,
    write_rows,
)
from rlhf.data.sketch import write_sketch
from rlhf.data.sources import Part, open_source, source_names
from rlhf.data.tallies import Tallies
from rlhf.errors import DataError
from rlhf.files import write_json
from rlhf.stage import Progress, StageResult, silent

#: Names in `rows.parquet` of the rows of their own sources.
SPLITS = {DEMONSTRATIONS: "sft", PROMPTS_TRAIN: "prompts"}
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
    sources: Sources | None = None
    """Settings and counts of each source, where they are a list."""

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
    forgotten: frozenset[str] = frozenset(),
    progress: Progress = silent,
) -> StageResult:
    """Write a dataset: demonstrations, pairs and prompts, split by prompt; a summary.

    Every row of the source ends in a split or, with its reason, in `quarantine.jsonl`.

    Args:
        config: Source, format, columns, split.
        out_dir: Empty folder for the dataset.
        seed: Seeds the split (and the world, for `source: world`).
        store_options: S3 options, for an s3:// source.
        forgotten: Ids of rows to go without.
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
                config, store_options or StoreConfig(), seed, path, forgotten, progress
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
    prompts = [row.prompt for row in parts[PROMPTS_TRAIN]]
    write_sketch(out_dir, pairs, prompts, parts[DEMONSTRATIONS])
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
    reading.sources = sources = Sources(config, "source", quarantine)
    # Of all sources, so that rows of two sources that compare the same are votes.
    collectors = [Collector(config, reading.ledger, reading.totals) for _ in range(2)]
    for source in sources.all:
        with open_source(source.config, options, reading.note, source.field) as parts:
            for part in sorted(parts, key=lambda part: part.held_out):
                collector = collectors[part.held_out or source.is_held_out]
                _read_part(part, source, reading, collector, fields.of(source.config), limit)
        if not source.rows:
            raise DataError(
                f"{source.field} = {source.uri!r}: holds no rows; give a file with pairs"
            )
    reading.pairs, reading.held_out = (
        [item.with_ids() for item in collector.resolve()] for collector in collectors
    )
    return reading


def _read_part(
    part: Part,
    source: MixedSource,
    reading: Reading,
    collector: Collector,
    fields: PromptFields,
    limit: int | None,
) -> None:
    """Add the pairs of one file."""
    config = source.config

    def note(text: str) -> None:
        reading.note(f"{source.name}: {text}" if source.is_listed else text)

    def report(layout: Layout) -> None:
        source.formats += [layout.name] if layout.name not in source.formats else []
        reading.formats += [layout.name] if layout.name not in reading.formats else []
        for text in layout.notes:
            note(text)
        counted = reading.tallies.set_columns(layout.unused)
        unused = [n for n in layout.unused if n not in _extra_columns(config) and n not in counted]
        names = dict.fromkeys(map(reading.personal.hide, unused))
        reading.unused_columns += [n for n in names if n not in reading.unused_columns]

    assert reading.sources is not None
    file = reading.sources.file_name(source, part)
    number = reading.sources.files
    for record, layout in with_layouts(part, config, limit, report):
        reading.rows += 1
        source.rows += 1
        origin = Origin(file, record.line, record.id, number)
        if origin.id in source.quarantine.forgotten:
            source.quarantine.add(origin, LeftOutError("forgotten", is_choice=True), None)
            continue
        try:
            _add(record, layout, collector, fields, origin, reading, _extra_columns(config), note)
        except LeftOutError as reason:
            row = record.text if record.fields is None else record.fields
            source.quarantine.add(origin, reason, row)


def _add(
    record: Record,
    layout: Layout | None,
    collector: Collector,
    fields: PromptFields,
    origin: Origin,
    reading: Reading,
    columns: Collection[str],
    note: Callable[[str], None],
) -> None:
    if record.fields is None or layout is None:
        raise LeftOutError("row can't be parsed", record.fault, "mend the row")
    converted = layout.convert(record.fields)
    converted, row = reading.personal.apply(converted, record.fields, columns)
    prompts = {
        exact_key(item.prompt): item.prompt for item in (*converted.comparisons, *converted.rated)
    }
    additions = [fields.read(row, prompt) for prompt in prompts.values()]
    collector.add(converted, origin)
    for add in additions:
        add()
    reading.tallies.add(record.fields, converted, reading.personal.hide)
    for text in converted.notes:
        note(text)


def _extra_columns(config: DataConfig) -> set[str]:
    """Return the columns that rewards use."""
    return {*config.metadata_columns, *filter(None, [config.reference_column])}


def _from_source(
    config: DataConfig,
    options: StoreConfig,
    seed: int,
    path: Path,
    forgotten: frozenset[str],
    progress: Progress,
) -> tuple[Parts, dict[str, Any], Evidence]:
    fields = PromptFields(config)
    policy = config.personal_data
    with Quarantine(path, forgotten=forgotten, personal_data=policy) as quarantine:
        reading = read_pairs(config, options, quarantine, fields)
        progress(1, 2, {"pairs": len(reading.pairs) + len(reading.held_out)})
        pairs, times = _weighted(reading, seed)
        divided = partition(pairs, reading.held_out, config, seed, reading.ledger, reading.note)
        sources = reading.sources
        assert sources is not None
        used = reading.ledger.close(sources.leave_out)
        for source in sources.all:
            source.check(config.max_bad_fraction)
        check_sizes(divided, bool(reading.held_out), quarantine.in_words(), config)
        train, held_out = divided.train, divided.held_out
        own = _own_rows(config, options, quarantine, fields, divided, seed, reading)
    repeats = [times.get(id(pair), 1) for pair in train]
    by_pair = {id(item.pair): item for item in (*reading.pairs, *reading.held_out)}
    written = [
        by_pair[id(pair)].origins[0]
        for pair in (*repeated(train, repeats), *held_out, *divided.judge)
    ]
    counts = sources.counts(written)
    parts: Parts = {
        DEMONSTRATIONS: _replaced(
            config.sft_mode, demonstrations(train), own.get(DEMONSTRATIONS), _demonstration_key
        ),
        PAIRS_TRAIN: list(repeated(train, repeats)),
        PAIRS_EVAL: held_out,
        PROMPTS_TRAIN: _replaced(
            config.prompts_mode, _prompts(train, fields), own.get(PROMPTS_TRAIN), _prompt_key
        ),
        PROMPTS_EVAL: _prompts(held_out, fields),
        ROWS: source_rows(
            train=_origins(train, by_pair),
            eval=_origins(held_out, by_pair),
            judge=_origins(divided.judge, by_pair),
            **{SPLITS[name]: rows.origins for name, rows in own.items()},
        ),
    }
    if config.judge_fraction:
        parts[PAIRS_JUDGE] = divided.judge
    unused = [reading.unused_columns, *(o.unused_columns for o in own.values())]
    total = reading.rows + sum(o.rows for o in own.values())
    all_counts = [*counts, *(count for o in own.values() for count in o.counts)]
    rows: dict[str, Any] = {
        "format": ", ".join(reading.formats),
        "rows": total,
        "rows_used": used + sum(o.used for o in own.values()),
        "rows_merged": reading.totals.merged or None,
        "rows_with_personal_data": reading.personal.rows or None,
        "personal_data": dict(reading.personal.kinds) or None,
        "agreement": reading.totals.agreement,
        "contradictions": divided.contradictions or None,
        "leaks_left_out": divided.leaks or None,
        "rows_left_out": _left_out_line(quarantine, total),
        "unused_columns": _joined([*dict.fromkeys(itertools.chain(*unused))]) or None,
        "sources": all_counts if len(all_counts) > 1 else None,
        "notes": [*reading.notes, *reading.personal.notes, *describe_counts(all_counts)],
        "left_out": dict(quarantine.ordered()),
    }
    evidence = Evidence(
        reading.tallies, reading.totals, reading.rows,
        left_out_reasons(quarantine.ordered(), quarantine.examples),
    )  # fmt: skip
    summary = _summary(config, parts, {k: v for k, v in rows.items() if v is not None})
    return parts, summary, evidence


def _origins(pairs: Sequence[Pair], by_pair: dict[int, Resolved]) -> Iterator[Origin]:
    return itertools.chain.from_iterable(by_pair[id(pair)].origins for pair in pairs)


def _own_rows(
    config: DataConfig, options: StoreConfig, quarantine: Quarantine, fields: PromptFields,
    parts: Partition, seed: int, reading: Reading,
) -> dict[str, OwnRows[Any]]:  # fmt: skip
    """Read demonstrations and prompts of their own, by the file that they are written to."""
    own: dict[str, OwnRows[Any]] = {}
    held_out = [pair.prompt for pair in (*parts.held_out, *parts.judge)]
    if config.sft_source is not None:
        own[DEMONSTRATIONS] = read_demonstrations(
            config,
            options,
            quarantine,
            parts.train,
            held_out,
            seed,
            reading.note,
            reading.personal,
        )
    if config.prompts_source is not None:
        own[PROMPTS_TRAIN] = read_prompts(
            config,
            options,
            quarantine,
            fields,
            held_out,
            seed,
            reading.note,
            reading.personal,
        )
    return own


def _replaced(
    mode: str, from_pairs: list[Any], own: OwnRows[Any] | None, key: Callable[[Any], str]
) -> list[Any]:
    """Return the rows of the pairs, or the own ones in their place or behind them."""
    if own is None:
        return from_pairs
    if mode == "replace":
        return own.items
    keys = {key(row) for row in own.items}
    return [*(row for row in from_pairs if key(row) not in keys), *own.items]


def _demonstration_key(row: Demonstration) -> str:
    return f"{exact_key(row.prompt)}\0{row.response}"


def _prompt_key(row: PromptRow) -> str:
    return exact_key(row.prompt)


def _joined(columns: Sequence[str]) -> str:
    return ", ".join(columns).encode("utf-8", "backslashreplace").decode()


def _left_out_line(quarantine: Quarantine, rows: int) -> str | None:
    if not quarantine.total:
        return None
    return f"{quarantine.total:,} of {rows:,} rows left out ({quarantine.in_words()})"


def _weighted(reading: Reading, seed: int) -> tuple[list[Resolved], dict[int, int]]:
    """Return the pairs that the weights of their sources leave, and how often each is used.

    By the id of the pair, only of those that are not used once.
    """
    sources = reading.sources
    if sources is None or not sources.are_weighted:
        return reading.pairs, {}
    pairs, times = [], {}
    for item in reading.pairs:
        number = sources.times(repr(item.pair), item.origins, seed)
        if number == 0:
            _lose([item], not_in_share(sources, item.origins), reading.ledger)
            continue
        pairs.append(item)
        if number > 1:
            times[id(item.pair)] = number
    return pairs, times


def _lose(items: Sequence[Resolved], reason: LeftOutError, ledger: Ledger) -> None:
    for pair, origins in items:
        ledger.lose(origins, reason, pair.prompt, pair.chosen, pair.rejected)


def _prompts(pairs: list[Pair], fields: PromptFields) -> list[PromptRow]:
    unique: dict[str, list[Pair]] = {}
    for pair in pairs:
        unique.setdefault(exact_key(pair.prompt), []).append(pair)
    return [
        fields.complete(PromptRow(same[0].prompt, row_ids=merged_ids(p.row_ids for p in same)))
        for same in unique.values()
    ]


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
        "source": source_names(config.source),
        "demonstrations": len(parts[DEMONSTRATIONS]),
        "pairs_train": len(train),
        "pairs_eval": len(parts[PAIRS_EVAL]),
        **({"pairs_judge": len(parts[PAIRS_JUDGE])} if PAIRS_JUDGE in parts else {}),
        "prompts_train": len(parts[PROMPTS_TRAIN]),
        "prompts_eval": len(parts[PROMPTS_EVAL]),
        "chosen_longer": longer,
        "left_out": {},
        **rows,
    }
