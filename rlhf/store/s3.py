"""A bucket of S3, or of a compatible server, as an object store.

Limits and workarounds come from measurements on Ceph RGW and OpenStack Swift.
"""

from __future__ import annotations

import contextlib
import io
import threading
import time
import uuid
from base64 import b64encode
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import md5
from pathlib import Path
from typing import Any

from botocore.exceptions import ClientError

from rlhf.config.pipeline import StoreConfig
from rlhf.config.store_uri import bucket_and_prefix
from rlhf.errors import ArtifactMissing, StoreConfigError, StoreError
from rlhf.files import is_file
from rlhf.permissions import check_s3_options
from rlhf.store.objects import ObjectInfo, Sink, Source, in_parallel
from rlhf.store.s3_client import make_client
from rlhf.store.s3_errors import (
    ERRORS,
    code_of,
    failed,
    is_unsupported,
    refused,
    status_of,
    wants_digest,
)
from rlhf.store.s3_reading import age_of, date_of, is_archived, read_object, receive_object

_MIB = 1024 * 1024

#: Pause in seconds before the first retry of requests that boto3 does not repeat; then doubled.
PAUSE = 0.1
#: How long botocore waits for "100 Continue" before it sends a body.
_CONTINUE_SECONDS = 1.0
#: Codes of objects that are not there, of which removals think nothing.
_ABSENT = ("404", "NoSuchKey", "NotFound")
#: Statuses of refused conditional writes: the object exists (412, at some servers 304), is being
#: written (409), or the server may not know the condition.
_CONDITIONAL = ("412", "304", "409", "501", "400", "405")
#: Bytes of an upload's part: just more than the freed buffers that malloc keeps.
_PART = 32 * _MIB
#: S3's limit on the parts of an upload.
_MOST_PARTS = 10_000
#: Parts that are in memory and being sent.
_SENDING = threading.BoundedSemaphore(4)


@dataclass
class _Abilities:
    """Capabilities and demands of a server, as found out; shared by all backends of a store."""

    conditional: bool = True
    """It knows `If-None-Match: *`."""
    deletes_many: bool = True
    """It removes many objects by one request."""
    wants_digest: bool = False
    """It takes writes only with Content-MD5, as a bucket with object lock does."""


