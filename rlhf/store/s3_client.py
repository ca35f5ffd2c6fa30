"""The boto3 client, its credentials, and the translation of its errors.

The client retries after flipped bits, expired tokens and a restart of the server.
"""

from __future__ import annotations

import threading
from functools import cache
from textwrap import shorten
from typing import Any

import boto3
from botocore.config import Config
from botocore.credentials import Credentials, ReadOnlyCredentials
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
from botocore.loaders import Loader, create_loader
from botocore.session import Session

from rlhf.config.pipeline import StoreConfig
from rlhf.errors import ArtifactMissing, StoreConfigError, StoreError
from rlhf.store.redact import keep_secrets_out_of_logs, redact

#: All errors that boto3 can raise; KeyError: an answer that lacks a required field.
ERRORS = (ClientError, BotoCoreError, ValueError, KeyError, OSError)
_BROKEN = (ConnectionClosedError, IncompleteReadError, ResponseStreamingError)
#: Errors of a cut body: the whole request is worth a retry.
CUT = (ReadTimeoutError, *_BROKEN)
#: boto3's errors for a request without an answer.
_UNANSWERED = (ConnectionClosedError, ReadTimeoutError)
_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)
_SETTINGS = (ProfileNotFound, InvalidConfigError, NoRegionError, ParamValidationError)
_UNREACHABLE = (EndpointConnectionError, ConnectTimeoutError, BotoConnectionError, HTTPClientError)

#: Codes for a body or headers that arrived damaged; boto3 does not retry these.
_DAMAGED = {
    "XAmzContentSHA256Mismatch",
    "BadDigest",
    "InvalidDigest",
    "SignatureDoesNotMatch",
    "IncompleteBody",
    "RequestTimeout",
}
#: Statuses without a code: an answer to HEAD has no body.
_UNNAMED = {"400", "403"}
#: Codes for credentials that are looked up again.
_EXPIRED = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidAccessKeyId",
}

#: Reasons of refusals for lack of rights, by code.
_DENIED = {
    "403": "access denied",
    "AccessDenied": "access denied",
    "AllAccessDisabled": "access denied",
    "InvalidAccessKeyId": "the server does not know this access key",
    "SignatureDoesNotMatch": "the secret key does not belong to the access key",
    "ExpiredToken": "the session token has expired",
    "InvalidToken": "the session token is not valid",
}
_SKEWED = ("RequestTimeTooSkewed", "RequestExpired")
#: Cures for refusals that give no further reason.
_CURES = {
    "400": "check endpoint and region, and whether the credentials have expired",
    "InvalidRequest": "check the options, as sse may need HTTPS, or not be there",
    "InvalidArgument": "check the options, as sse may not be there",
}


def make_client(options: StoreConfig, connect: float, read: float, total: int) -> Any:
    """Make an S3 client from the standard chain and these options; makes no request."""
    keep_secrets_out_of_logs()
    credentials = ChainCredentials(options.profile)
    core = Session(profile=options.profile)
    core.get_component("credential_provider").providers.insert(0, _ChainProvider(credentials))
    session = boto3.Session(botocore_session=core, region_name=options.region)
    core.register_component("data_loader", _loader(core.get_config_variable("data_path")))
    config = Config(
        connect_timeout=connect,
        read_timeout=read,
        retries={"mode": "standard", "total_max_attempts": total},
        max_pool_connections=40,
        # Over HTTPS, Ceph refuses every upload with boto3's default trailing checksum. Instead the
        # body's own sha256 is signed, so that no flipped bit is ever stored.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": True},
    )
    # boto3 addresses a bucket by path whenever an endpoint is set, in the options or the chain.
    client: Any = session.client(
        "s3", endpoint_url=options.endpoint_url, verify=options.ca_bundle, config=config
    )

    def retry_delay(attempts: int, response: Any, caught_exception: Any, **_: Any) -> float | None:
        """Return the delay of a retry that boto3 would not make, None for none."""
        if isinstance(caught_exception, _UNANSWERED) and attempts >= total:
            # The same error also means a cut body, which `read_object` would request again.
            url = client.meta.endpoint_url
            raise EndpointConnectionError(endpoint_url=url) from caught_exception
        if isinstance(caught_exception, EndpointConnectionError) and attempts < total:
            # boto3's own delay is random and may be almost zero; a server takes seconds to
            # restart.
            return 0.2 * 2 ** (attempts - 1)
        code = response[1].get("Error", {}).get("Code") if response else None
        if code in _EXPIRED or code in _UNNAMED:
            # Another thread may have renewed them already: nothing changes then, but a retry helps.
            renewed = attempts < 3 and credentials.renew()
            return 0.0 if renewed or attempts == 1 else None
        # A wrong secret key gives the same code as a flipped bit, but on every retry.
        return 0.1 if code in _DAMAGED and attempts < 3 else None

    client.meta.events.register_first("needs-retry.s3", retry_delay)
    return client


