"""Stage `prepare-data`: read preferences, quarantine unusable rows, split by prompts."""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.audit import Evidence, left_out_reasons
from rlhf.data.card import write_card
from rlhf.data.collect import Collector, Totals, exact_key
from rlhf.data.dataset import Parts, Written, dataset_parts, write_parts
from rlhf.data.demonstrations import read_demonstrations
from rlhf.data.formats import Layout
from rlhf.data.ledger import Ledger, Origin, in_a_sentence
from rlhf.data.mixing import MixedSource, Sources, describe_counts, not_in_share
from rlhf.data.model_check import ModelCheck
from rlhf.data.own_rows import OwnRows
from rlhf.data.pairs import Pairs
from rlhf.data.partition import Partition, check_sizes, partition
from rlhf.data.parts import convert, with_layouts
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
    SUMMARY,
    Pair,
    PromptRow,
)
from rlhf.data.sketch import write_sketch
from rlhf.data.sources import Part, open_source, source_names
from rlhf.data.spill import Spill
from rlhf.data.tallies import Tallies
from rlhf.errors import DataError
from rlhf.files import write_json
from rlhf.stage import Progress, StageResult, silent


@dataclass
class Reading:
    """Pairs of a source, and everything that a user should know of how it was read."""

    ledger: Ledger
    """Rows, and the texts of the pairs."""
    pairs: Pairs = field(init=False)
    held_out: Pairs = field(init=False)
    """Pairs of the source's own test part."""
    rows: int = 0
    notes: list[str] = field(default_factory=list)
    """Sentences, each once, in the order of the files."""
    counted: Counter[str] = field(default_factory=Counter[str])
    """Rows that a sentence holds for."""
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
    model: ModelCheck | None = None,
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
        model: Check against the model that will be trained; rows that it can't be given are left
            out. None where its tokenizer is yet to be trained.
        progress: Called after reading and after writing.

    Raises:
        ConfigError: The source does not exist, or its format is not known.
        DataError: It can't be parsed, too many rows are unusable, or too few prompts are left.
        StoreError: The S3 server of the source can't be reached.
    """
    if config.source == "world":
        prepared = _from_world(config, seed)
    else:
        path = out_dir / QUARANTINE
        try:
            prepared = _from_source(
                config, store_options or StoreConfig(), seed, path, forgotten, model, progress
            )
        except BaseException:
            path.unlink(missing_ok=True)
            raise
    written = write_parts(out_dir, prepared.parts)
    summary = _summary(config, written, prepared.facts)
    summary["findings"] = write_card(out_dir, prepared.pairs, prepared.evidence, summary)
    write_sketch(out_dir, prepared.pairs)
    write_json(out_dir / SUMMARY, summary)
    progress(2, 2, {})
    metrics = {k: v for k, v in summary.items() if not isinstance(v, dict | list)}
    return StageResult(metrics)


@dataclass
class _Prepared:
    """A dataset to write."""

    parts: Parts
    pairs: Sequence[Pair]
    """Pairs to audit."""
    evidence: Evidence = field(default_factory=Evidence)
    facts: dict[str, Any] = field(default_factory=dict[str, Any])
    """Entries of the summary on the source."""


def read_pairs(
    config: DataConfig,
    options: StoreConfig,
    quarantine: Quarantine,
    fields: PromptFields,
    limit: int | None = None,
    folder: Path | None = None,
) -> Reading:
    """Read a source's pairs; rows that can't be used go into the quarantine.

    Texts beyond some megabytes are in a temporary file.

    Args:
        config: Source, format, columns.
        options: S3 options.
        quarantine: Receives the rows that are left out.
        fields: Receives references and metadata of the prompts.
        limit: Read at most this many rows of each part.
        folder: For temporary files; None takes the system's.

    Raises:
        ConfigError: The source does not exist, or its format is not known.
        DataError: It can't be parsed, or has no rows, or the disk is full.
        StoreError: The S3 server can't be reached, or a transfer broke.
    """
    reading = Reading(Ledger(Spill(folder)), personal=PersonalData(config))
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
    for text, count in reading.counted.items():
        reading.note(f"in {count:,} of {reading.rows:,} rows {text}")
    reading.pairs, reading.held_out = (collectors.pop(0).resolve() for _ in range(2))
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
    columns = _extra_columns(config)
    for record, layout in with_layouts(part, config, limit, report):
        reading.rows += 1
        source.rows += 1
        origin = Origin(file, record.line, record.id, number)
        if origin.id in source.quarantine.forgotten:
            source.quarantine.add(origin, LeftOutError("forgotten", is_choice=True), None)
            continue
        try:
            _add(record, layout, config, collector, fields, origin, reading, columns, note)
        except LeftOutError as reason:
            row = record.text if record.fields is None else record.fields
            source.quarantine.add(origin, reason, row)


def _add(
    record: Record,
    layout: Layout | None,
    config: DataConfig,
    collector: Collector,
    fields: PromptFields,
    origin: Origin,
    reading: Reading,
    columns: Collection[str],
    note: Callable[[str], None],
) -> None:
    if record.fields is None or layout is None:
        raise LeftOutError("row can't be parsed", record.fault, "mend the row")
    converted = convert(layout, record, config)
    converted, row = reading.personal.apply(converted, record.fields, columns)
    additions: list[Callable[[], None]] = []
    if columns:  # without any, a prompt has nothing beside it to read
        compared = (*converted.comparisons, *converted.rated)
        prompts = {exact_key(item.prompt): item.prompt for item in compared}
        additions = [fields.read(row, prompt) for prompt in prompts.values()]
    collector.add(converted, origin)
    for add in additions:
        add()
    reading.tallies.add(record.fields, converted, reading.personal.hide)
    for text in converted.notes:
        note(text)
    reading.counted.update(converted.counted)


def _extra_columns(config: DataConfig) -> set[str]:
    """Return the columns that rewards use."""
    return {*config.metadata_columns, *filter(None, [config.reference_column])}


def _from_source(
    config: DataConfig,
    options: StoreConfig,
    seed: int,
    path: Path,
    forgotten: frozenset[str],
    model: ModelCheck | None,
    progress: Progress,
) -> _Prepared:
    fields = PromptFields(config)
    policy = config.personal_data
    with Quarantine(path, forgotten=forgotten, personal_data=policy) as quarantine:
        reading = read_pairs(config, options, quarantine, fields, folder=path.parent)
        progress(1, 2, {"pairs": len(reading.pairs) + len(reading.held_out)})
        if model:
            reading.pairs = model.usable(reading.pairs)
            reading.held_out = model.usable(reading.held_out)
        pairs = _weighted(reading, seed)
        divided = partition(pairs, reading.held_out, config, seed, reading.note)
        if divided.judge_note:
            reading.note(divided.judge_note)
        sources = reading.sources
        assert sources is not None
        used = reading.ledger.close(sources.leave_out)
        for source in sources.all:
            source.check(config.max_bad_fraction)
        left_out, cure = quarantine.in_words(), quarantine.main_cure(reading.rows)
        check_sizes(divided, bool(reading.held_out), left_out, config, cure)
        own = _own_rows(config, options, quarantine, fields, divided, seed, reading, model)
    evidence = Evidence(
        reading.tallies, reading.totals, reading.rows,
        left_out_reasons(quarantine.ordered(), quarantine.examples),
    )  # fmt: skip
    return _Prepared(
        dataset_parts(divided, own, fields, config),
        divided.written(),
        evidence,
        _facts(reading, divided, own, quarantine, used) | (model.facts() if model else {}),
    )


def _facts(
    reading: Reading, divided: Partition, own: Mapping[str, OwnRows[Any]],
    quarantine: Quarantine, used: int,
) -> dict[str, Any]:  # fmt: skip
    """Return the entries of the summary that tell how the rows were read, and what became of them.

    Args:
        reading: The pairs.
        divided: Those that are used.
        own: Rows of sources of their own.
        quarantine: Rows that are left out.
        used: Number of the pairs' rows that are used.
    """
    assert reading.sources is not None
    lost_pairs = reading.ledger.pairs_left_out()
    if text := in_a_sentence(lost_pairs):
        reading.note(text)
    if text := quarantine.missing_note():
        reading.note(text)
    sides = divided.train, divided.held_out, divided.judge
    written = itertools.chain.from_iterable(side.first_origins() for side in sides)
    counts = [*reading.sources.counts(written), *(c for o in own.values() for c in o.counts)]
    unused = [reading.unused_columns, *(o.unused_columns for o in own.values())]
    total = reading.rows + sum(o.rows for o in own.values())
    facts = {
        "format": ", ".join(reading.formats),
        "rows": total,
        "rows_used": used + sum(o.used for o in own.values()),
        "rows_merged": reading.totals.merged or None,
        "rows_with_personal_data": reading.personal.rows or None,
        "personal_data": dict(reading.personal.kinds) or None,
        "agreement": reading.totals.agreement,
        "contradictions": divided.contradictions or None,
        "pairs_weighted": divided.train.weighted() or None,
        "leaks_left_out": divided.leaks or None,
        "rows_left_out": _left_out_line(quarantine, total),
        "pairs_left_out": {name: count for name, (count, _) in lost_pairs.items()} or None,
        "unused_columns": _joined([*dict.fromkeys(itertools.chain(*unused))]) or None,
        "sources": counts if len(counts) > 1 else None,
        "notes": [*reading.notes, *reading.personal.notes, *describe_counts(counts)],
        "left_out": dict(quarantine.ordered()),
    }
    return {name: value for name, value in facts.items() if value is not None}


def _own_rows(
    config: DataConfig, options: StoreConfig, quarantine: Quarantine, fields: PromptFields,
    parts: Partition, seed: int, reading: Reading, model: ModelCheck | None,
) -> dict[str, OwnRows[Any]]:  # fmt: skip
    """Read demonstrations and prompts of their own, by the file that they are written to."""
    own: dict[str, OwnRows[Any]] = {}
    held_out = [*parts.held_out.prompts(), *parts.judge.prompts()]
    if config.sft_source is not None:
        own[DEMONSTRATIONS] = read_demonstrations(
            config,
            options,
            quarantine,
            parts.train.written(),
            held_out,
            seed,
            reading.note,
            reading.personal,
            model.prompt_fault if model else None,
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
            model.prompt_fault if model else None,
        )
    return own


def _joined(columns: Sequence[str]) -> str:
    return ", ".join(columns).encode("utf-8", "backslashreplace").decode()


def _left_out_line(quarantine: Quarantine, rows: int) -> str | None:
    if not quarantine.total:
        return None
    return f"{quarantine.total:,} of {rows:,} rows left out ({quarantine.in_words()})"


def _weighted(reading: Reading, seed: int) -> Pairs:
    """Return the pairs that the weights of their sources leave, with how often each is used."""
    sources, pairs = reading.sources, reading.pairs
    if sources is None or not sources.are_weighted:
        return pairs
    for index, item in enumerate(pairs):
        number = sources.times(repr(item.pair), item.origins, seed)
        pairs.times[index] = number
        if number == 0:
            pairs.lose(not_in_share(sources, item.origins), [index])
    return pairs.select(pairs.times > 0)


def _from_world(config: DataConfig, seed: int) -> _Prepared:
    from rlhf.world import generate

    try:
        world = generate(config.world, seed)
    except ValueError as error:
        raise DataError(f"data.world: {error}; ask for fewer") from None
    train = [Pair(p.prompt, p.chosen, p.rejected) for p in world.pairs]
    parts: Parts = {
        DEMONSTRATIONS: world.demonstrations,
        PAIRS_TRAIN: train,
        PAIRS_EVAL: world.eval_pairs,
        PROMPTS_TRAIN: [PromptRow(p) for p in world.prompts],
        PROMPTS_EVAL: world.eval_prompts,
    }
    if world.judge_pairs:
        parts[PAIRS_JUDGE] = world.judge_pairs
    held_out = [Pair(p.prompt, p.chosen, p.rejected, p.group) for p in world.eval_pairs]
    return _Prepared(parts, [*train, *held_out])


def _summary(config: DataConfig, written: Written, facts: dict[str, Any]) -> dict[str, Any]:
    rows = written.rows
    return {
        "source": source_names(config.source),
        "demonstrations": rows[DEMONSTRATIONS],
        "pairs_train": rows[PAIRS_TRAIN],
        "pairs_eval": rows[PAIRS_EVAL],
        **({"pairs_judge": rows[PAIRS_JUDGE]} if PAIRS_JUDGE in rows else {}),
        "prompts_train": rows[PROMPTS_TRAIN],
        "prompts_eval": rows[PROMPTS_EVAL],
        "chosen_longer": written.longer / rows[PAIRS_TRAIN],
        "left_out": {},
        **facts,
    }
