"""Choice of the backend for a store's URI."""

from __future__ import annotations

from pathlib import Path
from urllib.parse import unquote, urlsplit

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import StoreConfigError
from rlhf.files import at_home
from rlhf.store.backend import Backend
from rlhf.store.local import LocalBackend


def backend_of(uri: str, options: StoreConfig) -> Backend:
    """Return the backend of a folder (`file:///…`, a path) or bucket (`s3://…`).

    Raises:
        StoreConfigError: The URI is neither.
    """
    parts = urlsplit(uri)
    if "@" in parts.netloc:
        raise StoreConfigError("the store's URI holds user info; use the AWS chain instead")
    if parts.scheme == "s3" and parts.netloc:
        from rlhf.store.s3 import S3Backend

        return S3Backend(uri, options)
    if parts.scheme == "file" and parts.netloc in ("", "localhost") and parts.path:
        return LocalBackend(Path(unquote(parts.path)).resolve())
    folder = at_home(uri)
    if uri and "://" not in uri and not str(folder).startswith("~"):
        return LocalBackend(folder.resolve())
    raise StoreConfigError(
        f"{uri!r} is no store; write file:///folder, a plain path or s3://bucket/prefix"
    )
