"""Control tokens of a tokenizer, kept out of the text that users and models write.

A control token structures a conversation: it ends or opens a turn, or marks thoughts or tools. A
text that spells one must not produce its id.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from rlhf.data.chat_template import encode_reply_text

#: Rounds of breaking up tokens that only the tokenizer's normalizer makes of a text.
_ROUNDS = 4
#: An added token that looks like a marker. Tags of HTML look like it too, and are content.
_MARKER = re.compile(r"<\S+>|\[\S+\]|\|\S+\||｜\S+｜")
_HTML = re.compile(
    r"</?(?:table|caption|t(?:head|body|foot|r|h|d)|h[1-6]|blockquote|strong|em|b|i|u|s|su[bp]|"
    r"code|pre|p|a|ul|ol|li|br|hr|div|span|img)>"
)


#: Marker of this project's template behind which a reply begins; no reply may hold it, for a reward
#: model with `pooling: sum` counts from the last one.
ASSISTANT = "<|assistant|>"


class ControlTokens:
    """The control tokens of a tokenizer and its chat template.

    These are all special tokens and, of the other added tokens, those that the template names and
    those that look like markers: `<think>` is one; runs of spaces and tags of HTML are text.

    Args:
        tokenizer: A tokenizer of transformers.
        end_ids: Tokens that end a reply; they need not be special.
    """

    def __init__(self, tokenizer: Any, end_ids: Iterable[int] = ()) -> None:
        self._tokenizer = tokenizer
        added = {str(token): token for token in tokenizer.added_tokens_decoder.values()}
        template = str(tokenizer.chat_template or "")
        special = [text for text, token in added.items() if token.special]
        ends = [str(tokenizer.convert_ids_to_tokens(i)) for i in end_ids]
        markers = [t for t in added if _is_marker(t, template)]
        names = dict.fromkeys([*tokenizer.all_special_tokens, *special, *ends, *markers])
        self.texts = [text for text in names if text.strip()]
        """Control tokens as text. A line break, which may end a reply, is content elsewhere."""
        ids = dict(zip(self.texts, tokenizer.convert_tokens_to_ids(self.texts), strict=True))
        # An unknown character gives unk, which says nothing about the text's turns.
        unknown = {tokenizer.unk_token_id} - set(end_ids)
        self._ids = frozenset(ids.values()) - unknown
        never = {*special, *ends, ASSISTANT}
        in_replies = {t: ids[t] for t in self.texts if t not in markers or t in never}
        self._reply_texts = list(in_replies)
        self._reply_ids = frozenset(in_replies.values()) - unknown
        self._pattern = re.compile("|".join(re.escape(text) for text in self.texts) or r"(?!)")
        self.has_variants = _normalizes(tokenizer) and any(
            added[text].normalized for text in self.texts if text in added
        )
        """True if a text may give a control token that it does not spell, such as in capitals."""

    def occurs_in(self, content: str) -> bool:
        """Return whether a text spells a control token."""
        return self._pattern.search(content) is not None

    def escape(self, content: str) -> str:
        """Break up the control tokens of a text by a space, so that it can't end or open a turn."""
        if self.occurs_in(content):
            content = _broken(content, self.texts)
        return self._without_variants(content) if self.has_variants else content

    def encode(self, text: str, lead: str = "", anchor: str = "") -> list[int]:
        """Return the token ids of a reply's text, in which no special or end token occurs.

        What it spells of them is tokenised as plain text where the tokenizer can do that, and is
        otherwise broken up. Markers that are not special, such as `<think>`, are what they are.
        For `lead` and `anchor` see `TurnFormat`.
        """
        ids = encode_reply_text(self._tokenizer, text, lead, anchor)
        if self._reply_ids.isdisjoint(ids):
            return ids
        # A Unigram model takes a special token for a piece, though it is not to parse it.
        text = _broken(text, self._reply_texts)
        ids = encode_reply_text(self._tokenizer, text, lead, anchor)
        return [i for i in ids if i not in self._reply_ids]

    def _without_variants(self, content: str) -> str:
        """Break up what the tokenizer's normalizer makes control tokens of."""
        for _ in range(_ROUNDS):
            spans = self._spans(content)
            if not spans:
                return content
            for start, end in reversed(spans):
                first = end - len(content[start:end].lstrip()) + 1
                content = f"{content[:first]} {content[first:]}"
        while spans := self._spans(content):
            start, end = spans[0]
            content = content[:start] + content[max(end, start + 1) :]
        return content

    def _spans(self, content: str) -> list[tuple[int, int]]:
        """Return the positions of control tokens that the tokenizer finds in a text."""
        encoding = self._tokenizer(content, add_special_tokens=False, return_offsets_mapping=True)
        found = zip(encoding["input_ids"], encoding["offset_mapping"], strict=True)
        return [(start, end) for i, (start, end) in found if i in self._ids]


def _is_marker(token: str, template: str) -> bool:
    if not token.strip() or _HTML.fullmatch(token):
        return False
    return token in template or _MARKER.fullmatch(token) is not None


def _broken(text: str, tokens: Iterable[str]) -> str:
    for token in tokens:
        text = text.replace(token, f"{token[0]} {token[1:]}" if len(token) > 1 else " ")
    return text


def _normalizes(tokenizer: Any) -> bool:
    """Return whether a tokenizer's normalizer may change a text beyond its spaces."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        return False
    normalizer = json.loads(backend.to_str())["normalizer"]
    steps = [normalizer] if normalizer else []
    if normalizer and normalizer["type"] == "Sequence":
        steps = normalizer["normalizers"]
    plain = ("Prepend", "Strip")
    return any(
        step["type"] not in plain
        and not (step["type"] == "Replace" and step["pattern"] == {"String": " "})
        for step in steps
    )
