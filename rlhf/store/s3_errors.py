"""Errors of boto3 and answers of S3 servers as errors of this project: cause and cure in one line.

A server's own text is never repeated, as it can hold request headers; its code is, if it looks like
one. What other people must mend first is a StoreConfigError, what may pass by itself a StoreError.
"""

from __future__ import annotations

import re
from typing import NamedTuple
from urllib.parse import urlsplit

from botocore.exceptions import (
    BotoCoreError,
    CapacityNotAvailableError,
    ChecksumError,
    ClientError,
    ConnectionClosedError,
    ConnectTimeoutError,
    EndpointConnectionError,
    HTTPClientError,
    IncompleteReadError,
    NoCredentialsError,
    PaginationError,
    ParamValidationError,
    PartialCredentialsError,
    ProxyConnectionError,
    ReadTimeoutError,
    ResponseStreamingError,
    SSLError,
)
from botocore.exceptions import ConnectionError as BotoConnectionError
from botocore.parsers import ResponseParserError

from rlhf.errors import ArtifactMissing, StoreConfigError, StoreError
from rlhf.plain_text import shortened
from rlhf.store.redact import redact

#: All errors that boto3 can raise; KeyError: an answer that lacks a required field.
ERRORS = (ClientError, BotoCoreError, ResponseParserError, ValueError, KeyError, OSError)
_BROKEN = (ConnectionClosedError, IncompleteReadError, ResponseStreamingError)
#: Errors of a cut body: the whole request is worth a retry.
CUT = (ReadTimeoutError, *_BROKEN)
#: boto3's errors for a request without an answer.
UNANSWERED = (ConnectionClosedError, ReadTimeoutError)
UNREACHABLE = (EndpointConnectionError, ConnectTimeoutError, BotoConnectionError, HTTPClientError)
#: Errors of boto3 that are not about settings.
_TRANSFER = (*UNREACHABLE, *CUT, ChecksumError, CapacityNotAvailableError, PaginationError)

#: Codes for a body or headers that arrived damaged, or not in time; boto3 does not retry these.
DAMAGED = {
    "XAmzContentSHA256Mismatch",
    "BadDigest",
    "InvalidDigest",
    "SignatureDoesNotMatch",
    "IncompleteBody",
    "RequestTimeout",
}
#: Codes for credentials that are looked up again.
EXPIRED = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidAccessKeyId",
}

_CODE = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}")
_REGION = re.compile(r"[a-z]{2,}(?:-[a-z0-9]+){1,4}")
_HOST = re.compile(r"[A-Za-z0-9.-]{1,253}(?::[0-9]{1,5})?|\[[0-9A-Fa-f:.]+\](?::[0-9]{1,5})?")
#: Codes and texts for a store that is full, at AWS, Ceph, MinIO, Backblaze and others.
_FULL = re.compile(
    r"quota|storage_?full|cap_?exceeded|disk_?full|insufficient(storage|capacity)", re.IGNORECASE
)
_FULL_TEXT = re.compile(r"\bcap exceeded\b|\bquota\b.{0,20}exceeded", re.IGNORECASE)


class _Cause(NamedTuple):
    """Meaning of an error code, its cure, and whether it may pass by itself."""

    meaning: str
    cure: str
    passes: bool = False


