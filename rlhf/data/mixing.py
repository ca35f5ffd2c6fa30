"""Several sources of one setting: their settings, their weights, and counts of each.

A weight is how often a source's rows are used, not a share of the total: a row's fate depends on
the row, the weight and the seed alone, and stays when another source grows.
"""

from __future__ import annotations

import dataclasses
import itertools
import json
import shlex
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

from rlhf.config import DataConfig, SourceConfig
from rlhf.data.collect import Origin
from rlhf.data.quarantine import Quarantine
from rlhf.data.records import LeftOutError
from rlhf.data.sources import Part, source_name
from rlhf.data.split import position

ItemT = TypeVar("ItemT")
#: Settings that say how files are read; a source of demonstrations or prompts shares them.
_FILE_SETTINGS = frozenset(
    ("encoding", "delimiter", "hub_split", "split", "max_row_mb", "max_prompt_chars",
     "max_reply_chars", "max_bad_fraction", "sft_turns")
)  # fmt: skip
_PROMPT_SETTINGS = frozenset(("reference_column", "metadata_columns"))


@dataclass
class MixedSource:
    """One source of a setting, with counts of what became of its rows."""

    setting: str
    """Name of the setting in section `data`: `source`, `sft_source`."""
    uri: str
    name: str
    """Name for messages, which no other source of the setting has."""
    config: DataConfig
    """The section as it is for this source alone."""
    quarantine: Quarantine
    """Rows of this source that are left out; its parent has those of all sources."""
    field: str
    """The setting with the index in its list: `data.source[1]`."""
    weight: float = 1.0
    is_listed: bool = False
    """True if the setting is a list."""
    is_held_out: bool = False
    """True for `data.eval_source` beside a list: no training stage may see any of it."""
    own_settings: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Settings of the source's own in the list, without its weight."""
    rows: int = 0
    formats: list[str] = dataclasses.field(default_factory=list)

    @property
    def inspect(self) -> str:
        """Command that shows how the source is read, for a shell."""
        value = self.uri
        if self.own_settings:
            value = json.dumps({"source": self.uri, **self.own_settings}, ensure_ascii=False)
        option = {"sft_source": " --as sft", "prompts_source": " --as prompts"}
        return f"rlhf data inspect {shlex.quote(value)}{option.get(self.setting, '')}"

    def check(self, limit: float) -> None:
        """Refuse the source if more than a share `limit` of its rows has something wrong."""
        self.quarantine.check(self.rows, limit, self.uri, self.field, self.inspect)


class Sources:
    """The sources of one setting, by the names that their files have in messages."""

    def __init__(self, config: DataConfig, setting: str, quarantine: Quarantine) -> None:
        value = getattr(config, setting)
        listed = [SourceConfig.model_construct(source=value)] if isinstance(value, str) else value
        self.all: list[MixedSource] = []
        for index, item in enumerate(listed or ()):
            is_listed = not isinstance(value, str)
            source = MixedSource(
                setting,
                item.source,
                self._unique(source_name(item.source)),
                _own_config(config, setting, item),
                Quarantine(parent=quarantine),
                f"data.{setting}" + (f"[{index}]" if is_listed else ""),
                item.weight,
                is_listed,
                own_settings=item.model_dump(
                    mode="json", exclude_none=True, exclude={"source", "weight"}
                ),
            )
            self.all.append(source)
        if setting == "source" and not isinstance(value, str) and config.eval_source is not None:
            self._add_held_out(config, config.eval_source, quarantine)
        self._by_file: dict[str, MixedSource] = {}

    def file_name(self, source: MixedSource, part: Part) -> str:
        """Return a part's name for origins, which no other part of the setting has."""
        name = part.name
        if source.is_listed and name != source.uri:
            name = source.name if name == source.name else f"{source.name}/{name}"
        if source.setting != "source":
            name = f"{source.setting}/{name}"
        name = self._numbered(name, self._by_file)
        self._by_file[name] = source
        return name

    @property
    def files(self) -> int:
        """Number of files that have been named."""
        return len(self._by_file)

    def of(self, origin: Origin) -> MixedSource:
        """Return the source of a row."""
        return self._by_file[origin.file]

    def leave_out(self, origin: Origin, reason: LeftOutError, row: Any) -> None:
        """Add a row to the quarantine of its source."""
        self.of(origin).quarantine.add(origin, reason, row)

    def times(self, key: str, origins: Sequence[Origin], seed: int) -> int:
        """Return how often an item is used by the largest weight of the sources that hold it."""
        return times_used(max(self.of(origin).weight for origin in origins), key, seed)

    @property
    def are_weighted(self) -> bool:
        """True if a weight is not 1."""
        return any(source.weight != 1 for source in self.all)

    def counts(self, written: Iterable[Origin]) -> list[dict[str, Any]]:
        """Return rows, rows left out and items written of each source, for the summary.

        Args:
            written: The first origin of each item that was written, repeats included.
        """
        numbers = {source.name: 0 for source in self.all}
        for origin in written:
            numbers[self.of(origin).name] += 1
        return [
            {
                "setting": source.setting,
                "source": source.name,
                "format": ", ".join(source.formats),
                "weight": source.weight,
                "rows": source.rows,
                "left_out": source.quarantine.total,
                "written": numbers[source.name],
            }
            for source in self.all
        ]

    def _add_held_out(self, config: DataConfig, uri: str, quarantine: Quarantine) -> None:
        """Add the held-out source, for which all of the listed ones are to train on."""
        settings = {"eval_source": None, "split": "random"}
        for source in self.all:
            source.config = source.config.model_copy(update=settings)
        self.all.append(
            MixedSource(
                "source",
                uri,
                self._unique(source_name(uri)),
                config.model_copy(update={**settings, "source": uri}),
                Quarantine(parent=quarantine),
                "data.eval_source",
                is_listed=True,
                is_held_out=True,
            )
        )

    def _unique(self, name: str) -> str:
        return self._numbered(name, {source.name for source in self.all})

    @staticmethod
    def _numbered(name: str, taken: Any) -> str:
        numbers = itertools.chain([""], (f"#{number}" for number in itertools.count(2)))
        return next(name + number for number in numbers if name + number not in taken)


