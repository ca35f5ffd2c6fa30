"""URIs of stores, taken literally: what a reader of URIs would drop is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import NamedTuple
from urllib.parse import unquote, urlsplit

_BUCKET = re.compile(r"[A-Za-z0-9._-]{1,255}")
_CONTROL = re.compile(r"[\x00-\x1f\x7f]")
#: A URI that lacks a slash, which would be the folder `s3:` here.
_BROKEN = re.compile(r"(s3[an]?|file|gs|az|abfss?|https?):", re.IGNORECASE)


class StorePlace(NamedTuple):
    """A store's bucket and prefix, or its folder, whose `~` stands for a home unless literal."""

    bucket: str = ""
    prefix: str = ""
    folder: Path | None = None
    is_literal: bool = False


def parse_store_uri(uri: str) -> StorePlace:
    """Return the place of a store: `file:///folder`, a path or `s3://bucket/prefix`.

    Raises:
        ValueError: It names none; the message does not repeat it, as it may hold a password.
    """
    scheme, separator, rest = uri.partition("://")
    if not separator:
        if not uri or "\0" in uri:
            raise ValueError("names no folder; write a path, file:///folder or s3://bucket/prefix")
        if _BROKEN.match(uri):
            raise ValueError(
                "begins like a URI and has no ://; write s3://bucket/prefix or file:///folder "
                "(a folder of that name: ./ before it)"
            )
        return StorePlace(folder=Path(uri))
    host, _, path = rest.partition("/")
    if "@" in host:
        raise ValueError("holds user info; give credentials by the AWS chain instead")
    if _CONTROL.search(unquote(uri)):
        raise ValueError("holds a control character; write it without")
    if scheme not in ("file", "s3"):
        raise ValueError(f"scheme {scheme[:40]!r} is not supported; use file:// or s3://")
    if mark := re.search(r"[?#]", rest):
        cure = (
            "options stand in store_options, and a prefix has none"
            if scheme == "s3"
            else f"write %{ord(mark[0]):X} for it, or a plain path"
        )
        raise ValueError(f"holds {mark[0]!r}; {cure}")
    if scheme == "file":
        if host not in ("", "localhost") or not path:
            raise ValueError("names no folder of this machine; write file:///folder")
        return StorePlace(folder=Path(unquote(f"/{path}")), is_literal=True)
    if not host:
        raise ValueError("names no bucket; write s3://bucket/prefix")
    if not _BUCKET.fullmatch(host):
        raise ValueError("names a bucket that can't be one; use letters, digits, '.', '-' and '_'")
    parts = path.rstrip("/").split("/") if path.strip("/") else []
    if {"", ".", ".."} & {*parts}:
        raise ValueError("has a part of its prefix that is empty, . or ..; write it without")
    return StorePlace(host, path.strip("/"))


def bucket_and_prefix(uri: str) -> tuple[str, str]:
    """Return the parts of an `s3://bucket/prefix`, literally."""
    bucket, _, prefix = uri.removeprefix("s3://").partition("/")
    return bucket, prefix.strip("/")


def check_endpoint(url: str) -> None:
    """Check that a server's address is one, and holds nothing that its reader would drop.

    Raises:
        ValueError: It does not; the message does not repeat it, as it may hold a password.
    """
    cure = "write http://host:port or https://host"
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError:
        raise ValueError(f"is no valid address; {cure}") from None
    if "@" in parts.netloc:
        raise ValueError("holds user info; give credentials by the AWS chain instead")
    if parts.scheme not in ("http", "https") or not parts.hostname or port == 0:
        raise ValueError(f"is no address of a server; {cure}")
    if re.search(r"[?#\\\s\x00-\x1f\x7f]", url):
        raise ValueError(f"holds ?, #, a backslash or a space; {cure}")
