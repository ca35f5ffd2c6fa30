"""Stop sequences: strings that end a reply, independent of token borders."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from rlhf.data.rendering import Renderer
from rlhf.errors import ConfigError


class StopSequences:
    """Decodes replies, finds stop sequences in their text, and cuts the text there.

    A sequence may span several tokens or end within one. Special tokens are not part of the text.

    Raises:
        ConfigError: A sequence contains a special token, so that it would never be found.
    """

    def __init__(self, renderer: Renderer, sequences: Sequence[str] = ()) -> None:
        self.renderer = renderer
        self.sequences = tuple(sequences)
        special = _special_tokens(renderer.tokenizer) if sequences else []
        for sequence in sequences:
            token = next((token for token in special if token in sequence), None)
            if token is not None:
                raise ConfigError(
                    f"ppo.env_config.stop_sequences: {sequence!r} holds the special token "
                    f"{token!r}, and the text of a reply holds none; remove it"
                )

    def __call__(self, rows: Sequence[Sequence[int]]) -> list[bool]:
        """Return for each row of a reply's token ids whether it contains a stop sequence."""
        return [self._cut(text) is not None for text in self.renderer.texts(rows)]

    def text(self, ids: Sequence[int]) -> str:
        """Decode the token ids up to the first stop sequence."""
        (text,) = self.renderer.texts([ids])
        return text[: self._cut(text)].strip()

    def count(self, text: str) -> int:
        """Count the tokens of a reply with this text, including its end-of-reply token."""
        return len(self.renderer.encode_reply(text))

    def _cut(self, text: str) -> int | None:
        """Return the index of the first stop sequence, None if there is none."""
        indices = [text.find(sequence) for sequence in self.sequences]
        return min((index for index in indices if index >= 0), default=None)


def _special_tokens(tokenizer: Any) -> list[str]:
    """Return the special tokens, which decoding skips."""
    # Those with a role, such as eos, and those that were added as special.
    added = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
    return [token for token in dict.fromkeys([*tokenizer.all_special_tokens, *added]) if token]
