"""Meanings of the configuration's fields: the first sentence of each one's docstring."""

from __future__ import annotations

import re
from typing import Any

from rlhf.config.pipeline import PipelineConfig
from rlhf.config.section import member_types, sections

#: End of a sentence; `e. g.` and decimals are none.
_END = re.compile(r"(?<=[^\s.]{2}[.!?)])\s+(?=[A-Z`\"(])")


def meaning(key: str) -> str:
    """Return what a field with this dotted name is, in a sentence; empty if it is not known.

    A name within a mapping, such as that of a component, has the mapping's meaning.
    """
    types: tuple[Any, ...] = (PipelineConfig,)
    found = ""
    for name in key.split("."):
        for section in sections(types):
            field = section.model_fields.get(name)
            if field is not None and field.description:
                found = first_sentence(field.description)
                break
        types = member_types(types, name) or ()
    return found


def first_sentence(text: str) -> str:
    """Return the first sentence of a docstring as one line."""
    line = " ".join(text.split())
    return _END.split(line, maxsplit=1)[0]
