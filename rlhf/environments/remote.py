"""Rewards by an HTTP service, with retries and a circuit breaker."""

from __future__ import annotations

import contextlib
import json
import logging
import os
import time
import urllib.request
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from rlhf.config import RemoteComponent
from rlhf.config.components import LOOPBACK_HOSTS
from rlhf.config.numbers import doubled
from rlhf.environments.contract import Reply, check_values
from rlhf.errors import ConfigError, RewardServiceError, TrainingError
from rlhf.permissions import allowed_tokens, check_addresses, check_host, resolve

#: Status codes of transient failures.
RETRIABLE = (408, 425, 429, 500, 502, 503, 504)

#: Bytes of a response, which holds one number for each reply.
MAX_RESPONSE = 16 * 2**20

#: Environment variable with the tokens that may be sent, as comma-separated NAME@host. Only the
#: operator sets it: a user who sets a run's parameters must not be able to read any secret.
ALLOWED = "RLHF_ALLOWED_TOKENS"

log = logging.getLogger(__name__)


def read_token(config: RemoteComponent, where: str) -> str | None:
    """Read the token of a service from the environment; None if it needs none.

    Args:
        config: Names the variable and the host.
        where: The component in errors.

    Raises:
        ConfigError: The operator does not allow the token for this host, or it is not set.
    """
    name = config.token_env
    if not name:
        return None
    permission = f"{name}@{urlsplit(config.url).hostname}"
    listed, listed_in = allowed_tokens(ALLOWED)
    if permission not in listed:
        cure = f"{ALLOWED}={permission} in the environment where training runs"
        raise ConfigError(
            f"{where}: token_env = {name!r} may not be sent there; its operator allows it by "
            + (cure if listed_in == ALLOWED else f"{permission} among {listed_in}")
        )
    token = os.environ.get(name, "").strip()
    if not token.isascii() or not token:
        raise ConfigError(
            f"{where}: token_env = {name!r} is not set (or no token) in the environment; set it "
            "where training runs"
        )
    return token


def check_service(config: RemoteComponent, where: str) -> None:
    """Refuse a service that a run of this machine may not use, or not with its token.

    Its address is checked if it can be found now, and at every request.

    Args:
        config: Names the service and the token's variable.
        where: The component in errors.

    Raises:
        ConfigError: See `rlhf.permissions` and `read_token`.
    """
    check_host(where, config.url)
    with contextlib.suppress(OSError):
        check_addresses(where, config.url, resolve(config.url))
    read_token(config, where)