@cache
def _loader(data_path: str | None) -> Loader:
    """Loader of AWS' service models, shared by all clients: it parses each file but once."""
    return create_loader(data_path)


class ChainCredentials(Credentials):
    """Credentials of the standard chain, looked up again when they have expired.

    boto3 itself renews only credentials with a date of expiry, not those of a file or variable that
    another program keeps fresh, nor those that are revoked early.
    """

    def __init__(self, profile: str | None) -> None:
        self._profile = profile
        self._current: Any = None
        self._lock = threading.Lock()
        self.method = "chain"
        self.account_id = None
        self.renew()

    def renew(self) -> bool:
        """Look up the chain again; returns whether the credentials have changed."""
        with self._lock:
            previous = self._current.get_frozen_credentials() if self._current else None
            self._current = Session(profile=self._profile).get_credentials()
            return self._current is not None and self._current.get_frozen_credentials() != previous

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """Return the credentials that boto3 signs the next request with."""
        return self._current.get_frozen_credentials()

    def __bool__(self) -> bool:
        return self._current is not None

    def get_deferred_property(self, property_name: str) -> Any:
        """Return a function for one property, as botocore's interface requires."""
        return lambda: getattr(self.get_frozen_credentials(), property_name, None)


class _ChainProvider:
    """A provider that puts `ChainCredentials` before those of the session."""

    METHOD = CANONICAL_NAME = "rlhf-chain"

    def __init__(self, credentials: ChainCredentials) -> None:
        self._credentials = credentials

    def load(self) -> Credentials | None:
        """Return None if the chain is empty, for boto3's own error."""
        return self._credentials or None


def refused(  # noqa: PLR0911  (a row of cases)
    what: str, uri: str, key: str, bucket: str, error: ClientError
) -> StoreError:
    """Return the error for a request that the server refused.

    The server's own text is left out: it can repeat request headers.
    """
    status = status_of(error)
    code = str(error.response.get("Error", {}).get("Code", status))
    if code == "NoSuchBucket":
        return StoreConfigError(
            f"{what}: there is no bucket {bucket!r}; create it or correct the URI"
        )
    if code in _SKEWED:
        return StoreConfigError(
            f"{what}: this machine's clock differs too much from the server's ({code}); set the "
            "clock, or let NTP do it"
        )
    if code in _DENIED or status == "403":
        return StoreConfigError(
            f"{what}: {_DENIED.get(code, 'access denied')} ({code}); check the AWS credentials "
            f"and their rights to read, write and list in bucket {bucket!r}"
        )
    if code in ("NoSuchKey", "404", "NotFound"):
        return ArtifactMissing(f"{uri}: there is no {key}")
    if code in ("XAmzContentSHA256Mismatch", "BadDigest"):
        return StoreError(
            f"{what}: it arrived damaged, again and again ({code}); check the network between here "
            "and there"
        )
    if status in ("301", "307", "400"):
        cure = _CURES.get(code, "check endpoint and region")
        return StoreConfigError(f"{what}: the server refused the request ({code}); {cure}")
    return StoreError(f"{what}: the server answered {status} {code}; try again later")


def failed(what: str, endpoint: str, error: BaseException, opening: bool) -> StoreError:
    """Return the error for a request without a usable answer.

    `opening`: raised while the client was made.
    """
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
    # Once the client is made, a ValueError is an answer that boto3 can't parse (a flipped bit).
    if isinstance(error, _SETTINGS) or (opening and isinstance(error, ValueError)):
        reason = redact(shorten(str(error), 160))
        return StoreConfigError(f"{what}: {reason}; correct the store's options")
    if isinstance(error, _UNREACHABLE) and not isinstance(error, _BROKEN):
        cause = type(error.__cause__ or error).__name__
        return StoreError(
            f"{what}: no answer from {endpoint} ({cause}); check the endpoint and the network"
        )
    if isinstance(error, OSError):
        return StoreError(
            f"{what}: {error.strerror or error} (on this machine); mend that, then try again"
        )
    return StoreError(f"{what}: the transfer broke ({type(error).__name__}); try again")


def status_of(error: ClientError) -> str:
    """Return the HTTP status as text; empty if there was none."""
    return str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))
