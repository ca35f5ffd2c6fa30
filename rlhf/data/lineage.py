"""Rows of the source in a store: those of a dataset, what they reached, those to go without."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from rlhf.data.rows import PAIRS_TRAIN, QUARANTINE, ROWS, SourceRow, json_lines, read_rows
from rlhf.errors import DataError
from rlhf.store import ArtifactRef, Store

#: History of the rows to go without; its entries hold ids alone.
FORGOTTEN = "forgotten-rows"
#: Splits that no model learns from.
HELD_OUT = frozenset(("eval", "judge"))
#: Kinds of artifacts that come from held-out rows.
_TESTS = frozenset(("evaluation", "verdict"))


@dataclass
class Reach:
    """Artifacts that rows of the source reached."""

    rows: dict[str, list[tuple[ArtifactRef, SourceRow]]] = field(default_factory=dict)
    """By id: the row's place in each dataset that holds it, the quarantine included."""
    derived: dict[str, list[ArtifactRef]] = field(default_factory=dict)
    """By id: artifacts made from a dataset that trains on the row, at any distance."""
    tested: dict[str, list[ArtifactRef]] = field(default_factory=dict)
    """By id: evaluations and verdicts on a row that is held out; models do not learn from it."""
    unknown: list[tuple[ArtifactRef, str]] = field(default_factory=list)
    """Datasets whose ids can't be read, each with the reason: an older version, damage."""


def rows_of(folder: Path) -> list[SourceRow]:
    """Return the rows of a dataset's source, those left out with the split `quarantine`.

    Empty for the generated world.

    Raises:
        DataError: An older version made the dataset, without ids, or a file is damaged.
    """
    quarantine = folder / QUARANTINE
    if not (folder / ROWS).exists():
        if (folder / PAIRS_TRAIN).exists():
            return []
        raise DataError(
            "the dataset is of an older version, which kept no ids of rows; prepare the data again"
        )
    rows = read_rows(folder / ROWS, SourceRow)
    if quarantine.exists():
        rows += json_lines(quarantine, _left_out)
    return rows


def _left_out(line: Any) -> SourceRow:
    row = SourceRow(line["id"], line["source"], line["line"], "quarantine")
    if not isinstance(row.id, str) or not isinstance(row.source, str):
        raise ValueError("id and source are no texts")
    return row


def reach(store: Store, ids: Iterable[str]) -> Reach:
    """Find the artifacts of a store that rows reached; downloads every dataset.

    Raises:
        StoreError: The store can't be read.
    """
    wanted = dict.fromkeys(ids)
    found = Reach({i: [] for i in wanted}, {i: [] for i in wanted}, {i: [] for i in wanted})
    artifacts = {artifact.ref.digest: artifact for artifact in store.list()}
    users: dict[str, dict[str, set[str]]] = {}
    for digest, artifact in artifacts.items():
        if artifact.ref.kind != "dataset":
            continue
        try:
            rows = rows_of(store.fetch(artifact.ref))
        except DataError as error:
            found.unknown.append((artifact.ref, str(error)))
            continue
        for row in rows:
            if row.id in wanted:
                found.rows[row.id].append((artifact.ref, row))
                if row.split != "quarantine":
                    users.setdefault(digest, {}).setdefault(row.id, set()).add(row.split)
    parents = {digest: artifact.manifest.parents for digest, artifact in artifacts.items()}
    for digest, splits in users.items():
        for ref in (artifacts[name].ref for name in _descendants(digest, parents)):
            for row_id, own in splits.items():
                if not own <= HELD_OUT:
                    found.derived[row_id] += [] if ref in found.derived[row_id] else [ref]
                elif ref.kind in _TESTS and ref not in found.tested[row_id]:
                    found.tested[row_id].append(ref)
    return found


def _descendants(digest: str, parents: dict[str, dict[str, str]]) -> list[str]:
    """Return the artifacts made from one, nearest first."""
    found: dict[str, None] = {}
    frontier = {digest}
    while frontier:
        frontier = {
            child
            for child, own in parents.items()
            if child not in found and frontier & set(own.values())
        }
        found |= dict.fromkeys(sorted(frontier))
    return list(found)


def forget_rows(store: Store, ids: Iterable[str]) -> int:
    """Record rows that later data are prepared without; return how many are new."""
    new = sorted(set(ids) - forgotten_ids(store))
    if new:
        when = datetime.now(UTC).isoformat(timespec="seconds")
        store.history.append(FORGOTTEN, {"ids": new, "when": when})
    return len(new)


def forgotten_ids(store: Store) -> frozenset[str]:
    """Return the ids of the rows to go without."""
    entries = store.history.entries(FORGOTTEN)
    return frozenset(row_id for entry in entries for row_id in entry["ids"])
