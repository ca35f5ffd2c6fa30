"""Keeps secrets out of logs: boto3's debug log repeats signatures, tokens and presigned URLs."""

from __future__ import annotations

import logging
import os
import re

_NAMES = r"X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature"
_PATTERNS = (
    # A presigned URL's query; a header as text, bytes or in a dict; a secret in a setting.
    re.compile(rf"(?P<name>(?:{_NAMES})=)[^&\s'\",)]+", re.IGNORECASE),
    re.compile(r"(?P<name>x-amz-security-token['\"]?\s*[:=]\s*b?['\"]?)[^\s'\",}]+", re.IGNORECASE),
    re.compile(r"(?P<name>Authorization['\"]?\s*[:=]\s*b?['\"]?)[^\r\n'\"}]+", re.IGNORECASE),
    re.compile(
        r"(?P<name>(?:aws_)?(?:secret_?(?:access_?)?key|session_?token)['\"]?\s*[:=]\s*b?['\"]?)"
        r"[^\s'\",}&]+",
        re.IGNORECASE,
    ),
    re.compile(r"(?P<name>://)[^/@\s]+@"),
)
_VARIABLES = ("AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_HIDDEN = "***"
_CHATTY = (
    "boto3", "botocore", "s3transfer", "urllib3", "rlhf",
)  # fmt: skip


def redact(text: str) -> str:
    """The text without signatures, tokens, secret keys and passwords of URLs."""
    for pattern in _PATTERNS:
        text = pattern.sub(lambda match: match["name"] + _HIDDEN, text)
    for name in _VARIABLES:
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, _HIDDEN)
    return text


class _Redacted(logging.Filter):
    """Rewrites a record; a filter on a logger acts before any handler sees it."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Let every record pass, its text redacted."""
        try:
            text = record.getMessage()
        except Exception:
            return True
        clean = redact(text)
        if clean != text:
            record.msg, record.args = clean, None
        return True


_FILTER = _Redacted()


def keep_secrets_out_of_logs() -> None:
    """Filter every logger of boto3 and of what is below it; cheap to call again.

    A logger's filter sees only what is logged on it, not on its children, so each gets it.
    """
    for name in [*logging.root.manager.loggerDict, *_CHATTY]:
        if name.partition(".")[0] in _CHATTY:
            logging.getLogger(name).addFilter(_FILTER)
