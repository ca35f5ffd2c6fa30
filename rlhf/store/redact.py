"""Redaction of secrets in logs.

boto3's debug log holds signatures, tokens and presigned URLs.
"""

from __future__ import annotations

import logging
import os
import re
from typing import Any

_NAMES = r"X-Amz-(?:Signature|Credential|Security-Token)|AWSAccessKeyId|Signature"
_PATTERNS = (
    # The query of a presigned URL, and botocore's log line of it.
    re.compile(rf"(?P<name>(?:{_NAMES})(?:=|:\n))[^&\s'\",)]+", re.IGNORECASE),
    # An AWS error repeats the signed text and its signature.
    re.compile(
        r"(?P<name><(?:SignatureProvided|StringToSign|CanonicalRequest)(?:Bytes)?>)[^<]*",
        re.IGNORECASE,
    ),
    # Headers as text, bytes or in a dict; secrets in settings.
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
    """Remove signatures, tokens, secret keys and passwords in URLs from a text."""
    for pattern in _PATTERNS:
        text = pattern.sub(lambda match: match["name"] + _HIDDEN, text)
    for name in _VARIABLES:
        secret = os.environ.get(name)
        if secret:
            text = text.replace(secret, _HIDDEN)
    return text


def keep_secrets_out_of_logs() -> None:
    """Redact the log records of boto3, its dependencies and this project.

    Further calls do nothing. A filter on a logger does not see the records of its children, some of
    which are created later; the record factory sees all.
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
    except Exception:  # as logging does: a malformed message must not raise
        return
    clean = redact(text)
    if clean != text:
        record.msg, record.args = clean, None
    if record.exc_info and record.exc_info[0]:
        # Formatters use this text of the traceback if it is set.
        record.exc_text = redact(logging.Formatter().formatException(record.exc_info))
