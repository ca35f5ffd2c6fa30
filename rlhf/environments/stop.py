"""Stop sequences: text that ends a reply, wherever it falls among the tokens."""

from __future__ import annotations

from collections.abc import Sequence

from rlhf.data.rendering import Renderer


class Ending:
    """Finds stop sequences in replies and cuts them off; without any, it only decodes.

    It looks at the text, so that a sequence may span several tokens, or end inside of one.
    """

    def __init__(self, renderer: Renderer, sequences: Sequence[str] = ()) -> None:
        self.tokenizer = renderer.tokenizer
        self.sequences = tuple(sequences)

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """Whether each row of a reply's token ids holds a stop sequence."""
        return [self._cut(text) is not None for text in self._decode(rows)]

    def text(self, ids: Sequence[int]) -> str:
        """Text of the token ids, up to the first stop sequence."""
        (text,) = self._decode([ids])
        return text[: self._cut(text)].strip()

    def count(self, text: str) -> int:
        """Tokens of a reply with this text, its end included."""
        ids = self.tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        return len(ids) + 1

    def _decode(self, rows: Sequence[Sequence[int]]) -> list[str]:
        return self.tokenizer.batch_decode([list(row) for row in rows], skip_special_tokens=True)

    def _cut(self, text: str) -> int | None:
        places = [text.find(sequence) for sequence in self.sequences]
        return min((place for place in places if place >= 0), default=None)