class S3Backend:
    """An object store in a bucket, under a prefix. Opening it makes no request."""

    def __init__(
        self,
        uri: str,
        options: StoreConfig,
        connect_timeout: float = 10,
        read_timeout: float = 60,
        attempts: int = 5,
        client: Any = None,
        abilities: _Abilities | None = None,
    ) -> None:
        self.bucket, prefix = bucket_and_prefix(uri)
        self._prefix = f"{prefix}/" if prefix else ""
        self.uri = f"s3://{self.bucket}/{self._prefix}".rstrip("/")
        self.atomic: bool | None = None
        self._options = options
        self._can = abilities or _Abilities()
        settings = {"ServerSideEncryption": options.sse, "SSEKMSKeyId": options.sse_kms_key_id}
        self._extra = {name: value for name, value in settings.items() if value}
        check_s3_options(options.endpoint_url, options.profile, options.ca_bundle)
        if options.ca_bundle and not is_file(Path(options.ca_bundle)):
            raise StoreConfigError(
                f"{self.uri}: ca_bundle {options.ca_bundle} is not a file; name the certificate's"
            )
        with self._translated("open"):
            self._client: Any = client or make_client(
                options, connect_timeout, read_timeout, attempts
            )
            if not client:
                self._client.meta.events.register("before-send.s3.PutObject", _HeldBody.begin)
        self.location = f"{self.uri} at {self._client.meta.endpoint_url}"

    def hurried(self, seconds: float) -> S3Backend:
        """Return a backend with a client of its own, a short timeout and few retries."""
        return S3Backend(self.uri, self._options, seconds, seconds, attempts=2, abilities=self._can)

    def close(self) -> None:
        """Close the client's idle connections."""
        self._client.close()

    def child(self, name: str) -> S3Backend:
        """Return a backend for a longer prefix, with the same client and known properties."""
        uri = f"{self.uri}/{name}"
        other = S3Backend(uri, self._options, client=self._client, abilities=self._can)
        other.atomic = self.atomic
        return other

    def put_new(self, key: str, data: bytes) -> bool:
        """Create by `If-None-Match: *`; without it (501), check before the write."""
        # boto3 repeats a request whose answer was lost: the 412 may then be for this very object.
        writer = uuid.uuid4().hex
        for attempt in range(6):
            if not self._can.conditional and self.find(key) is not None:
                return False
            condition = {"IfNoneMatch": "*"} if self._can.conditional else {}
            try:
                with self._translated("write", key, _CONDITIONAL if condition else ("409",)):
                    self._put(key, data, Metadata={"writer": writer}, **condition)
                    return True
            except ClientError as error:
                if status_of(error) in ("412", "304"):
                    return self._writer(key) == writer
                if self._lacks_conditions(error):
                    continue
                if status_of(error) != "409":
                    with self._translated("write", key):
                        raise
                time.sleep(PAUSE / 2 * 2**attempt)
        raise StoreError(f"{self.uri}: {key} is being written by others; try again")

    def put_new_held(self, key: str, data: bytes, hold: Callable[[], None]) -> bool | None:
        """Send head and first byte, call `hold`, then send the rest of the body."""
        body, writer = _HeldBody(data, hold), uuid.uuid4().hex
        try:
            with self._translated("write", key, _CONDITIONAL):
                self._put(key, body, Metadata={"writer": writer}, IfNoneMatch="*")
                won = True
        except ClientError as error:
            self._lacks_conditions(error)
            won = self._writer(key) == writer
        return won if body.was_held and body.sends == 1 else None

    def put(self, key: str, data: bytes) -> None:
        """Store in one request, whose signature covers the body against flipped bits."""
        with self._translated("write", key):
            self._put(key, data)

    def put_file(self, key: str, source: Source) -> None:
        """Upload in parts, completed only if the file has not changed meanwhile.

        s3transfer has no hook for that check, and needs several times the memory.
        """
        address = self._address(key)
        with self._translated("write", key):
            upload = self._client.create_multipart_upload(**address, **self._extra)
            self._check_encryption(key, upload)
            address["UploadId"] = upload["UploadId"]
            try:
                size = max(_PART, -(-source.size // _MOST_PARTS))
                numbers = range(1, -(-source.size // size) + 1)
                tags = in_parallel(lambda n: self._put_part(address, source, n, size), numbers)
                source.check()
                parts = [{"PartNumber": n, "ETag": t} for n, t in zip(numbers, tags, strict=True)]
                self._client.complete_multipart_upload(**address, MultipartUpload={"Parts": parts})
            except BaseException:
                # If this fails, `sweep` aborts it later.
                with contextlib.suppress(*ERRORS):
                    self._client.abort_multipart_upload(**address)
                raise

    def get_bytes(self, key: str, limit: int) -> bytes:
        """Read in one request."""
        with self._translated("read", key):
            return read_object(self._client, self._address(key), limit, lambda body: body.read())[0]

    def get_file(self, key: str, sink: Sink) -> None:
        """Read in ranges; StoreError if the object is replaced meanwhile."""
        with self._translated("read", key, ("412", "416")):
            try:
                receive_object(self._client, self._address(key), sink)
            except ClientError as error:
                status = status_of(error)
                if status == "416" and not sink.size:
                    return  # an empty object has no ranges
                if status not in ("412", "416"):
                    raise
                message = f"{self.uri}: {key} changed while it was being read; try again"
                raise StoreError(message) from None

    def find(self, key: str) -> ObjectInfo | None:
        """Send HEAD; a missing bucket looks like a missing object."""
        with self._translated("read", key):
            head = self._head(key)
            if head is None:
                return None
            age = age_of(head["LastModified"], date_of(head))
            return ObjectInfo(head["ContentLength"], age, is_archived(head))

    def list(self, prefix: str) -> dict[str, ObjectInfo]:
        """List all pages."""
        with self._translated("list", prefix):
            objects = {
                item["Key"]: ObjectInfo(item["Size"], age_of(item["LastModified"], date_of(page)))
                for page, item in self._items(prefix)
            }
        return {key.removeprefix(self._prefix): objects[key] for key in sorted(objects)}

    def objects(self, prefix: str) -> dict[str, tuple[str, int]]:
        """Return entity tag and size of all objects with the prefix."""
        with self._translated("list", prefix):
            items = [item for _, item in self._items(prefix)]
        return {i["Key"].removeprefix(self._prefix): (i["ETag"], i["Size"]) for i in items}

    def delete(self, keys: Iterable[str]) -> None:
        """Delete up to a thousand objects per request, or one by one where a server can't."""
        pending = list(keys)
        for batch in (pending[at : at + 1000] for at in range(0, len(pending), 1000)):
            if not (self._can.deletes_many and self._delete_many(batch)):
                in_parallel(self._delete_one, batch)

    def sweep(self, age: float) -> int:
        """Abort the multipart uploads of killed publishers, which no listing shows."""
        swept = 0
        with self._translated("list", "unfinished uploads"):
            for page in self._pages("list_multipart_uploads", ""):
                for upload in page.get("Uploads", ()):
                    if age_of(upload["Initiated"], date_of(page)) >= age:
                        address = {"Key": upload["Key"], "UploadId": upload["UploadId"]}
                        with contextlib.suppress(self._client.exceptions.NoSuchUpload):
                            self._client.abort_multipart_upload(Bucket=self.bucket, **address)
                            swept += 1
        return swept

    def versions(self) -> str:
        """Say whether a versioned bucket keeps the bytes of removed objects."""
        try:
            with self._translated("read the versioning of", "the bucket", ("501",)):
                status = self._client.get_bucket_versioning(Bucket=self.bucket).get("Status")
        except ClientError:
            return ""  # a server that has no versions
        except StoreError:
            return (
                f"whether bucket {self.bucket} keeps versions of removed objects could not be read "
                "(it takes the right s3:GetBucketVersioning); if it does, their bytes stay"
            )
        if status not in ("Enabled", "Suspended"):
            return ""
        which = "removed objects" if status == "Enabled" else "objects from before that"
        lock = ", and its object lock has ended" if self._is_locked() else ""
        return (
            f"bucket {self.bucket} has versioning {status.lower()}: the bytes of {which} stay, as "
            "noncurrent versions, until a lifecycle rule removes them (NoncurrentVersionExpiration "
            f"with NoncurrentDays, and ExpiredObjectDeleteMarker){lock}"
        )

    def _is_locked(self) -> bool:
        """Return whether the bucket has object lock; False too if that can't be read."""
        with contextlib.suppress(*ERRORS):
            answer = self._client.get_object_lock_configuration(Bucket=self.bucket)
            return answer["ObjectLockConfiguration"].get("ObjectLockEnabled") == "Enabled"
        return False

    def _put(self, key: str, data: bytes | io.BytesIO, **extra: Any) -> None:
        address = {**self._address(key), **self._extra, **extra}
        answer = self._send(self._client.put_object, data, address)
        if "ETag" not in answer:  # S3 never omits it: something else answers here
            raise KeyError("ETag")
        self._check_encryption(key, answer)

    def _send(
        self, request: Callable[..., Any], body: bytes | io.BytesIO, options: dict[str, Any]
    ) -> dict[str, Any]:
        """Send a body, with its MD5 where the server asks for a checksum in the head."""

        def digest() -> dict[str, str]:
            if not self._can.wants_digest:
                return {}
            data = body if isinstance(body, bytes) else body.getvalue()
            return {"ContentMD5": b64encode(md5(data, usedforsecurity=False).digest()).decode()}

        sent = digest()
        try:
            return request(**options, **sent, Body=body)
        except ClientError as error:
            if sent or not wants_digest(error):
                raise
        self._can.wants_digest = True
        if not isinstance(body, bytes):
            body.seek(0)
        return request(**options, **digest(), Body=body)

    def _delete_many(self, keys: list[str]) -> bool:
        """Delete by one request; False if the server has none for that."""
        objects = [{"Key": self._prefix + key} for key in keys]
        with self._translated("delete", keys[0]):
            try:
                answer = self._client.delete_objects(
                    Bucket=self.bucket, Delete={"Objects": objects, "Quiet": True}
                )
            except ClientError as error:
                if not is_unsupported(error):
                    raise
                self._can.deletes_many = False
                return False
            for error in answer.get("Errors", ()):
                if error.get("Code") not in _ABSENT:  # which some servers list
                    raise ClientError({"Error": error}, "DeleteObjects")
        return True

    def _delete_one(self, key: str) -> None:
        with self._translated("delete", key):
            try:
                self._client.delete_object(**self._address(key))
            except ClientError as error:
                if code_of(error) not in _ABSENT:
                    raise

    def _put_part(self, address: dict[str, str], source: Source, number: int, size: int) -> str:
        with _SENDING:
            data = source.read_at((number - 1) * size, size)
            options = {**address, "PartNumber": number}
            answer = self._send(self._client.upload_part, data, options)
            source.sent(len(data))
            return answer["ETag"]

    def _check_encryption(self, key: str, answer: dict[str, Any]) -> None:
        if self._extra and not answer.get("ServerSideEncryption"):
            raise StoreConfigError(
                f"{self.uri}: the server took {key}, but does not say that it encrypts it; remove "
                "sse from the options, or use another server"
            )

    def _lacks_conditions(self, error: ClientError) -> bool:
        """Note if a refusal shows that the server has no conditional writes.

        One that was proven to have them is not taken to lack them by a later refusal.
        """
        lacks = self.atomic is not True and is_unsupported(error)
        if lacks:
            self._can.conditional = self.atomic = False
        return lacks

    def _writer(self, key: str) -> str | None:
        head = self._head(key)
        return None if head is None else head["Metadata"].get("writer")

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            with self._translated("read", key):
                return self._client.head_object(**self._address(key))
        except ArtifactMissing:
            return None

    def _items(self, prefix: str) -> Iterator[tuple[dict[str, Any], dict[str, Any]]]:
        """Yield each object with its page of the listing."""
        for page in self._pages("list_objects_v2", prefix):
            if "Name" not in page and "IsTruncated" not in page:
                raise KeyError("Name")  # an answer, but not that of S3: no listing is empty so
            for item in page.get("Contents", ()):
                yield page, item

    def _pages(self, operation: str, prefix: str) -> Iterable[dict[str, Any]]:
        pages = self._client.get_paginator(operation)
        return pages.paginate(Bucket=self.bucket, Prefix=self._prefix + prefix)

    def _address(self, key: str) -> dict[str, str]:
        """Return bucket and key as arguments of boto3."""
        return {"Bucket": self.bucket, "Key": self._prefix + key}

    @contextlib.contextmanager
    def _translated(self, verb: str, key: str = "", passed: tuple[str, ...] = ()) -> Iterator[None]:
        """Translate errors of boto3 to StoreErrors, except HTTP statuses in `passed`."""
        try:
            yield
        except StoreError:
            raise
        except ERRORS as error:
            what = f"{self.uri}: can't {verb} {key}".rstrip()
            if isinstance(error, ClientError):
                if status_of(error) in passed:
                    raise
                reading = verb == "read"
                raise refused(what, self.uri, key, self.bucket, error, reading=reading) from None
            client: Any = getattr(self, "_client", None)
            endpoint = client.meta.endpoint_url if client else self._options.endpoint_url or "AWS"
            raise failed(what, endpoint, error, opening=verb == "open") from None


class _HeldBody(io.BytesIO):
    """A request body that calls `hold` between its first byte and the others.

    It does so only if the server has answered "100 Continue", and so has read the head. boto3
    waits for that answer for a second, and sends the body without it after that.
    """

    def __init__(self, data: bytes, hold: Callable[[], None]) -> None:
        super().__init__(data)
        self._hold = hold
        self._continued = False
        self._begun = 0.0
        self.sends = 0
        self.was_held = False

    @staticmethod
    def begin(request: Any, **_: Any) -> None:
        """Handle boto3's event before a request is sent; earlier reads are for signing."""
        if isinstance(request.body, _HeldBody):
            request.body.sends += 1
            request.body._begun = time.monotonic()

    def read(self, size: int | None = -1) -> bytes:
        """Return the first byte alone; `hold` is called before the second is returned."""
        if self.sends != 1:
            return super().read(size)
        if self.tell() == 0:
            self._continued = time.monotonic() - self._begun < _CONTINUE_SECONDS
            return super().read(1)
        if self._continued and not self.was_held:
            self.was_held = True
            self._hold()
        return super().read(size)
