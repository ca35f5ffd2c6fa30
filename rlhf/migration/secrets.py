"""Values that may be credentials: they are neither copied nor shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

#: Names of what holds credentials, but for tokens of texts.
_NAMES = re.compile(
    r"(^|_)(token|api_?key|key|secret|password|passwd|credentials?|auth)(_|$)", re.I
)
_HARMLESS = re.compile(
    r"(eos|pad|bos|stop|new|max|include|num|input)_?tokens?|token_weights|tokens_", re.I
)
#: Keys of the Hugging Face Hub, wandb (40 hexadecimal digits), OpenAI, AWS and GitHub.
_VALUES = re.compile(
    r"hf_[A-Za-z0-9]{8,}|\bsk-[\w-]{16,}|AKIA[0-9A-Z]{12,}|gh[pousr]_\w{16,}|\b[0-9a-f]{40}\b"
    r"|://[^/\s]*@",
)


def is_secret(name: str, value: Any) -> bool:
    """Return whether a name is of a credential, or a value, at any depth, looks like one."""
    if _NAMES.search(name) and not _HARMLESS.search(name):
        return True
    if isinstance(value, Mapping):
        parts = cast("Mapping[Any, Any]", value)
        return any(is_secret(str(key), part) for key, part in parts.items())
    if isinstance(value, list | tuple):
        return any(is_secret("", part) for part in cast("list[Any]", value))
    return isinstance(value, str) and _VALUES.search(value) is not None
