"""Upper bounds of token counts by bytes, so that short texts need not be tokenised."""

from __future__ import annotations

import json
import os
import unicodedata
from typing import Any

from rlhf.data.rendering import Renderer
from rlhf.data.rows import Prompt, messages_of
from rlhf.errors import PromptUnusable

#: Most UTF-8 bytes that Unicode normalisation makes of one (Unicode Standard Annex 15, 9.1).
_EXPANSION = {"NFC": 3}
#: Text of the turns that a template is measured with: one that it does not hold itself.
_TURN = "qzjx"


class TokenBound:
    """Tells by its bytes that a prompt or reply is short enough, for tokenizers of bytes.

    A byte-level BPE makes at most one token of each byte. A template's own text is measured once
    for each order of roles, with short turns. Any other tokenizer gets no bound.
    """

    def __init__(self, renderer: Renderer) -> None:
        self.renderer = renderer
        # A text that only the normalizer makes control tokens of is broken up by more spaces, and
        # what stands around a pair of texts is not in the prompt's text.
        unbounded = renderer.control.has_variants or not renderer.tokenizer.chat_template
        self._factor = None if unbounded else tokens_per_byte(renderer.tokenizer)
        #: Bytes that the template adds, by order of roles; None where it refuses the order.
        self._added: dict[tuple[str, ...], int | None] = {}
        self._control = [text.encode() for text in renderer.control.texts]

    def is_within(self, prompt: Prompt, max_prompt: int) -> bool:
        """Return True only if the template takes the prompt, and it has at most so many tokens."""
        if self._factor is None:
            return False
        messages = messages_of(prompt)
        roles = tuple(message["role"] for message in messages)
        if roles not in self._added:
            self._added[roles] = self._measure(roles)
        added = self._added[roles]
        if added is None:
            return False
        size = sum(len(m["content"]) for m in messages)
        if self._factor * (size + added) > max_prompt:  # bytes are no fewer than characters
            return False
        data = b"".join(m["content"].encode("utf-8", "surrogatepass") for m in messages)
        spaces = 0
        if any(self.renderer.control.occurs_in(m["content"]) for m in messages):
            # Escaping splits each control token by a space.
            spaces = sum(data.count(token) for token in self._control)
        return self._factor * (len(data) + added + spaces) <= max_prompt

    def may_be_equal(self, one: str, other: str, tokens: int) -> bool:
        """Return False only if two replies differ within their first tokens, so many."""
        if self._factor is None:
            return True
        one, other = (self.renderer.reply_text(text) for text in (one, other))
        if self._factor > 1:
            one, other = unicodedata.normalize("NFC", one), unicodedata.normalize("NFC", other)
        same = self.renderer.turn.lead
        same += os.path.commonprefix([one, other])  # noqa: RUF071 - of characters, as meant
        # A token has at least a byte. The first characters that differ may share three.
        return one == other or len(same.encode("utf-8", "surrogatepass")) + 3 >= tokens

    def _measure(self, roles: tuple[str, ...]) -> int | None:
        """Return the bytes that the template adds to turns of these roles."""
        try:
            text = self.renderer.prompt_text([{"role": r, "content": _TURN} for r in roles])
        except PromptUnusable:
            return None
        return len(text.encode("utf-8", "surrogatepass"))


def tokens_per_byte(tokenizer: Any) -> int | None:
    """Return the most tokens of one byte of text; None if that is not known.

    Known for BPE on bytes (GPT-2, Llama 3, Qwen, SmolLM2) without a prefix space, unnormalised or
    in NFC.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return None
    spec = json.loads(backend.to_str())
    steps = _steps(spec["pre_tokenizer"], "pretokenizers")
    is_byte_level = spec["model"]["type"] == "BPE" and any(s["type"] == "ByteLevel" for s in steps)
    if not is_byte_level or any(step.get("add_prefix_space") for step in steps):
        return None
    factor = 1
    for step in _steps(spec["normalizer"], "normalizers"):
        if step["type"] not in _EXPANSION:
            return None
        factor *= _EXPANSION[step["type"]]
    return factor


def _steps(spec: Any, field: str) -> list[Any]:
    """Return the steps of a sequence, or the only one."""
    if spec is None:
        return []
    return spec[field] if spec["type"] == "Sequence" else [spec]
