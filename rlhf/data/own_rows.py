"""Rows of `data.sft_source` and `data.prompts_source`: read, kept off held-out prompts, counted.

Every row ends as used or in the quarantine. An item equal to an earlier one is used once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar

from rlhf.config import DataConfig, StoreConfig
from rlhf.data.collect import exact_key
from rlhf.data.columns import Row
from rlhf.data.ledger import Ledger, Origin
from rlhf.data.mixing import MixedSource, Sources, not_in_share, repeated
from rlhf.data.model_check import CheckPrompt
from rlhf.data.pairs import merged_ids
from rlhf.data.parts import Detector, records_with_layouts
from rlhf.data.privacy import PersonalData, redacted_row
from rlhf.data.quarantine import Quarantine
from rlhf.data.records import LeftOutError, Record
from rlhf.data.rows import Demonstration, Prompt, PromptRow, messages_of
from rlhf.data.sources import Part, open_source
from rlhf.data.split import find_clusters
from rlhf.data.unread_content import check_unread
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
    unused: tuple[str, ...] = ()
    """Columns that are not read."""


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
    sources: tuple[MixedSource, ...] = ()


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
    limit: int | None = None,
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
        limit: Read at most this many rows of each file to look at them, however many are unusable.

    Raises:
        ConfigError: A source does not exist, or its format is not known.
        DataError: It can't be parsed, too many rows are unusable, or none is left.
        StoreError: The S3 server can't be reached, or a transfer broke.
    """
    reader = _Reader(Sources(config, setting, quarantine), detect, note, personal)
    for source in reader.sources.all:
        reader.read(source, options, limit)
    times = reader.choose(held_out, config.near_duplicates, refuse, check, seed)
    reader.note_lost_items(setting, times)
    used = reader.ledger.close(reader.sources.leave_out)
    if limit is None:
        for source in reader.sources.all:
            source.check(config.max_bad_fraction)
        if not times:
            raise DataError(
                f"data.{setting}: no row is left to use; give more (left out: "
                f"{quarantine.in_words()}; {reader.sources.all[0].inspect} shows more)"
            )
    return reader.result(times, used)


