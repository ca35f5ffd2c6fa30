"""Fate of every row of a source: used, or left out for a reason; in memory 40 bytes a row."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from rlhf.data.records import LeftOutError
from rlhf.data.rows import Prompt
from rlhf.data.spill import Spill

_ID_BYTES = 16
#: States of a row: no comparison used, one used, reported by whoever read it.
_OPEN, _USED, _GONE = 0, 1, 2
#: What a lost comparison holds, in the order of its texts.
_FIELDS = ("prompt", "chosen", "rejected")


class Origin(NamedTuple):
    """Position of a row: its file's name in the source, and its line; its id.

    `part` is the number of its file in the reading: files of `data.source` and `data.eval_source`
    may have one name.
    """

    file: str
    line: int
    id: str = ""
    part: int = 0


#: Receives each row that is left out: its position, the reason, and its pair.
OnLeftOut = Callable[[Origin, LeftOutError, dict[str, Any]], None]


class Ledger:
    """Rows whose comparisons were collected, by number: used, or left out for a reason.

    Args:
        spill: Holds the texts of lost comparisons; one of its own without.
    """

    def __init__(self, spill: Spill | None = None) -> None:
        self.spill = spill or Spill()
        self._files: dict[tuple[str, int], int] = {}
        self._names: list[tuple[str, int]] = []
        self._file, self._line = array("i"), array("q")
        self._ids = bytearray()
        self._other_ids: dict[int, str] = {}
        """Ids that are not 32 hexadecimal digits."""
        self._state = bytearray()
        self._losses = array("i")
        """Index of the loss by row, −1 for none."""
        self._reasons: list[LeftOutError] = []
        self._reason_numbers: dict[tuple[str, str, str, bool], int] = {}
        self._loss_reason, self._loss_texts = array("i"), array("q")
        self._defaults: set[int] = set()
        """Losses that give way to any other."""
        self._pair_reason, self._pair_counts = array("i"), array("i")
        """Reason of pairs that are left out together, and the number of their rows."""
        self._pair_numbers, self._pair_rows = array("i"), array("i")
        """How many pairs they are, and their rows."""

    def __len__(self) -> int:
        return len(self._state)

    def register(self, origin: Origin) -> int:
        """Add a row, and return its number; rows are reported in the order of this."""
        number = len(self._state)
        file = (origin.file, origin.part)
        if file not in self._files:
            self._files[file] = len(self._files)
            self._names.append(file)
        self._file.append(self._files[file])
        self._line.append(origin.line)
        raw = _packed(origin.id)
        if raw is None:
            self._other_ids[number] = origin.id
        self._ids += raw or bytes(_ID_BYTES)
        self._state.append(_OPEN)
        self._losses.append(-1)
        return number

    def origin(self, row: int) -> Origin:
        """Return a row's position."""
        file, part = self._names[self._file[row]]
        return Origin(file, self._line[row], self.id(row), part)

    def id(self, row: int) -> str:
        """Return a row's id."""
        if row in self._other_ids:
            return self._other_ids[row]
        return self._ids[row * _ID_BYTES : (row + 1) * _ID_BYTES].hex()

    def files(self, rows: NDArray[np.int32]) -> NDArray[np.int32]:
        """Return the number of each row's file."""
        return np.array(self._file, dtype=np.int32)[rows]

    def file_name(self, file: int) -> str:
        """Return the name of a file by its number."""
        return self._names[file][0]

    def use(self, rows: Iterable[int]) -> None:
        """Count these rows as used, whatever else becomes of their comparisons."""
        for row in rows:
            self._state[row] = _USED

    def lose(
        self, rows: Iterable[int], reason: LeftOutError, prompt: Prompt, *replies: str
    ) -> None:
        """Note why texts of these rows are not used; the first reason counts."""
        self.lose_stored(rows, reason, [self.spill.add(text) for text in (prompt, *replies)])

    def lose_stored(
        self, rows: Iterable[int], reason: LeftOutError, places: Sequence[int]
    ) -> None:  # fmt: skip
        """Do the same for a comparison whose texts are in the spill: prompt, then replies."""
        rows = list(rows)
        number = self._reason_number(reason)
        self._add_pairs(1, number, rows)
        open_rows = [r for r in rows if self._losses[r] < 0 or self._losses[r] in self._defaults]
        self._note_loss(open_rows, number, places)

    def lose_by_default(
        self, rows: Iterable[int], reason: LeftOutError, places: Sequence[int]
    ) -> None:  # fmt: skip
        """Note why these rows are not used, if no pair of theirs is lost for another reason."""
        new = [row for row in rows if self._losses[row] < 0]
        if new:
            self._defaults.add(len(self._loss_reason))
            self._note_loss(new, self._reason_number(reason), places)

    def skip_pairs(self, number: int, reason: LeftOutError, rows: Sequence[int]) -> None:
        """Count pairs of some rows that are not made."""
        if number:
            self._add_pairs(number, self._reason_number(reason), rows)

    def _add_pairs(self, number: int, reason: int, rows: Sequence[int]) -> None:
        self._pair_numbers.append(number)
        self._pair_reason.append(reason)
        self._pair_counts.append(len(rows))
        self._pair_rows.extend(rows)

    def _note_loss(self, rows: Sequence[int], reason: int, places: Sequence[int]) -> None:
        if not rows:
            return
        number = len(self._loss_reason)
        self._loss_reason.append(reason)
        self._loss_texts.extend([*places, *[-1] * (len(_FIELDS) - len(places))])
        for row in rows:
            self._losses[row] = number

    def _reason_number(self, reason: LeftOutError) -> int:
        key = (reason.reason, reason.detail, reason.cure, reason.is_choice)
        if key not in self._reason_numbers:
            self._reason_numbers[key] = len(self._reasons)
            self._reasons.append(reason)
        return self._reason_numbers[key]

    def reason(self, row: int) -> LeftOutError | None:
        """Return the reason noted for a row, and report the row no more."""
        self._state[row] = _GONE
        loss = self._losses[row]
        return None if loss < 0 else self._reasons[self._loss_reason[loss]]

    def close(self, on_left_out: OnLeftOut) -> int:
        """Report each row of which nothing is used; return the number of those used."""
        for row, state in enumerate(self._state):
            if state == _OPEN:
                loss = self._losses[row]
                assert loss >= 0, f"{self.origin(row)} is neither used nor left out"
                places = self._loss_texts[loss * len(_FIELDS) : (loss + 1) * len(_FIELDS)]
                texts = {
                    name: self.spill.read(at)
                    for name, at in zip(_FIELDS, places, strict=True)
                    if at >= 0
                }
                on_left_out(self.origin(row), self._reasons[self._loss_reason[loss]], texts)
        return self._state.count(_USED)

    def pairs_left_out(self) -> dict[str, tuple[int, str]]:
        """Return the pairs left out though a row of theirs is used: number and cure by reason.

        Such a row gives several pairs, or rates one of several replies; nothing else tells that
        pairs of it are missing. The most frequent reason comes first.
        """
        used = np.frombuffer(self._state, dtype=np.uint8) == _USED
        pairs = np.repeat(np.arange(len(self._pair_counts)), self._pair_counts)
        rows = np.array(self._pair_rows, dtype=np.int64)
        of_used = np.unique(pairs[used[rows]])
        found: Counter[str] = Counter()
        cures: dict[str, str] = {}
        numbers = np.array(self._pair_numbers, dtype=np.int64)[of_used]
        counts = np.bincount(np.array(self._pair_reason, dtype=np.int64)[of_used], numbers)
        for number in np.flatnonzero(counts).tolist():
            reason = self._reasons[number]
            found[reason.reason] += int(counts[number])
            cures.setdefault(reason.reason, reason.cure)
        ordered = sorted(found.items(), key=lambda item: (-item[1], item[0]))
        return {reason: (count, cures[reason]) for reason, count in ordered}


def _packed(row_id: str) -> bytes | None:
    """Return the 16 bytes of an id, None for a text that is not 32 hexadecimal digits."""
    try:
        raw = bytes.fromhex(row_id)
    except ValueError:
        return None
    return raw if len(raw) == _ID_BYTES and raw.hex() == row_id else None


def in_a_sentence(pairs: Mapping[str, tuple[int, str]]) -> str | None:
    """Return a sentence on pairs that are left out while their rows are used, None for none."""
    if not pairs:
        return None
    total = sum(count for count, _ in pairs.values())
    parts = [
        f"{count:,} × {reason}{f' ({cure})' if cure else ''}"
        for reason, (count, cure) in pairs.items()
    ]
    return f"pairs left out of rows that are used otherwise: {total:,} ({', '.join(parts)})"
