"""Gate prompts: their identity, and those of them that a challenger has learnt from.

All challengers of a champion answer the same prompts, until `data.rotation` changes.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.data.chat import loose_key
from rlhf.data.rows import (
    DEMONSTRATIONS,
    PAIRS_JUDGE,
    PAIRS_TRAIN,
    PROMPTS_TRAIN,
    Demonstration,
    Pair,
    Prompt,
    PromptRow,
    iterate_rows,
    read_rows,
)

#: Largest share of the gate prompts that a challenger may have been trained on; they are left out.
MAX_KNOWN = 0.1
#: Files of a dataset that decide what a policy becomes, and the type of their rows. The judge's are
#: among them: the watchdog chooses by them the update whose policy goes on.
_TRAINED_ON = {
    DEMONSTRATIONS: Demonstration, PAIRS_TRAIN: Pair, PAIRS_JUDGE: Pair, PROMPTS_TRAIN: PromptRow,
}  # fmt: skip


@dataclass(frozen=True)
class GatePrompts:
    """Gate prompts, and those of them that a training file holds too."""

    rows: list[PromptRow]
    """All of them."""
    fresh: list[PromptRow]
    """Prompts that no training stage has seen."""
    known: int = 0
    """Number of the others."""
    files: dict[str, int] = field(default_factory=dict[str, int])
    """Number of them by file that holds them."""

    @property
    def too_many_known(self) -> bool:
        """True if more of them than `MAX_KNOWN` are training data."""
        return self.known > MAX_KNOWN * (self.known + len(self.fresh))

    def note(self) -> str | None:
        """Return a sentence on what was left out; None if nothing was."""
        if not self.known:
            return None
        total = self.known + len(self.fresh)
        files = ", ".join(f"{count:,} in {name}" for name, count in self.files.items())
        return (
            f"{self.known:,} of the champion's {total:,} gate prompts are among the training data "
            f"({files}) and were left out of the comparison"
        )


@dataclass(frozen=True)
class PromptSet:
    """Identity of a set of gate prompts."""

    digest: str
    """sha256 of the prompts in their order."""
    keys: frozenset[str] = frozenset()
    """A short digest of each prompt, regardless of spacing and case; none if they are not known."""

    @classmethod
    def of(cls, rows: Sequence[PromptRow]) -> PromptSet:
        """Return the identity of some gate prompts."""
        text = "\0".join(repr(row.prompt) for row in rows)
        keys = (loose_key(row.prompt).encode("utf-8", "surrogatepass") for row in rows)
        return cls(
            hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest(),
            frozenset(hashlib.sha256(key).hexdigest()[:16] for key in keys),
        )

    def is_seen_in(self, other: PromptSet) -> bool:
        """Return whether at least half of these prompts are among other ones."""
        if self.digest == other.digest:
            return True
        return bool(self.keys) and 2 * len(self.keys & other.keys) >= len(self.keys)


def read_gate_prompts(
    path: Path, data: Path, forgotten: Set[str] = frozenset()
) -> GatePrompts:  # fmt: skip
    """Return the gate prompts of an evaluation, divided by what a dataset trains on.

    Spacing, case and Unicode form make no difference.

    Args:
        path: The file in the champion's evaluation.
        data: Folder of the challenger's dataset.
        forgotten: Ids of the source's rows whose prompts must not be used any more.

    Raises:
        DataError: A file is missing or damaged.
    """
    rows = [row for row in read_rows(path, PromptRow) if forgotten.isdisjoint(row.row_ids)]
    return without_known(rows, data)


def trained_on(data: Path, *, judged: bool = True) -> Iterator[tuple[str, Iterator[Prompt]]]:
    """Yield the files of a dataset that decide what a policy becomes, each with its prompts.

    Args:
        data: Folder of the dataset.
        judged: Whether a judge chose the policy, so that its pairs are among them.
    """
    for name, row_type in _TRAINED_ON.items():
        path = data / name
        is_read = path.exists() or path.with_suffix(".jsonl").exists()
        if is_read and (judged or name != PAIRS_JUDGE):
            yield name, (row.prompt for row in iterate_rows(path, row_type))


def without_known(prompts: Sequence[PromptRow], data: Path) -> GatePrompts:
    """Divide prompts by whether a file that a stage trains on holds them.

    Args:
        prompts: Gate prompts.
        data: Folder of a dataset.

    Raises:
        DataError: A file is damaged.
    """
    keys = [loose_key(row.prompt) for row in prompts]
    wanted, known = set(keys), set[str]()
    files: dict[str, int] = {}
    for name, prompts_of in trained_on(data):
        found = wanted & {loose_key(prompt) for prompt in prompts_of}
        if found:
            files[name] = sum(key in found for key in keys)
        known |= found
    fresh = [row for row, key in zip(prompts, keys, strict=True) if key not in known]
    return GatePrompts([*prompts], fresh, len(prompts) - len(fresh), files)