class _Reader(Generic[ItemT]):
    """Items of a setting's sources, with the rows of each, while they are read and chosen from."""

    def __init__(
        self, sources: Sources, detect: Detect[ItemT], note: Callable[[str], None],
        personal: PersonalData,
    ) -> None:  # fmt: skip
        self.sources, self.ledger = sources, Ledger()
        self._detect, self._note, self._personal = detect, note, personal
        self._items: dict[str, Found[ItemT]] = {}
        self._rows: dict[str, list[int]] = {}
        """Numbers of the rows of each item."""
        self._lost: list[tuple[int, str]] = []
        """Items that are not used: their row, of which others may be, and the reason."""
        self._unused_columns: list[str] = []

    def read(self, source: MixedSource, options: StoreConfig, limit: int | None) -> None:
        """Add the usable items of a source; leave out the rows without one.

        Raises:
            ConfigError: It does not exist, or its format is not known.
            DataError: It can't be parsed, or holds no rows.
        """

        def note(text: str) -> None:
            self._note(f"data.{source.setting}: {text}")

        with open_source(source.config, options, note, source.field) as parts:
            for part in parts:
                if part.held_out:
                    note(
                        f"{part.name} is not read: no training stage sees a source's own test part"
                    )
                    continue
                for found, row in self._read_part(part, source, limit, note):
                    self._items.setdefault(found.key, found)
                    self._rows.setdefault(found.key, []).append(row)
        if not source.rows:
            raise DataError(
                f"{source.field} = {source.uri!r}: holds no rows; give a file with some"
            )

    def choose(
        self, held_out: Iterable[Prompt], threshold: float | None,
        refuse: Callable[[Found[ItemT]], LeftOutError | None], check: CheckPrompt | None, seed: int,
    ) -> dict[str, int]:  # fmt: skip
        """Return how often each item is used, by its key; leave out the others."""
        is_held_out = _held_out_test(held_out, [f.prompt for f in self._items.values()], threshold)
        times: dict[str, int] = {}
        for key, found in self._items.items():
            rows, origins = self._rows[key], self._origins(key)
            reason = refuse(found) or (check(found.prompt) if check else None)
            number = self.sources.times(key, origins, seed)
            if is_held_out(found.prompt):
                reason = LeftOutError(
                    "prompt is held out",
                    "it, or a turn of its conversation, is held out for the gate", is_choice=True,
                )  # fmt: skip
            elif number == 0:
                reason = reason or not_in_share(self.sources, origins)
            if reason is None:
                self.ledger.use(rows)
                times[key] = number
            else:
                self._lose(found, reason, rows)
        return times

    def note_lost_items(self, setting: str, times: dict[str, int]) -> None:
        """Note the items that are left out of rows whose other items are used."""
        used = {row for key in times for row in self._rows[key]}
        lost = Counter(reason for row, reason in self._lost if row in used)
        for reason, count in sorted(lost.items()):
            self._note(f"data.{setting}: {count:,} turns of conversations are left out: {reason}")

    def result(self, times: dict[str, int], used: int) -> OwnRows[ItemT]:
        """Return the items as often as they are used, each with the ids of its rows."""
        origins = {key: self._origins(key) for key in times}
        items = {
            key: replace(self._items[key].item, row_ids=merged_ids([o.id] for o in own))
            for key, own in origins.items()
        }
        keys = list(repeated([*times], [*times.values()]))
        return OwnRows(
            [items[key] for key in keys],
            [origin for own in origins.values() for origin in own],
            sum(source.rows for source in self.sources.all),
            used,
            self._unused_columns,
            self.sources.counts([origins[key][0] for key in keys]),
            tuple(self.sources.all),
        )

    def _origins(self, key: str) -> list[Origin]:
        return [self.ledger.origin(row) for row in self._rows[key]]

    def _read_part(
        self, part: Part, source: MixedSource, limit: int | None, note: Callable[[str], None]
    ) -> Iterator[tuple[Found[ItemT], int]]:
        """Yield the usable items of a file, each with the number of its row."""

        def report(layout: RowLayout[ItemT]) -> None:
            source.formats += [layout.name] if layout.name not in source.formats else []
            for text in layout.notes:
                note(text)
            names = dict.fromkeys(map(self._personal.hide, layout.unused))
            self._unused_columns += [n for n in names if n not in self._unused_columns]

        file = self.sources.file_name(source, part)
        detector = _detector(source, self._detect)
        for record, layout in records_with_layouts(part, detector, limit, report):
            source.rows += 1
            origin = Origin(file, record.line, record.id, self.sources.files)
            if origin.id in source.quarantine.forgotten:
                source.quarantine.add(origin, LeftOutError("forgotten", is_choice=True), None)
                continue
            try:
                found = self._convert(record, layout, source, note)
                number = self.ledger.register(origin)
                usable = self._usable(found, number)
            except LeftOutError as reason:
                row = record.text if record.fields is None else record.fields
                source.quarantine.add(origin, reason, row)
                continue
            for one in usable:
                yield one, number

    def _convert(
        self, record: Record, layout: RowLayout[ItemT] | None, source: MixedSource,
        note: Callable[[str], None],
    ) -> list[Found[ItemT]]:  # fmt: skip
        """Return the items of a row, without personal data if the policy says so.

        Raises:
            LeftOutError: It can't be read, or holds personal data.
        """
        if record.fields is None or layout is None:
            raise LeftOutError("row can't be parsed", record.fault, "mend the row")
        found = layout.convert(record.fields, note)
        check_unread(record.fields, layout.columns, source.config, source.setting)
        columns = [*source.config.metadata_columns, *filter(None, [source.config.reference_column])]
        texts = {m["content"] for one in found for m in messages_of(one.prompt)}
        texts |= {one.reply for one in found}
        if not self._personal.must_redact(texts, record.fields, columns):
            return found
        return layout.convert(redacted_row(record.fields), note)

    def _usable(self, found: list[Found[ItemT]], row: int) -> list[Found[ItemT]]:
        """Return the usable items of a row.

        Raises:
            LeftOutError: There is none.
        """
        for one in found:
            if one.fault is not None:
                self._lose(one, one.fault, [row])
        usable = [one for one in found if one.fault is None]
        if not usable:
            raise self.ledger.reason(row) or LeftOutError("the row holds nothing to use")
        for one in usable:
            one.on_use()
        return usable

    def _lose(self, found: Found[ItemT], reason: LeftOutError, rows: Sequence[int]) -> None:
        self.ledger.lose(rows, reason, found.prompt, *filter(None, [found.reply]))
        self._lost += [(row, reason.reason) for row in rows]


def _detector(source: MixedSource, detect: Detect[ItemT]) -> Detector[RowLayout[ItemT]]:
    """Return the detection of a source's layouts, with its setting and value in each error."""
    name = f"{source.field} = {source.uri!r}"

    def find(columns: Sequence[str], sample: Sequence[Row], text_cells: bool) -> RowLayout[ItemT]:
        try:
            layout = detect(columns, sample, source, text_cells)
        except ConfigError as error:
            raise ConfigError(f"{name}: {error}") from None
        read = {column.partition(".")[0] for column in layout.columns} | {*layout.columns}
        return replace(layout, unused=tuple(name for name in columns if name not in read))

    return Detector(find, name, "the columns to read", source.inspect)


def _held_out_test(
    held_out: Iterable[Prompt], prompts: Sequence[Prompt], threshold: float | None
) -> Callable[[Prompt], bool]:
    """Return a function that tells whether a prompt is in the cluster of a held-out one."""
    held_out = list(held_out)
    clusters = find_clusters([*held_out, *prompts], threshold)
    theirs = {clusters.of(prompt) for prompt in held_out}
    return lambda prompt: clusters.of(prompt) in theirs
