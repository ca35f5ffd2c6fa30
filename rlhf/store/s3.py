"""S3 and what speaks like it; the rules come from measurements on Ceph RGW and Swift."""

from __future__ import annotations

import contextlib
import time
import uuid
from collections.abc import Iterator
from pathlib import Path
from textwrap import shorten
from typing import Any
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import Boto3Error
from boto3.s3.transfer import TransferConfig
from botocore.config import Config
from botocore.exceptions import (
    BotoCoreError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    CredentialRetrievalError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    InvalidConfigError,
    NoCredentialsError,
    NoRegionError,
    ParamValidationError,
    PartialCredentialsError,
    ProfileNotFound,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import ArtifactCorrupt, ArtifactMissing, StoreConfigError, StoreError
from rlhf.store.manifest import PublishError, file_sha256, sha256_bytes

MIB = 1024 * 1024
SMALL = 8 * MIB
TRANSFER = TransferConfig(
    multipart_threshold=32 * MIB,
    multipart_chunksize=32 * MIB,
    max_concurrency=4,
    io_chunksize=MIB,
    preferred_transfer_client="classic",
)
_BROKEN = (ConnectionClosedError, IncompleteReadError, ResponseStreamingError)
_CUT = (ReadTimeoutError, *_BROKEN)
_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)
_SETTINGS = (ProfileNotFound, InvalidConfigError, NoRegionError, ParamValidationError, ValueError)
_UNREACHABLE = (EndpointConnectionError, ConnectTimeoutError, BotoConnectionError, HTTPClientError)
_DENIED = {
    "403": "access denied",
    "AccessDenied": "access denied",
    "AllAccessDisabled": "access denied",
    "InvalidAccessKeyId": "the server does not know this access key",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is not valid",
}


