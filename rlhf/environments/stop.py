"""Stop sequences: text that ends a reply, wherever it falls among the tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.data.rendering import Renderer
from rlhf.errors import ConfigError


class Ending:
    """Finds stop sequences in replies and cuts them off; without any, it only decodes.

    It looks at the text, so that a sequence may span several tokens, or end inside of one. Special
    tokens are left out of the text.

    Raises:
        ConfigError: A sequence holds a special token, so that it would never be found.
    """

    def __init__(self, renderer: Renderer, sequences: Sequence[str] = ()) -> None:
        self.tokenizer = renderer.tokenizer
        self.sequences = tuple(sequences)
        special = _special(self.tokenizer) if sequences else []
        for sequence in sequences:
            token = next((token for token in special if token in sequence), None)
            if token is not None:
                raise ConfigError(
                    f"ppo.env_config.stop_sequences: {sequence!r} holds the special token "
                    f"{token!r}, and the text of a reply holds none; remove it"
                )

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


def _special(tokenizer: Any) -> list[str]:
    """Tokens that decoding leaves out: those of a role, and others that were added as special."""
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    return [token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if token]
