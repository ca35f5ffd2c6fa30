"""The boto3 client, which retries after flipped bits, expired tokens and a server's restart."""

from __future__ import annotations

from functools import cache
from typing import Any

import boto3
from botocore.config import Config
from botocore.credentials import Credentials
from botocore.exceptions import EndpointConnectionError
from botocore.loaders import Loader, create_loader
from botocore.session import Session

from rlhf.config.pipeline import StoreConfig
from rlhf.store.redact import keep_secrets_out_of_logs
from rlhf.store.s3_credentials import ChainCredentials
from rlhf.store.s3_errors import DAMAGED, EXPIRED, UNANSWERED

#: Statuses without a code: an answer to HEAD has no body.
_UNNAMED = {"400", "403"}


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
        if isinstance(caught_exception, UNANSWERED) and attempts >= total:
            # The same error also means a cut body, which `read_object` would request again.
            url = client.meta.endpoint_url
            raise EndpointConnectionError(endpoint_url=url) from caught_exception
        if isinstance(caught_exception, EndpointConnectionError) and attempts < total:
            # boto3's own delay is random and may be almost zero; a server takes seconds to
            # restart.
            return 0.2 * 2 ** (attempts - 1)
        code = response[1].get("Error", {}).get("Code") if response else None
        if code in EXPIRED or code in _UNNAMED:
            # Another thread may have renewed them already: nothing changes then, but a retry helps.
            renewed = attempts < 3 and credentials.renew()
            return 0.0 if renewed or attempts == 1 else None
        # A wrong secret key gives the same code as a flipped bit, but on every retry.
        return 0.1 if code in DAMAGED and attempts < 3 else None

    client.meta.events.register_first("needs-retry.s3", retry_delay)
    client.meta.events.register_first("needs-retry.s3", _end_redirects)
    return client


@cache
def _loader(data_path: str | None) -> Loader:
    """Loader of AWS' service models, shared by all clients: it parses each file but once."""
    return create_loader(data_path)


class _ChainProvider:
    """A provider that puts `ChainCredentials` before those of the session."""

    METHOD = CANONICAL_NAME = "rlhf-chain"

    def __init__(self, credentials: ChainCredentials) -> None:
        self._credentials = credentials

    def load(self) -> Credentials | None:
        """Return None if the chain is empty, for boto3's own error."""
        return self._credentials or None


def _end_redirects(response: Any, operation: Any, request_dict: dict[str, Any], **_: Any) -> None:
    """Handle boto3's event before it follows a redirect: the question for a region ends here.

    boto3 asks by HEAD for the region of a bucket that redirects without it, for the region of that
    request too if it is redirected as well, and so on until Python's stack is full.
    """
    if response is not None and operation.name == "HeadBucket":
        answer = response[1]
        headers = answer.get("ResponseMetadata", {}).get("HTTPHeaders", {})
        if not (headers.get("x-amz-bucket-region") or answer.get("Error", {}).get("Region")):
            request_dict["context"].setdefault("s3_redirect", {})["redirected"] = True
