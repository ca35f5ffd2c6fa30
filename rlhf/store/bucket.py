"""Objects in a bucket that is no store of ours: data and models that others put there."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import ConfigError, StoreError
from rlhf.store.backend import Sink

if TYPE_CHECKING:
    from rlhf.store.s3 import S3Backend


@contextmanager
def open_bucket(field: str, uri: str, options: StoreConfig) -> Iterator[tuple[S3Backend, str]]:
    """The bucket of an s3:// URI and the key in it; errors in using it name the field."""
    from rlhf.store.s3 import S3Backend

    name, _, key = uri.removeprefix("s3://").partition("/")
    bucket = f"s3://{name}"
    try:
        yield S3Backend(bucket, options), key
    except StoreError as error:
        reason = str(error).removeprefix(f"{bucket}: ")
        raise type(error)(f"{field} = {uri!r}: {reason}") from None


def save_object(bucket: S3Backend, key: str, path: Path) -> None:
    """Download an object to a new file."""
    with path.open("wb") as file:
        bucket.get_file(key, Sink(file, lambda _: None))


def objects_under(field: str, uri: str, bucket: S3Backend, key: str) -> dict[str, tuple[str, int]]:
    """Entity tag and size of the object of this key, or of all in the folder of this name.

    Raises:
        ConfigError: There is none.
    """
    folder = f"{key.rstrip('/')}/" if key else ""
    found = {k: v for k, v in bucket.objects(key).items() if k == key or k.startswith(folder)}
    if not found:
        raise ConfigError(
            f"{field} = {uri!r}: bucket {bucket.bucket!r} holds no object of this name, "
            "and none under it; correct the key"
        )
    return found