_RIGHTS = "check the AWS credentials and their rights to read, write and list in bucket {bucket!r}"
_DENIED = _Cause("access denied", _RIGHTS)
_CLOCK = _Cause(
    "this machine's clock differs too much from the server's", "set the clock, or let NTP do it"
)
_ACCOUNT = _Cause(
    "the account may not use this service", "settle that with its provider, or use another account"
)
_FULL_STORE = _Cause(
    "the store is full, or its quota used up",
    "make room (`rlhf artifacts gc`) or raise the quota, then try again",
    passes=True,
)
_ARCHIVED = _Cause(
    "the object is archived and can't be read at once",
    "restore it (aws s3api restore-object), and keep the bucket's lifecycle rules from archiving "
    "what the store holds",
)
_DAMAGE = _Cause(
    "it arrived damaged, again and again", "check the network between here and there", passes=True
)
_LACKING = _Cause(
    "the server has no such function",
    "use another server, or a newer version of it: docs/artifacts.md says what a store needs",
)
_NOT_S3 = "check endpoint_url, which must be that of the S3 API itself, and no console or website"
_TOO_LARGE = _Cause(
    "it takes no body this large", "let the server, and proxies before it, take bodies of 64 MB"
)
_KEY = _Cause("the encryption key can't be used", "check sse_kms_key_id and the rights to that key")
_NAME = _Cause("the server takes no such name", "correct bucket and prefix in the store's URI")
_REQUEST = _Cause("the server refused the request", "check endpoint and region")

_CAUSES = {
    "InvalidAccessKeyId": _Cause("the server does not know this access key", _RIGHTS),
    "SignatureDoesNotMatch": _Cause("the secret key does not belong to the access key", _RIGHTS),
    **dict.fromkeys(
        ("ExpiredToken", "ExpiredTokenException", "TokenRefreshRequired"),
        _Cause("the session token has expired", _RIGHTS),
    ),
    "InvalidToken": _Cause("the session token is not valid", _RIGHTS),
    **dict.fromkeys(("AccessDenied", "AllAccessDisabled", "Unauthorized", "Forbidden"), _DENIED),
    **dict.fromkeys(
        ("AccountProblem", "NotSignedUp", "OptInRequired", "UserSuspended", "NotEntitled"), _ACCOUNT
    ),
    **dict.fromkeys(
        ("RequestTimeTooSkewed", "RequestExpired", "ExpiredRequest", "RequestInTheFuture"), _CLOCK
    ),
    "InvalidObjectState": _ARCHIVED,
    **dict.fromkeys(DAMAGED - {"SignatureDoesNotMatch", "RequestTimeout"}, _DAMAGE),
    "EntityTooLarge": _TOO_LARGE,
    "NotImplemented": _LACKING,
    **dict.fromkeys(
        ("KeyTooLongError", "InvalidURI", "InvalidBucketName", "XMinioInvalidObjectName"), _NAME
    ),
    "InvalidRequest": _REQUEST._replace(
        cure="check the options, as sse may need HTTPS, or not be there"
    ),
    "InvalidArgument": _REQUEST._replace(cure="check the options, as sse may not be there"),
    "MethodNotAllowed": _Cause("this address takes no such request", _NOT_S3),
}
_STATUSES = {
    "400": _REQUEST._replace(
        cure="check endpoint and region, and whether the credentials have expired"
    ),
    "401": _DENIED,
    "402": _ACCOUNT,
    "403": _DENIED,
    "404": _Cause("there is no such address", _NOT_S3),
    "405": _CAUSES["MethodNotAllowed"],
    "407": _Cause("the proxy refused the connection", "check HTTPS_PROXY and its credentials"),
    "413": _TOO_LARGE,
    "501": _LACKING,
    "507": _FULL_STORE,
}
#: Codes that say nothing of the reason.
_VAGUE = ("InvalidRequest", "InvalidArgument")
#: Statuses of the 400s that may pass by themselves.
_PASSING = {"408", "409", "423", "425", "429"}
#: What OpenSSL says where a server speaks plain HTTP.
_NO_TLS = ("wrong version number", "record layer failure", "unknown protocol", "http request")
#: Codes of trouble that passes, whatever their status.
_BUSY = re.compile(r"RequestTimeout|.*Throttl.*|SlowDown.*|TooManyRequests|RequestLimitExceeded.*")


