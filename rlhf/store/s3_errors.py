"""Translation of boto3's errors to StoreErrors: one line with store, key and cure."""

from __future__ import annotations

from textwrap import shorten

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

from rlhf.errors import ArtifactMissing, StoreConfigError, StoreError
from rlhf.store.redact import redact

#: All errors that boto3 can raise; KeyError: an answer that lacks a required field.
ERRORS = (
    ClientError,
    BotoCoreError,
    ValueError,
    KeyError,
    OSError,
)
_BROKEN = (ConnectionClosedError, IncompleteReadError, ResponseStreamingError)
#: Errors of a cut body: the whole request is worth a retry.
CUT = (ReadTimeoutError, *_BROKEN)
_CREDENTIALS = (NoCredentialsError, PartialCredentialsError, CredentialRetrievalError)
_SETTINGS = (ProfileNotFound, InvalidConfigError, NoRegionError, ParamValidationError)
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
#: Cures for refusals that give no further reason.
_CURES = {
    "400": "check endpoint and region, and whether the credentials have expired",
    "InvalidRequest": "check the options, as sse may need HTTPS, or not be there",
    "InvalidArgument": "check the options, as sse may not be there",
}
_SKEWED = ("RequestTimeTooSkewed", "RequestExpired")


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
