"""Values that may be credentials: they are neither copied nor shown."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any, cast

#: Names of what holds credentials, in small letters with underscores.
_NAMES = re.compile(
    r"(^|_)(api_?keys?|access_?keys?|keys?|secrets?|passwords?|passwd|passphrase|pwd|pat"
    r"|credentials?|creds|auth|authorization|bearer|cookies?|sig|signature|token)(_|$)"
    r"|(tokens?|password|secret|apikey)$"
)
#: Names of tokens of texts and of keys of data: whole names, for `new_token` is a credential.
_HARMLESS = re.compile(
    r"(rl_|add_|map_|replace_|skip_)?((eos|pad|bos|unk|sep|cls|mask|stop|special)_tokens?(_ids?)?)"
    r"|(\w+_)?(max|min)_(\w+_)?tokens?|(include_)?num_(input_|output_)?tokens?(_seen)?"
    r"|(include_)?tokens_per_second|token_(weights|ids?|type_ids?)|chars_per_token"
    r"|(dataset_|prompt_|response_|label_)key"
)
#: Keys of the Hugging Face Hub, wandb (40 hexadecimal digits too), OpenAI, AWS, GitHub, GitLab,
#: Slack, Stripe and Google, JSON web tokens, and user names or passwords in an address.
_VALUES = re.compile(
    r"hf_[A-Za-z0-9]{8,}|\bsk-[\w-]{16,}|AKIA[0-9A-Z]{12,}|gh[pousr]_\w{8,}|github_pat_\w{8,}"
    r"|glpat-[\w-]{8,}|\bxox[a-z]-[\w-]{8,}|\b[sr]k_(live|test)_\w{8,}|AIza[\w-]{16,}"
    r"|wandb_v1_\w{8,}|\b[0-9a-f]{40}\b|\beyJ[\w-]{8,}\.[\w-]{8,}|\bbearer\s+\S|://[^/\s]*@",
    re.I,
)
#: A name with its value inside of a text: in an address's query, a mapping or a list of pairs.
_PAIRS = re.compile(r"(?:^|[?&;,#\s{\"'])([A-Za-z][\w.-]{0,80})[\"']?\s*[=:]\s*[^\s/]")


def is_secret(name: str, value: Any) -> bool:
    """Return whether a name is of a credential, or a value, at any depth, looks like one."""
    return is_secret_name(name) or holds_secret(value)


def is_secret_name(name: str) -> bool:
    """Return whether a name is of a credential."""
    words = re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name)  # accessToken
    words = re.sub(r"[\W_]+", "_", words).lower().strip("_")
    return bool(_NAMES.search(words)) and not _HARMLESS.fullmatch(words)


def holds_secret(value: Any) -> bool:
    """Return whether a value looks like a credential, or holds one at any depth."""
    if isinstance(value, Mapping):
        parts = cast("Mapping[Any, Any]", value)
        return any(is_secret(str(key), part) for key, part in parts.items())
    if isinstance(value, list | tuple):
        return any(holds_secret(part) for part in cast("list[Any]", value))
    if not isinstance(value, str):
        return False
    if _VALUES.search(value):
        return True
    return any(is_secret_name(found[1]) for found in _PAIRS.finditer(value))