def refused(
    what: str, uri: str, key: str, bucket: str, error: ClientError, *, reading: bool = True
) -> StoreError:
    """Return the error for a request that the server refused.

    Args:
        what: The store, and what could not be done.
        uri: The store's URI.
        key: Name of the object; empty for none.
        bucket: The bucket's name.
        error: The server's answer.
        reading: Whether an absent object is an answer to this request.
    """
    status, code = status_of(error), code_of(error)
    if code == "NoSuchBucket":
        return StoreConfigError(
            f"{what}: there is no bucket {bucket!r}; create it or correct the URI"
        )
    if code == "NoSuchKey" or (reading and code in ("404", "NotFound")):
        return ArtifactMissing(f"{uri}: there is no {key}")
    if is_elsewhere(error):
        return _elsewhere(what, bucket, error)
    cause = _cause(status, code, str(error.response.get("Error", {}).get("Message", "")))
    if cause is None:
        return StoreError(f"{what}: the server answered {status} {code}; try again later")
    kind = StoreError if cause.passes else StoreConfigError
    return kind(f"{what}: {cause.meaning} ({code}); {cause.cure.format(bucket=bucket)}")


def failed(  # noqa: PLR0911  (a row of cases)
    what: str, endpoint: str, error: BaseException, opening: bool
) -> StoreError:
    """Return the error for a request without a usable answer.

    `opening`: raised while the client was made.
    """
    if isinstance(error, CredentialsFailed):
        kind = StoreError if error.passes else StoreConfigError
        return kind(f"{what}: {error}")
    if isinstance(error, NoCredentialsError | PartialCredentialsError):
        return StoreConfigError(
            f"{what}: no AWS credentials; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or a profile or role of the AWS chain"
        )
    if isinstance(error, SSLError):
        return StoreConfigError(f"{what}: {endpoint} {_tls_problem(str(error))}")
    if isinstance(error, ProxyConnectionError):
        return StoreError(f"{what}: the proxy does not answer; check HTTPS_PROXY and NO_PROXY")
    # Once the client is made, a ValueError is an answer that boto3 can't parse (a flipped bit).
    is_setting = isinstance(error, BotoCoreError) and not isinstance(error, _TRANSFER)
    if is_setting or (opening and isinstance(error, ValueError)):
        reason = redact(shortened(_first_problem(error), 160))
        return StoreConfigError(f"{what}: {reason}; correct the store's options")
    if isinstance(error, UNREACHABLE) and not isinstance(error, _BROKEN):
        cause = type(error.__cause__ or error).__name__
        return StoreError(
            f"{what}: no answer from {endpoint} ({cause}); check the endpoint and the network"
        )
    if isinstance(error, OSError):
        return StoreError(
            f"{what}: {error.strerror or error} (on this machine); mend that, then try again"
        )
    if isinstance(error, KeyError | ResponseParserError):
        return StoreError(
            f"{what}: {endpoint} answers, but not as S3 does ({type(error).__name__}); check the "
            "endpoint, or try again"
        )
    return StoreError(f"{what}: the transfer broke ({type(error).__name__}); try again")


def status_of(error: ClientError) -> str:
    """Return the HTTP status as text; empty if there was none."""
    return str(error.response.get("ResponseMetadata", {}).get("HTTPStatusCode", ""))


def code_of(error: ClientError) -> str:
    """Return the server's code, or the status if it sent nothing that looks like a code."""
    code = str(error.response.get("Error", {}).get("Code", ""))
    return redact(code) if _CODE.fullmatch(code) else status_of(error)


def is_elsewhere(error: ClientError) -> bool:
    """Return whether the server says that another address or region is the right one."""
    codes = ("AuthorizationHeaderMalformed", "IllegalLocationConstraintException")
    return status_of(error).startswith("3") or code_of(error) in (*codes, "PermanentRedirect")


