"""Frozen gate prompts: those of the champion's evaluation, without what a challenger learnt from.

All challengers of a champion answer the same prompts, until `data.rotation` changes.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from rlhf.data.chat import loose_key
from rlhf.data.rows import (
    DEMONSTRATIONS,
    PAIRS_JUDGE,
    PAIRS_TRAIN,
    PROMPTS_GATE,
    PROMPTS_TRAIN,
    Demonstration,
    Pair,
    PromptRow,
    iterate_rows,
    read_rows,
)

#: Largest share of the gate prompts that a challenger may have been trained on; they are left out.
MAX_KNOWN = 0.1
#: Files of a dataset that some stage trains on, and the type of their rows.
_TRAINED_ON = {
    DEMONSTRATIONS: Demonstration, PAIRS_TRAIN: Pair, PAIRS_JUDGE: Pair, PROMPTS_TRAIN: PromptRow,
}  # fmt: skip


@dataclass(frozen=True)
class GatePrompts:
    """Gate prompts, and those of them that a training file holds too."""

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


def read_gate_prompts(evaluation: Path, data: Path) -> GatePrompts:
    """Return the gate prompts of an evaluation, divided by what a dataset trains on.

    Spacing, case and Unicode form make no difference.

    Args:
        evaluation: Folder of the champion's evaluation.
        data: Folder of the challenger's dataset.

    Raises:
        DataError: A file is missing or damaged.
    """
    return without_known(read_rows(evaluation / PROMPTS_GATE, PromptRow), data)


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
    for name, row_type in _TRAINED_ON.items():
        path = data / name
        if not path.exists() and not path.with_suffix(".jsonl").exists():
            continue
        found = wanted & {loose_key(row.prompt) for row in iterate_rows(path, row_type)}
        if found:
            files[name] = sum(key in found for key in keys)
        known |= found
    fresh = [row for row, key in zip(prompts, keys, strict=True) if key not in known]
    return GatePrompts(fresh, len(prompts) - len(fresh), files)
