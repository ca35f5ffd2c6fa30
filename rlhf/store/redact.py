"""Keeps secrets out of logs: boto3's debug log repeats signatures, tokens and presigned URLs."""

from __future__ import annotations

import logging
import os
import re
from typing import Any

_NAMES = r"X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature"
_PATTERNS = (
    # A presigned URL's query, and botocore's own line of it.
    re.compile(rf"(?P<name>(?:{_NAMES})(?:=|:\n))[^&\s'\",)]+", re.IGNORECASE),
    # A refusal of AWS repeats what was signed, and how.
    re.compile(
        r"(?P<name><(?:SignatureProvided|StringToSign|CanonicalRequest)(?:Bytes)?>)[^<]*",
        re.IGNORECASE,
    ),
    # A header as text, bytes or in a dict; a secret in a setting.
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
_CHATTY = ("boto3", "botocore", "s3transfer", "urllib3", "rlhf")


def redact(text: str) -> str:
    """The text without signatures, tokens, secret keys and passwords of URLs."""
    for pattern in _PATTERNS:
        text = pattern.sub(lambda match: match["name"] + _HIDDEN, text)
    for name in _VARIABLES:
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, _HIDDEN)
    return text


def keep_secrets_out_of_logs() -> None:
    """Rewrite the records of boto3, of what is below it, and of this project; once is enough.

    A logger's filter would not see what is logged on its children, and some of these are born
    later: only the making of a record is passed by all of them.
    """
    make: Any = logging.getLogRecordFactory()
    if getattr(make, "redacts", False):
        return

    def make_redacted(name: str, *args: Any, **kwargs: Any) -> logging.LogRecord:
        record: logging.LogRecord = make(name, *args, **kwargs)
        if name.partition(".")[0] in _CHATTY:
            _clean(record)
        return record

    make_redacted.redacts = True  # type: ignore[attr-defined]
    logging.setLogRecordFactory(make_redacted)


def _clean(record: logging.LogRecord) -> None:
    try:
        text = record.getMessage()
    except Exception:  # as logging does: a message that can't be formatted is no reason to fail
        return
    clean = redact(text)
    if clean != text:
        record.msg, record.args = clean, None
    if record.exc_info and record.exc_info[0]:
        # Formatters take the text of a traceback from here if it is there.
        record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
