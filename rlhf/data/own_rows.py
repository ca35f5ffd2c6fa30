"""Rows of `data.sft_source` and `data.prompts_source`: read, kept off held-out prompts, counted.

Every row ends as used or in the quarantine. An item equal to an earlier one is used once.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.collect import exact_key
from rlhf.data.columns import Row
from rlhf.data.ledger import Ledger, Origin
from rlhf.data.mixing import MixedSource, Sources, not_in_share, repeated
from rlhf.data.model_check import CheckPrompt
from rlhf.data.pairs import merged_ids
from rlhf.data.parts import SAMPLE_ROWS
from rlhf.data.privacy import PersonalData, redacted_row
from rlhf.data.quarantine import Quarantine
from rlhf.data.records import LeftOutError, Record
from rlhf.data.rows import Demonstration, Prompt, PromptRow, messages_of
from rlhf.data.sources import Part, open_source
from rlhf.data.split import find_clusters
from rlhf.errors import ConfigError, DataError

ItemT = TypeVar("ItemT", Demonstration, PromptRow)


@dataclass(frozen=True)
class Found(Generic[ItemT]):
    """One item of a row: a demonstration, or a prompt."""

    item: ItemT
    prompt: Prompt
    reply: str = ""
    fault: LeftOutError | None = None
    """Reason for which it can't be used, though others of its row may be."""
    on_use: Callable[[], None] = lambda: None
    """Called once the row is used."""

    @property
    def key(self) -> str:
        """Text that equal items share."""
        return f"{exact_key(self.prompt)}\0{self.reply}"


@dataclass(frozen=True)
class RowLayout(Generic[ItemT]):
    """Format of a file, its columns, and the conversion of its rows to items."""

    name: str
    """Name of the format."""
    columns: tuple[str, ...]
    """Columns that are read."""
    notes: tuple[str, ...]
    """Sentences for the user: which columns are taken for what."""
    convert: Callable[[Row, Callable[[str], None]], list[Found[ItemT]]]
    """Returns the items of a row, and adds sentences on it; raises LeftOutError."""


#: Returns the layout by columns, first rows, source, and whether all cells are text.
Detect = Callable[[Sequence[str], Sequence[Row], MixedSource, bool], RowLayout[ItemT]]


@dataclass
class OwnRows(Generic[ItemT]):
    """Items of a setting, and what became of its rows."""

    items: list[ItemT] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    """Rows that the items come from."""
    rows: int = 0
    used: int = 0
    unused_columns: list[str] = field(default_factory=list)
    counts: list[dict[str, Any]] = field(default_factory=list)
    """Counts of each source, by `Sources.counts`."""
    lost: list[tuple[int, str]] = field(default_factory=list)
    """Items with a fault: the number of their row, of which others may be used, and the reason."""


def read_own_rows(
    config: DataConfig,
    setting: str,
    options: StoreConfig,
    quarantine: Quarantine,
    detect: Detect[ItemT],
    *,
    held_out: Iterable[Prompt],
    refuse: Callable[[Found[ItemT]], LeftOutError | None] = lambda _: None,
    seed: int,
    note: Callable[[str], None],
    personal: PersonalData,
    check: CheckPrompt | None = None,
) -> OwnRows[ItemT]:
    """Read the items of a setting's sources.

    Args:
        config: The section.
        setting: `sft_source` or `prompts_source`.
        options: S3 options.
        quarantine: Receives the rows that are left out.
        detect: Finds the layout of a file.
        held_out: Prompts that no training stage may see, nor one of their cluster.
        refuse: Returns the reason for leaving an item out, if there is one.
        seed: Seeds the choice by weights that are no whole numbers.
        note: Receives sentences for the user.
        personal: Policy for personal data.
        check: Finds prompts that the model can't be given.

    Raises:
        ConfigError: A source does not exist, or its format is not known.
        DataError: It can't be parsed, too many rows are unusable, or none is left.
        StoreError: The S3 server can't be reached, or a transfer broke.
    """
    sources, ledger = Sources(config, setting, quarantine), Ledger()
    items: dict[str, Found[ItemT]] = {}
    rows: dict[str, list[int]] = {}
    own: OwnRows[ItemT] = OwnRows()
    for source in sources.all:
        for found, row in _read(sources, source, options, detect, ledger, own, note, personal):
            items.setdefault(found.key, found)
            rows.setdefault(found.key, []).append(row)
        if not source.rows:
            raise DataError(
                f"{source.field} = {source.uri!r}: holds no rows; give a file with some"
            )
    kept, times, lost = [], [], list(own.lost)
    used: set[int] = set()
    origins = {key: [ledger.origin(row) for row in own_rows] for key, own_rows in rows.items()}
    asked = [found.prompt for found in items.values()]
    is_held_out = _held_out_test(held_out, asked, config.near_duplicates)
    for key, found in items.items():
        reason = refuse(found) or (check(found.prompt) if check else None)
        number = sources.times(key, origins[key], seed)
        if is_held_out(found.prompt):
            reason = LeftOutError(
                "prompt is held out", "it, or a turn of its conversation, is held out for the gate",
                is_choice=True,
            )  # fmt: skip
        elif number == 0:
            reason = reason or not_in_share(sources, origins[key])
        if reason is not None:
            ledger.lose(rows[key], reason, found.prompt, *filter(None, [found.reply]))
            lost += [(row, reason.reason) for row in rows[key]]
            continue
        ledger.use(rows[key])
        used.update(rows[key])
        kept.append(key)
        times.append(number)
    parts = Counter(reason for row, reason in lost if row in used)
    for reason, count in sorted(parts.items()):
        note(f"data.{setting}: {count:,} turns of conversations are left out: {reason}")
    own.used = ledger.close(sources.leave_out)
    own.rows = sum(source.rows for source in sources.all)
    for source in sources.all:
        source.check(config.max_bad_fraction)
    if not kept:
        raise DataError(
            f"data.{setting}: no row is left to use; give more (left out: {quarantine.in_words()})"
        )
    keys = list(repeated(kept, times))
    with_ids = {
        key: replace(items[key].item, row_ids=merged_ids([o.id] for o in origins[key]))
        for key in kept
    }
    own.items = [with_ids[key] for key in keys]
    own.origins = [origin for key in kept for origin in origins[key]]
    own.counts = sources.counts([origins[key][0] for key in keys])
    return own