def is_unsupported(error: ClientError) -> bool:
    """Return whether a server may lack the kind of request, rather than refuse its contents."""
    if code_of(error) in ("NotImplemented", "MissingContentMD5"):
        return True
    known = _CAUSES.keys() - {*_VAGUE, "MethodNotAllowed"}
    is_refusal = status_of(error) in ("400", "405", "411", "501")
    is_other = code_of(error) in known or _FULL.search(code_of(error)) or is_elsewhere(error)
    return is_refusal and not is_other and not _BUSY.fullmatch(code_of(error))


def wants_digest(error: ClientError) -> bool:
    """Return whether a request was refused for lack of a checksum header (object lock)."""
    text = str(error.response.get("Error", {}).get("Message", "")).lower()
    is_asked = "content-md5" in text or "x-amz-checksum" in text
    code = code_of(error)
    return code == "MissingContentMD5" or (is_asked and code in _VAGUE)


class CredentialsFailed(BotoCoreError):
    """The AWS chain could not give credentials; the message says why, and what to do."""

    fmt = "{problem}; {cure}"

    @property
    def passes(self) -> bool:
        """Whether it may pass by itself."""
        return bool(self.kwargs.get("passes"))


def _cause(status: str, code: str, text: str) -> _Cause | None:
    """Return the cause of a refusal; None for one that may pass and says nothing further."""
    if _FULL.search(code) or status == "507" or (status[:1] == "4" and _FULL_TEXT.search(text)):
        return _FULL_STORE
    if code in _CAUSES:
        return _CAUSES[code]
    if code.lower().startswith("kms"):
        return _KEY
    is_gone = status == "404" and code not in ("404", "NotFound")  # such as NoSuchUpload
    if _BUSY.fullmatch(code) or status in _PASSING or is_gone:
        return None
    if not status.startswith("4"):
        return _STATUSES.get(status)
    return _STATUSES.get(status, _REQUEST)


def _elsewhere(what: str, bucket: str, error: ClientError) -> StoreConfigError:
    """Return the error for a redirect, or for a bucket in another region."""
    headers = error.response.get("ResponseMetadata", {}).get("HTTPHeaders", {})
    region = headers.get("x-amz-bucket-region") or error.response.get("Error", {}).get("Region")
    if region and _REGION.fullmatch(str(region)):
        return StoreConfigError(
            f"{what}: bucket {bucket!r} is in region {region} ({code_of(error)}); set "
            "store_options.region to it, and an endpoint_url of that region if there is one"
        )
    target = _origin(str(headers.get("location", "")))
    to = f"to {target}" if target else "elsewhere"
    cure = f"set endpoint_url to {target}" if target else "check endpoint_url and region"
    return StoreConfigError(
        f"{what}: the server sends the request {to} ({code_of(error)}), which is not followed, as "
        f"it is signed for one place; {cure}, if that is the S3 server"
    )


def _origin(location: str) -> str:
    """Return scheme and host of a redirect; empty if it names no other host."""
    try:
        parts = urlsplit(location)
    except ValueError:
        return ""
    if parts.scheme not in ("http", "https") or not _HOST.fullmatch(parts.netloc):
        return ""
    return f"{parts.scheme}://{parts.netloc}"


def _tls_problem(text: str) -> str:
    """Return what is wrong with a TLS connection, and the cure."""
    text = text.lower()
    if any(said in text.replace("_", " ") for said in _NO_TLS):
        return "does not speak TLS there; write http:// in endpoint_url, or use its TLS port"
    if "certificate has expired" in text:
        return "has a TLS certificate that has expired; let its operator renew it"
    if "mismatch" in text or "doesn't match" in text or "not valid for" in text:
        return "has a TLS certificate for another name; use that name in endpoint_url"
    return "does not prove its identity (TLS); set ca_bundle to its certificate"


def _first_problem(error: BaseException) -> str:
    """Return an error's text; of boto3's list of parameters, the first."""
    text = str(error)
    if isinstance(error, ParamValidationError):
        text = str(error.kwargs.get("report", text)).splitlines()[0]
    return text