class RemoteReward:
    """Scores replies by an HTTP service.

    Sends {"replies": [...]}, each as `Reply.row`, and reads {"scores": [...]}, one for each.
    Transient failures (no connection, timeout, 429, 5xx) are retried with exponential backoff. If
    all attempts fail, the fallback is the score, or training ends if there is none. After some such
    failures in a row the breaker opens: no request is sent for a while, so that a dead service does
    not delay every chunk. An invalid response is always an error.
    """

    def __init__(self, config: RemoteComponent, name: str) -> None:
        self.config = config
        self.where = f"component {name!r} (url = {config.url!r})"
        self.failures = 0
        self.open_until = 0.0
        check_host(self.where, config.url)
        token = read_token(config, self.where)
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def __call__(self, batch: Sequence[Reply]) -> list[float]:
        """Return the scores of a batch, requested in parts of `batch_size` replies.

        Raises:
            RewardServiceError: The service can't be reached or fails, and there is no fallback.
            TrainingError: It refuses the request, or its response is invalid.
        """
        size = self.config.batch_size
        values: list[float] = []
        # Redirects are not followed: they would send replies and token to another host.
        with httpx.Client(
            timeout=self.config.timeout_seconds,
            headers=self.headers,
            follow_redirects=False,
            trust_env=self._has_proxy(),
            verify=httpx.create_ssl_context(),
        ) as client:
            for start in range(0, len(batch), size):
                values += self._part(client, batch[start : start + size])
        return values

    def _part(self, client: httpx.Client, part: Sequence[Reply]) -> list[float]:
        """Request scores, with retries; return the fallback while the breaker is open."""
        if time.monotonic() < self.open_until:
            return self._fallback(
                part, f"no request is sent after {self.failures} failures in a row"
            )
        body = json.dumps({"replies": [reply.row() for reply in part]}).encode()
        reason = ""
        # After the breaker's pause a single attempt tests the service.
        tries = 1 if self.failures >= self.config.breaker_failures else self.config.retries + 1
        for number in range(tries):
            if number:
                time.sleep(doubled(self.config.backoff_seconds, number - 1))
            try:
                response = self._post(client, body)
            except _RequestError as error:
                reason = str(error)
            else:
                self.failures = 0
                return self._scores(response, part)
        self.failures += 1
        if self.failures == 1 and self.config.fallback is not None:
            log.warning(
                "%s: %s; until it answers, every score is the fallback %g",
                self.where, reason, self.config.fallback,
            )  # fmt: skip
        if self.failures >= self.config.breaker_failures:
            self.open_until = time.monotonic() + self.config.breaker_seconds
        return self._fallback(part, f"{reason}, {tries} times")

    def _fallback(self, part: Sequence[Reply], reason: str) -> list[float]:
        if self.config.fallback is None:
            raise RewardServiceError(
                f"{self.where}: {reason}; see to the service, or set fallback to go on without it"
            )
        return [self.config.fallback] * len(part)

    def _post(self, client: httpx.Client, body: bytes) -> bytes:
        """Return the body of the response; the timeout applies to all of it."""
        deadline = time.monotonic() + self.config.timeout_seconds
        try:
            *others, last = self._places()
            for left, place in zip(range(len(others) + 1, 1, -1), others, strict=True):
                # A host may have addresses that can't be reached from here, or do not answer.
                with contextlib.suppress(httpx.ConnectError, httpx.ConnectTimeout):
                    share = (deadline - time.monotonic()) / left
                    return self._post_to(place, client, body, deadline, share)
            return self._post_to(last, client, body, deadline, deadline - time.monotonic())
        except (httpx.HTTPError, OSError) as error:
            # The text of httpx's errors may contain headers, so the class alone is shown.
            raise _RequestError(f"it can't be reached ({type(error).__name__})") from None

    def _post_to(
        self, place: httpx.URL, client: httpx.Client, body: bytes, deadline: float, connect: float
    ) -> bytes:
        """Return the body of the response of the service at an address.

        Args:
            place: The service's URL with the address.
            client: Sends the request.
            body: The request's.
            deadline: End of `timeout_seconds`, by the monotonic clock.
            connect: Seconds for the connection.
        """
        url = httpx.URL(self.config.url)
        headers = {"Content-Type": "application/json", "Host": url.netloc.decode()}
        # The certificate is checked for the name, whatever the address.
        names = {"sni_hostname": url.raw_host.decode()}
        timeout = httpx.Timeout(self.config.timeout_seconds, connect=max(connect, 0.01))
        with client.stream(
            "POST", place, content=body, headers=headers, extensions=names, timeout=timeout
        ) as response:
            if response.status_code in RETRIABLE:
                raise _RequestError(f"it answered {response.status_code}")
            if response.status_code != 200:
                raise TrainingError(
                    f"{self.where}: it answered {response.status_code}; correct the url, the "
                    "token or the service"
                )
            return self._read(response, deadline)

    def _places(self) -> list[httpx.URL]:
        """Return the service's URL with each of its addresses, which were checked, as the host.

        The addresses that the name has at the next look may be others. Only where a proxy passes
        requests on, the name stays: the proxy looks it up again, and may know more names.

        Raises:
            ConfigError: An address is not permitted.
            OSError: The host has none.
        """
        url, has_proxy = httpx.URL(self.config.url), self._has_proxy()
        try:
            addresses = resolve(self.config.url)
        except OSError:
            if has_proxy:
                return [url]
            raise
        check_addresses(self.where, self.config.url, addresses)
        return [url] if has_proxy else [url.copy_with(host=address) for address in addresses]

    def _has_proxy(self) -> bool:
        """Return whether a proxy passes the requests on; those to this machine never go there."""
        parts = urlsplit(self.config.url)
        host = parts.hostname or ""
        proxies = urllib.request.getproxies()
        is_direct = host in LOOPBACK_HOSTS or urllib.request.proxy_bypass(host)
        return not is_direct and bool(proxies.get(parts.scheme) or proxies.get("all"))

    def _read(self, response: httpx.Response, deadline: float) -> bytes:
        body = bytearray()
        for chunk in response.iter_bytes():
            body += chunk
            if len(body) > MAX_RESPONSE:
                raise TrainingError(f"{self.where}: its answer is no list of scores, but longer")
            if time.monotonic() > deadline:
                raise _RequestError(f"it took more than {self.config.timeout_seconds:g} seconds")
        return bytes(body)

    def _scores(self, body: bytes, part: Sequence[Reply]) -> list[float]:
        """Read the scores of a response, one for each reply of the part."""
        try:
            scores: Any = json.loads(body)["scores"]
        except (ValueError, RecursionError, KeyError, TypeError, IndexError):
            scores = None
        numbers = isinstance(scores, list) and all(
            isinstance(s, int | float) and not isinstance(s, bool) for s in scores
        )
        if not numbers:
            raise TrainingError(
                f'{self.where}: its answer is no {{"scores": [numbers]}}; mend the service'
            )
        return check_values(self.where, scores, part)


class _RequestError(Exception):
    """Reason of a transient failure."""