def _held_out_test(
    held_out: Iterable[Prompt], prompts: Sequence[Prompt], threshold: float | None
) -> Callable[[Prompt], bool]:
    """Return a function that tells whether a prompt is in the cluster of a held-out one."""
    held_out = list(held_out)
    clusters = find_clusters([*held_out, *prompts], threshold)
    theirs = {clusters.of(prompt) for prompt in held_out}
    return lambda prompt: clusters.of(prompt) in theirs


def _read(
    sources: Sources, source: MixedSource, options: StoreConfig, detect: Detect[ItemT],
    ledger: Ledger, own: OwnRows[ItemT], note: Callable[[str], None], personal: PersonalData,
) -> Iterable[tuple[Found[ItemT], int]]:  # fmt: skip
    """Yield the usable items of a source; leave out the rows without one."""

    def noted(text: str) -> None:
        note(f"data.{source.setting}: {text}")

    with open_source(source.config, options, noted, source.field) as parts:
        for part in parts:
            if part.held_out:
                noted(f"{part.name} is not read: no training stage sees a source's own test part")
                continue
            records = iter(part.records())
            head = list(itertools.islice(records, SAMPLE_ROWS))
            layout = _layout(source, part, head, detect, own, noted)
            file = sources.file_name(source, part)
            for record in itertools.chain(head, records):
                source.rows += 1
                origin = Origin(file, record.line, record.id, sources.files)
                if origin.id in source.quarantine.forgotten:
                    forgotten = LeftOutError("forgotten", is_choice=True)
                    source.quarantine.add(origin, forgotten, None)
                    continue
                try:
                    found = _convert(record, layout, source, personal, noted)
                    row_number = ledger.register(origin)
                    usable = _usable(found, row_number, ledger, own)
                except LeftOutError as reason:
                    row = record.text if record.fields is None else record.fields
                    source.quarantine.add(origin, reason, row)
                    continue
                for found in usable:
                    yield found, row_number


def _layout(
    source: MixedSource, part: Part, head: Sequence[Record], detect: Detect[ItemT],
    own: OwnRows[ItemT], note: Callable[[str], None],
) -> RowLayout[ItemT] | None:  # fmt: skip
    """Detect a file's layout; note it and the columns that it does not read."""
    sample = [record.fields for record in head if record.fields is not None]
    if not sample:
        return None
    columns = list(dict.fromkeys(name for row in sample for name in row))
    try:
        layout = detect(columns, sample, source, part.text_cells)
    except ConfigError as error:
        raise ConfigError(f"{source.field} = {source.uri!r}: {error} (in {part.name})") from None
    source.formats += [layout.name] if layout.name not in source.formats else []
    for text in layout.notes:
        note(text)
    read = {column.partition(".")[0] for column in layout.columns} | {*layout.columns}
    more = [name for name in columns if name not in read and name not in own.unused_columns]
    own.unused_columns += more
    return layout


def _convert(
    record: Record, layout: RowLayout[ItemT] | None, source: MixedSource, personal: PersonalData,
    note: Callable[[str], None],
) -> list[Found[ItemT]]:  # fmt: skip
    """Return the items of a row, without personal data if the policy says so.

    Raises:
        LeftOutError: It can't be read, or holds personal data.
    """
    if record.fields is None or layout is None:
        raise LeftOutError("row can't be parsed", record.fault, "mend the row")
    found = layout.convert(record.fields, note)
    columns = [*source.config.metadata_columns, *filter(None, [source.config.reference_column])]
    texts = {m["content"] for one in found for m in messages_of(one.prompt)}
    texts |= {one.reply for one in found}
    if not personal.must_redact(texts, record.fields, columns):
        return found
    return layout.convert(redacted_row(record.fields), note)


def _usable(
    found: list[Found[ItemT]], row: int, ledger: Ledger, own: OwnRows[ItemT]
) -> list[Found[ItemT]]:
    """Return the usable items of a row.

    Raises:
        LeftOutError: There is none.
    """
    usable = [one for one in found if one.fault is None]
    for one in found:
        if one.fault is not None:
            ledger.lose([row], one.fault, one.prompt, *filter(None, [one.reply]))
            own.lost.append((row, one.fault.reason))
    if not usable:
        raise ledger.reason(row) or LeftOutError("the row holds nothing to use")
    for one in usable:
        one.on_use()
    return usable
