"""Credentials of the AWS chain: looked up again when they expire; what is wrong with them."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from typing import Any, TypeVar
from urllib.parse import urlsplit

from botocore.credentials import Credentials, ReadOnlyCredentials
from botocore.exceptions import (
    ClientError,
    ConfigNotFound,
    ConfigParseError,
    CredentialRetrievalError,
    InvalidConfigError,
    LoginError,
    MetadataRetrievalError,
    NoAuthTokenError,
    PartialCredentialsError,
    ProfileNotFound,
    RefreshWithMFAUnsupportedError,
    SSOError,
    TokenRetrievalError,
)
from botocore.session import Session

from rlhf.plain_text import shortened
from rlhf.store.redact import redact
from rlhf.store.s3_errors import UNREACHABLE, CredentialsFailed, code_of, status_of

T = TypeVar("T")

#: Variables that name a file with a token, and who puts it there.
_TOKEN_FILES = {
    "AWS_WEB_IDENTITY_TOKEN_FILE": "mount the service account's token (IRSA)",
    "AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE": "mount the pod identity's token",
}
_CHAIN = "check the AWS configuration (variables AWS_…, ~/.aws/config, ~/.aws/credentials)"


class ChainCredentials(Credentials):
    """Credentials of the standard chain, looked up again when they have expired.

    boto3 itself renews only credentials with a date of expiry, not those of a file or variable that
    another program keeps fresh, nor those that are revoked early.

    Raises:
        CredentialsFailed: A provider of the chain failed.
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
            previous = self.get_frozen_credentials() if self._current else None
            self._current = self._asked(lambda: Session(profile=self._profile).get_credentials())
            return self._current is not None and self.get_frozen_credentials() != previous

    def get_frozen_credentials(self) -> ReadOnlyCredentials:
        """Return the credentials that boto3 signs the next request with."""
        return self._asked(self._current.get_frozen_credentials)

    def __bool__(self) -> bool:
        return self._current is not None

    def get_deferred_property(self, property_name: str) -> Any:
        """Return a function for one property, as botocore's interface requires."""
        return lambda: getattr(self.get_frozen_credentials(), property_name, None)

    def _asked(self, look: Callable[[], T]) -> T:
        """Call the chain, whose providers run programs, read files and ask servers."""
        try:
            return look()
        except CredentialsFailed:
            raise
        except Exception as error:  # of whatever kind: it comes from outside
            raise credentials_failed(error, self._profile) from None


def credentials_failed(error: Exception, profile: str | None) -> CredentialsFailed:
    """Return what is wrong with the chain; texts of programs and servers are not repeated."""
    option = f" --profile {profile}" if profile else ""
    cure, passes = _CHAIN, False
    if isinstance(error, ProfileNotFound):
        name = shortened(error.kwargs.get("profile"), 60)
        problem = f"there is no AWS profile {redact(name)!r}"
        cure = "correct store_options.profile or AWS_PROFILE, or add it to ~/.aws/config"
    elif isinstance(error, PartialCredentialsError):
        problem = (
            f"the AWS credentials ({error.kwargs['provider']}) lack {error.kwargs['cred_var']}"
        )
        cure = "give it beside the others"
    elif isinstance(error, SSOError | TokenRetrievalError | NoAuthTokenError):
        problem = "the AWS SSO session has expired, or there is none"
        cure = f"run `aws sso login{option}`"
    elif isinstance(error, LoginError):
        problem = "the session of `aws login` has expired, or there is none"
        cure = f"run `aws login{option}`"
    elif isinstance(error, RefreshWithMFAUnsupportedError | EOFError):
        problem = "the AWS profile needs a code of an MFA device, which nobody can type here"
        cure = "use a role without it, or credentials of a session (aws sts get-session-token)"
    elif isinstance(error, ConfigParseError | ConfigNotFound | InvalidConfigError):
        problem = redact(shortened(error, 160))
    elif isinstance(error, ClientError):
        problem, cure, passes = _refusal(error)
    elif isinstance(error, UNREACHABLE):
        where = _host(str(error.kwargs.get("endpoint_url", "")))
        problem = f"no answer from {where}, which gives the AWS credentials"
        cure, passes = "check the network", True
    elif isinstance(error, CredentialRetrievalError | MetadataRetrievalError):
        problem, cure = _failed_provider(str(error.kwargs.get("provider", "metadata service")))
    elif isinstance(error, OSError) and error.filename is not None:
        problem, cure = _missing_file(str(error.filename), error.strerror or type(error).__name__)
    else:  # such as JSON of a program that is none
        problem = f"what gives the AWS credentials answers something else ({type(error).__name__})"
    return CredentialsFailed(problem=problem, cure=cure, passes=passes)


def _refusal(error: ClientError) -> tuple[str, str, bool]:
    """Return problem and cure for a refusal of STS, SSO or another service than S3."""
    passes = status_of(error).startswith("5") or "Throttl" in code_of(error)
    problem = f"AWS refused {error.operation_name} for the credentials ({code_of(error)})"
    cure = "check the role's ARN, its trust policy, and whether the token has expired"
    return problem, "try again later" if passes else cure, passes


def _failed_provider(provider: str) -> tuple[str, str]:
    if provider == "custom-process":
        return (
            "the program of the AWS credential_process failed, or printed no credentials",
            "run it by hand: it must print JSON with Version 1 and the keys",
        )
    if provider == "container-role":
        return (
            "the container's credentials can't be fetched",
            "check AWS_CONTAINER_CREDENTIALS_FULL_URI, its token and the agent that answers there",
        )
    return f"the AWS credentials can't be fetched ({shortened(provider, 60)})", _CHAIN


def _missing_file(name: str, reason: str) -> tuple[str, str]:
    """Return problem and cure for a file that the chain can't read, or a program it can't start."""
    for variable, cure in _TOKEN_FILES.items():
        if os.environ.get(variable) == name:
            return f"{variable} = {shortened(name, 120)!r}: {reason}", f"{cure}, or unset it"
    problem = f"the AWS configuration names {shortened(name, 120)!r}: {reason}"
    return problem, "correct it (credential_process, web_identity_token_file)"


def _host(url: str) -> str:
    try:
        return urlsplit(url).hostname or "the server"
    except ValueError:
        return "the server"
