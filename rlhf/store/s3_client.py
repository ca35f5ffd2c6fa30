"""A boto3 client that gets through what a long transfer meets: flipped bits, tokens that expire."""

from __future__ import annotations

import threading
from typing import Any

import boto3
from botocore.config import Config
from botocore.credentials import Credentials, ReadOnlyCredentials
from botocore.exceptions import (
    ConnectionClosedError,
    EndpointConnectionError,
    ReadTimeoutError,
)
from botocore.session import Session

from rlhf.config.pipeline import StoreConfig
from rlhf.store.redact import keep_secrets_out_of_logs

#: The body or the headers did not arrive as they were signed; boto3 gives up on these at once.
_DAMAGED = {
    "XAmzContentSHA256Mismatch",
    "BadDigest",
    "InvalidDigest",
    "SignatureDoesNotMatch",
    "IncompleteBody",
    "RequestTimeout",
}
#: A request without an answer, as boto3 names it.
_UNANSWERED = (ConnectionClosedError, ReadTimeoutError)
#: An answer to HEAD has no body that could say what is wrong.
_UNNAMED = {"400", "403"}
_EXPIRED = {
    "ExpiredToken",
    "ExpiredTokenException",
    "InvalidToken",
    "TokenRefreshRequired",
    "InvalidAccessKeyId",
}


class ChainCredentials(Credentials):
    """What the standard chain finds, looked up anew when the server says that it has expired.

    boto3 renews credentials that come with a date of expiry; those of a file or a variable that
    another program keeps fresh, and those that are revoked early, it would use for ever.
    """

    def __init__(self, profile: str | None) -> None:
        self._profile = profile
        self._found: Any = None
        self._lock = threading.Lock()
        self.method = "chain"
        self.account_id = None
        self.renew()

    def renew(self) -> bool:
        """Ask the chain; whether it had other credentials than before."""
        with self._lock:
            before = self._found.get_frozen_credentials() if self._found else None
            self._found = Session(profile=self._profile).get_credentials()
            return self._found is not None and self._found.get_frozen_credentials() != before

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """What a request is signed with; boto3 asks before every one."""
        return self._found.get_frozen_credentials()

    def __bool__(self) -> bool:
        return self._found is not None

    def get_deferred_property(self, property_name: str) -> Any:
        """Of no use to us, but part of the interface."""
        return lambda: getattr(self.get_frozen_credentials(), property_name, None)


class _ChainProvider:
    """Puts `ChainCredentials` before what else a session would find."""

    METHOD = CANONICAL_NAME = "rlhf-chain"

    def __init__(self, credentials: ChainCredentials) -> None:
        self._credentials = credentials

    def load(self) -> Credentials | None:
        """None if the chain is empty: boto3 then says so in its own way."""
        return self._credentials or None


def make_client(options: StoreConfig, connect: float, read: float, total: int) -> Any:
    """An S3 client by the standard chain and these options. Makes no request to the store."""
    keep_secrets_out_of_logs()
    credentials = ChainCredentials(options.profile)
    core = Session(profile=options.profile)
    core.get_component("credential_provider").providers.insert(0, _ChainProvider(credentials))
    session = boto3.Session(botocore_session=core, region_name=options.region)
    config = Config(
        connect_timeout=connect,
        read_timeout=read,
        retries={"mode": "standard", "total_max_attempts": total},
        max_pool_connections=40,
        # Over HTTPS, Ceph refuses every upload with boto3's default trailing checksum. What is
        # signed instead is the body's own sha256, so that no flipped bit is ever stored.
        request_checksum_calculation="when_required",
        response_checksum_validation="when_required",
        s3={"payload_signing_enabled": True},
    )
    # boto3 addresses a bucket by path whenever an endpoint is set, by options or chain.
    client: Any = session.client(
        "s3", endpoint_url=options.endpoint_url, verify=options.ca_bundle, config=config
    )

    def once_more(attempts: int, response: Any, caught_exception: Any, **_: Any) -> float | None:
        """Seconds after which to send a request again that boto3 would not; None for no more."""
        if isinstance(caught_exception, _UNANSWERED) and attempts >= total:
            # As the same error means a body that was cut, those who read it would ask again.
            url = client.meta.endpoint_url
            raise EndpointConnectionError(endpoint_url=url) from caught_exception
        if isinstance(caught_exception, EndpointConnectionError) and attempts < total:
            # boto3 waits for a random time, which may be next to nothing: a server that is
            # started anew takes some seconds.
            return 0.2 * 2 ** (attempts - 1)
        code = response[1].get("Error", {}).get("Code") if response else None
        if code in _EXPIRED or code in _UNNAMED:
            # Another thread may have been here first: then there is nothing new, but a new try.
            renewed = attempts < 3 and credentials.renew()
            return 0.0 if renewed or attempts == 1 else None
        # A wrong secret key looks like a flipped bit: it is told from it by happening again.
        return 0.1 if code in _DAMAGED and attempts < 3 else None

    client.meta.events.register_first("needs-retry.s3", once_more)
    return client
