"""Files of a dataset from divided pairs and rows of their own, each written row by row."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from rlhf.config import DataConfig
from rlhf.data.collect import demonstrations, exact_key, source_rows
from rlhf.data.own_rows import OwnRows
from rlhf.data.pairs import Pairs, merged_ids
from rlhf.data.partition import Partition
from rlhf.data.prompt_fields import PromptFields
from rlhf.data.rows import (
    DEMONSTRATIONS,
    PAIRS_EVAL,
    PAIRS_JUDGE,
    PAIRS_TRAIN,
    PROMPTS_EVAL,
    PROMPTS_TRAIN,
    ROWS,
    Demonstration,
    Pair,
    PromptRow,
    SourceRow,
    write_rows,
)

#: Names in `rows.parquet` of the rows of their own sources.
OWN_SPLITS = {DEMONSTRATIONS: "sft", PROMPTS_TRAIN: "prompts"}
#: Rows of a dataset by the name of their file; each is iterated once.
Parts = dict[str, Iterable[Any]]


@dataclass
class Written:
    """Counts of the rows that were written."""

    rows: dict[str, int] = field(default_factory=dict[str, int])
    """By the name of their file."""
    longer: int = 0
    """Pairs to train on whose chosen reply is the longer one."""


def dataset_parts(
    divided: Partition, own: Mapping[str, OwnRows[Any]], fields: PromptFields, config: DataConfig
) -> Parts:
    """Return the rows of a dataset's files; most are read while they are written.

    Args:
        divided: Pairs by part.
        own: Demonstrations and prompts of sources of their own, by the name of their file.
        fields: References and metadata of prompts.
        config: Whether those replace the rows from pairs.
    """
    train, held_out = divided.train, divided.held_out
    parts: Parts = {
        DEMONSTRATIONS: _replaced(
            config.sft_mode, _demonstrations(train), own.get(DEMONSTRATIONS), _demonstration_key
        ),
        PAIRS_TRAIN: train.written(),
        PAIRS_EVAL: held_out.written(),
        PROMPTS_TRAIN: _replaced(
            config.prompts_mode, _prompts(train, fields), own.get(PROMPTS_TRAIN), _prompt_key
        ),
        PROMPTS_EVAL: _prompts(held_out, fields),
        ROWS: itertools.chain(
            _rows_of_pairs(train=train, eval=held_out, judge=divided.judge),
            source_rows(**{OWN_SPLITS[name]: rows.origins for name, rows in own.items()}),
        ),
    }
    if divided.has_judge:
        parts[PAIRS_JUDGE] = divided.judge.written()
    return parts


def write_parts(out_dir: Path, parts: Parts) -> Written:
    """Write the files of a dataset.

    Raises:
        DataError: A text can't be written as UTF-8.
    """
    written = Written()

    def counted(pairs: Iterable[Pair]) -> Iterator[Pair]:
        for pair in pairs:
            written.longer += len(pair.chosen) > len(pair.rejected)
            yield pair

    for name, rows in parts.items():
        written.rows[name] = write_rows(
            out_dir / name, counted(rows) if name == PAIRS_TRAIN else rows
        )
    return written


def _demonstrations(pairs: Pairs) -> Iterator[Demonstration]:
    for same in pairs.by_prompt():
        yield from demonstrations(same)


def _prompts(pairs: Pairs, fields: PromptFields) -> Iterator[PromptRow]:
    for indices in pairs.indices_by_prompt():
        ids = ([pairs.ledger.id(row)] for index in indices for row in pairs.rows_of(index))
        yield fields.complete(PromptRow(pairs.prompt_of(indices[0]), row_ids=merged_ids(ids)))


def _replaced(
    mode: str, from_pairs: Iterable[Any], own: OwnRows[Any] | None, key: Callable[[Any], str]
) -> Iterable[Any]:
    """Return the rows of the pairs, or the own ones in their place or behind them."""
    if own is None:
        return from_pairs
    if mode == "replace":
        return own.items
    keys = {key(row) for row in own.items}
    return itertools.chain((row for row in from_pairs if key(row) not in keys), own.items)


def _demonstration_key(row: Demonstration) -> str:
    return f"{exact_key(row.prompt)}\0{row.response}"


def _prompt_key(row: PromptRow) -> str:
    return exact_key(row.prompt)


def _rows_of_pairs(**splits: Pairs) -> Iterator[SourceRow]:
    """Yield the rows that are used in each split, in the order of the source."""
    names = sorted(splits)
    # One array of row × splits + split: a row may stand in several.
    found = np.unique(
        np.concatenate(
            [splits[name].all_rows() * len(names) + code for code, name in enumerate(names)]
        )
    )
    ledger = splits[names[0]].ledger
    for value in found.tolist():
        row, code = divmod(value, len(names))
        origin = ledger.origin(row)
        # A file's name may hold bytes that are no UTF-8.
        file = origin.file.encode("utf-8", "backslashreplace").decode()
        yield SourceRow(origin.id, file, origin.line, names[code])