class S3Backend:
    """One bucket and prefix. Opening it makes no request to the server."""

    def __init__(
        self,
        uri: str,
        options: StoreConfig,
        connect_timeout: float = 10,
        read_timeout: float = 60,
        attempts: int = 5,
    ) -> None:
        parts = urlsplit(uri)
        self.bucket = parts.netloc
        self._prefix = parts.path.strip("/") + "/" if parts.path.strip("/") else ""
        self.uri = f"s3://{self.bucket}/{self._prefix}".rstrip("/")
        self._options = options
        self._conditional = True
        if options.ca_bundle and not Path(options.ca_bundle).is_file():
            raise StoreConfigError(f"{self.uri}: ca_bundle {options.ca_bundle} is not a file")
        config = Config(
            connect_timeout=connect_timeout,
            read_timeout=read_timeout,
            retries={"mode": "standard", "total_max_attempts": attempts},
            max_pool_connections=40,
            # Over HTTPS, Ceph refuses every upload with boto3's default trailing checksum.
            request_checksum_calculation="when_required",
            response_checksum_validation="when_required",
        )
        with self._translated("open"):
            session = boto3.Session(profile_name=options.profile, region_name=options.region)
            # boto3 addresses a bucket by path whenever an endpoint is set, by options or chain.
            self._client: Any = session.client(
                "s3", endpoint_url=options.endpoint_url, verify=options.ca_bundle, config=config
            )

    def hurried(self, seconds: float) -> S3Backend:
        """A second client with few retries, for a probe that must not keep people waiting."""
        return S3Backend(self.uri, self._options, seconds, seconds, attempts=2)

    def put_new(self, key: str, data: bytes) -> bool:
        """Create by `If-None-Match: *`; a server without it (501) gets a look before the write."""
        # boto3 repeats a request whose answer was lost: the 412 that follows is then our own win.
        writer = uuid.uuid4().hex
        for attempt in range(6):
            if not self._conditional and self.size(key) is not None:
                return False
            condition = {"IfNoneMatch": "*"} if self._conditional else {}
            try:
                with self._translated("write", key, ("412", "409", "501")):
                    self._client.put_object(
                        **self._where(key), Body=data, Metadata={"writer": writer}, **condition
                    )
                    return True
            except ClientError as error:
                code = error.response["ResponseMetadata"]["HTTPStatusCode"]
                if code == 412:
                    return self._writer(key) == writer
                self._conditional = self._conditional and code != 501
                if code == 409:
                    time.sleep(0.05 * 2**attempt)
        raise StoreError(f"{self.uri}: {key} is being written by others; try again")

    def put_file(self, key: str, path: Path, sha256: str) -> None:
        """Small files in one request from memory; large ones in parts, watched for changes."""
        changed = PublishError(f"{path.name} changed while it was being published")
        try:
            before = path.stat()
            data = path.read_bytes() if before.st_size <= SMALL else None
        except FileNotFoundError:
            raise changed from None
        with self._translated("write", key):
            if data is not None:
                if sha256_bytes(data) != sha256:
                    raise changed
                self._client.put_object(**self._where(key), Body=data)
                return
            self._client.upload_file(str(path), self.bucket, self._prefix + key, Config=TRANSFER)
            # What was sent is only known to be right if the file is right, and was left alone.
            after = path.stat()
            alone = (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)
            if not alone or file_sha256(path) != sha256:
                self.delete(key)
                raise changed

    def get_bytes(self, key: str, limit: int) -> bytes:
        """Read in one go; boto3 repeats a request but not a body that was cut, so this does."""
        for attempt in range(5):
            with self._translated("read", key):
                try:
                    answer = self._client.get_object(**self._where(key))
                    with contextlib.closing(answer["Body"]) as body:
                        # A read of a given length would not notice that the body was cut.
                        data = None if answer["ContentLength"] > limit else body.read()
                except _CUT:
                    if attempt == 4:
                        raise
                    time.sleep(0.1 * 2**attempt)
                    continue
            if data is None:
                raise ArtifactCorrupt(f"{self.uri}: {key} is larger than {limit} bytes; delete it")
            return data
        raise AssertionError("unreachable")

    def get_file(self, key: str, path: Path) -> None:
        """Download in ranges; s3transfer repeats a part whose connection was cut."""
        with self._translated("read", key):
            self._client.download_file(self.bucket, self._prefix + key, str(path), Config=TRANSFER)

    def size(self, key: str) -> int | None:
        """HEAD; a missing bucket looks like a missing object here."""
        head = self._head(key)
        return None if head is None else head["ContentLength"]

    def list(self, prefix: str) -> list[str]:
        """All pages."""
        return sorted(self.objects(prefix))

    def objects(self, prefix: str) -> dict[str, tuple[str, int]]:
        """Entity tag and size of every key."""
        with self._translated("list", prefix):
            pages = self._client.get_paginator("list_objects_v2").paginate(
                Bucket=self.bucket, Prefix=self._prefix + prefix
            )
            items = [item for page in pages for item in page.get("Contents", ())]
        return {i["Key"].removeprefix(self._prefix): (i["ETag"], i["Size"]) for i in items}

    def delete(self, key: str) -> None:
        """S3 does not mind an absent object."""
        with self._translated("delete", key):
            self._client.delete_object(**self._where(key))

    def _where(self, key: str) -> dict[str, str]:
        return {"Bucket": self.bucket, "Key": self._prefix + key}

    def _head(self, key: str) -> dict[str, Any] | None:
        try:
            with self._translated("read", key):
                return self._client.head_object(**self._where(key))
        except ArtifactMissing:
            return None

    def _writer(self, key: str) -> str | None:
        head = self._head(key)
        return None if head is None else head["Metadata"].get("writer")

    @contextlib.contextmanager
    def _translated(self, verb: str, key: str = "", passed: tuple[str, ...] = ()) -> Iterator[None]:
        """Every error of boto3 becomes one of ours, except HTTP statuses the caller handles.

        The server's own text is left out: it can repeat request headers.
        """
        try:
            yield
        except StoreError:
            raise
        except (ClientError, BotoCoreError, Boto3Error, ValueError, OSError) as error:
            # s3transfer wraps a refused upload in an error of boto3 that has lost the code.
            cause = error.__context__ if isinstance(error, Boto3Error) else error
            if isinstance(cause, ClientError):
                status = str(cause.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
                if status in passed:
                    raise
                raise self._refused(verb, key, cause, status) from None
            raise self._failed(verb, key, cause or error) from None

    def _refused(self, verb: str, key: str, error: ClientError, status: str) -> StoreError:
        """The server answered, and the answer is no."""
        code = str(error.response.get("Error", {}).get("Code", status))
        what = f"{self.uri}: can't {verb} {key}"
        if code == "NoSuchBucket":
            return StoreConfigError(
                f"{what}: there is no bucket {self.bucket!r}; create it or correct the URI"
            )
        if code in _DENIED or status == "403":
            return StoreConfigError(
                f"{what}: {_DENIED.get(code, 'access denied')} ({code}); check the AWS credentials "
                f"and their rights to read, write and list in bucket {self.bucket!r}"
            )
        if code in ("NoSuchKey", "404", "NotFound"):
            return ArtifactMissing(f"{self.uri}: there is no {key}")
        if status in ("301", "307", "400"):
            return StoreConfigError(
                f"{what}: the server refused the request ({code}); check endpoint and region"
            )
        return StoreError(f"{what}: the server answered {status} {code}; try again later")

    def _failed(self, verb: str, key: str, error: BaseException) -> StoreError:
        """No usable answer came back."""
        what = f"{self.uri}: can't {verb} {key}".rstrip()
        client: Any = getattr(self, "_client", None)
        endpoint = client.meta.endpoint_url if client else self._options.endpoint_url or "AWS"
        if isinstance(error, _CREDENTIALS):
            return StoreConfigError(
                f"{what}: no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
                "or a profile or role of the AWS chain"
            )
        if isinstance(error, SSLError):
            return StoreConfigError(
                f"{what}: {endpoint} does not prove its identity (TLS); set ca_bundle to its "
                "certificate"
            )
        if isinstance(error, _SETTINGS):
            reason = shorten(str(error), 160)
            return StoreConfigError(f"{what}: {reason}; correct the store's options")
        if isinstance(error, _UNREACHABLE) and not isinstance(error, _BROKEN):
            return StoreError(
                f"{what}: no answer from {endpoint} ({type(error).__name__}); check the endpoint "
                "and the network"
            )
        if isinstance(error, OSError):
            return StoreError(f"{what}: {error.strerror or error} (on this machine)")
        return StoreError(f"{what}: the transfer broke ({type(error).__name__}); try again")