def times_used(weight: float, key: str, seed: int) -> int:
    """Return how often an item is used: 2 or 3 times for a weight of 2.4, decided by a hash."""
    whole = int(weight)
    return whole + (position(seed, f"weight\0{key}") < weight - whole)


def not_in_share(sources: Sources, origins: Sequence[Origin]) -> LeftOutError:
    """Return the reason for an item that the weight of its source leaves out."""
    weight = max(sources.of(origin).weight for origin in origins)
    return LeftOutError(
        "not in the share of its source's weight", f"weight {weight:g}", is_choice=True
    )


def describe_counts(counts: Sequence[dict[str, Any]]) -> list[str]:
    """Return a sentence on each source, but not on a single one of pairs."""
    settings = Counter(count["setting"] for count in counts)
    totals: Counter[str] = Counter()
    for count in counts:
        totals[count["setting"]] += count["written"]
    return [
        f"data.{c['setting']}: {c['source']} with weight {c['weight']:g}: {c['rows']:,} rows, "
        f"{c['left_out']:,} left out, {c['written']:,} of {totals[c['setting']]:,} written"
        for c in counts
        if settings[c["setting"]] > 1 or c["setting"] != "source"
    ]


def settings_of_pairs(config: DataConfig, setting: str) -> list[str]:
    """Return the settings of the section that are set, and that a setting's sources do not take."""
    shared = _shared_settings(setting)
    names = [name for name in SourceConfig.model_fields if name not in ("source", "weight")]
    fields = DataConfig.model_fields
    return [
        name
        for name in names
        if name not in shared
        and getattr(config, name) != fields[name].get_default(call_default_factory=True)
    ]


def _shared_settings(setting: str) -> frozenset[str]:
    """Return the settings that a source of demonstrations or prompts takes from the section."""
    return _FILE_SETTINGS | (_PROMPT_SETTINGS if setting == "prompts_source" else frozenset())


def _own_config(config: DataConfig, setting: str, item: SourceConfig) -> DataConfig:
    """Return the section for one source: its own settings, and the rest of the section's.

    A source of demonstrations or prompts has other columns than the pairs, and takes none of
    theirs but, for prompts, those of references and metadata.
    """
    base = config
    if setting != "source":
        shared = {name: getattr(config, name) for name in _shared_settings(setting)}
        base = DataConfig.model_construct(**shared)
    own = {
        name: value
        for name in SourceConfig.model_fields
        if name not in ("source", "weight") and (value := getattr(item, name)) is not None
    }
    return base.model_copy(update={"source": item.source, **own})


def repeated(items: Sequence[ItemT], times: Sequence[int]) -> Iterator[ItemT]:
    """Yield each item as often as its weight says."""
    for item, number in zip(items, times, strict=True):
        yield from itertools.repeat(item, number)
