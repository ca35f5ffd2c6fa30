"""Rewards from a service: replies are posted as JSON, scores come back."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import urlsplit

import httpx

from rlhf.config import RemoteComponent
from rlhf.config.components import LOOPBACK
from rlhf.environments.contract import Reply, checked
from rlhf.errors import ConfigError, RewardServiceError, TrainingError

#: Answers by which a service says "not now".
PASSING = (408, 425, 429, 500, 502, 503, 504)
#: An answer is a number for each reply; more than this many bytes can't be one.
MAX_ANSWER = 16 * 2**20


#: Environment variable in which the operator lists the tokens that may be sent, and where to, as
#: NAME@host separated by commas. Whoever may set a run's parameters may not read any secret.
ALLOWED = "RLHF_ALLOWED_TOKENS"

log = logging.getLogger(__name__)


def token_of(config: RemoteComponent, where: str) -> str | None:
    """The token for a service, if it needs one.

    Raises:
        ConfigError: The operator does not allow it for this host, or it is not set.
    """
    name = config.token_env
    if not name:
        return None
    wanted = f"{name}@{urlsplit(config.url).hostname}"
    if wanted not in [entry.strip() for entry in os.environ.get(ALLOWED, "").split(",")]:
        raise ConfigError(
            f"{where}: token_env = {name!r} may not be sent there; its operator allows it by "
            f"{ALLOWED}={wanted} in the environment where training runs"
        )
    token = os.environ.get(name, "").strip()
    if not token.isascii() or not token:
        raise ConfigError(
            f"{where}: token_env = {name!r} is not set (or no token) in the environment; set it "
            "where training runs"
        )
    return token


class _FailedError(Exception):
    """Why a request failed; it may pass."""


class RemoteReward:
    """Posts {"replies": [...]} (`Reply.row` each) and reads {"scores": [...]}, one for each.

    What may pass (no connection, too slow, 429, 5xx) is tried again, each time waiting twice as
    long. A request that failed for good gives the fallback, or ends training if there is none;
    after some of these in a row the breaker opens: no request is sent for a while, so that a dead
    service does not make every chunk wait for it. An answer that makes no sense is always an error.
    """

    def __init__(self, config: RemoteComponent, name: str) -> None:
        self.config = config
        self.where = f"component {name!r} (url = {config.url!r})"
        self.failures = 0
        self.closed_until = 0.0
        self.host = urlsplit(config.url).hostname or ""
        token = token_of(config, self.where)
        self.headers = {"Authorization": f"Bearer {token}"} if token else {}

    def __call__(self, batch: Sequence[Reply]) -> list[float]:
        """Scores of the batch, fetched in parts of at most `batch_size` replies.

        Raises:
            RewardServiceError: The service can't be reached or fails, and there is no fallback.
            TrainingError: It refuses the request, or its answer makes no sense.
        """
        size = self.config.batch_size
        values: list[float] = []
        # Redirects are not followed: they would carry the replies, and the token, elsewhere.
        # A proxy would take what is meant for this machine off it.
        proxies = self.host not in LOOPBACK
        with httpx.Client(
            timeout=self.config.timeout_seconds, headers=self.headers, trust_env=proxies
        ) as client:
            for start in range(0, len(batch), size):
                values += self._part(client, batch[start : start + size])
        return values

    def _part(self, client: httpx.Client, part: Sequence[Reply]) -> list[float]:
        if time.monotonic() < self.closed_until:
            return self._without(
                part, f"no request is sent after {self.failures} failures in a row"
            )
        body = json.dumps({"replies": [reply.row() for reply in part]}).encode()
        reason = ""
        # After a while of silence one try must be enough to see if the service is back.
        tries = 1 if self.failures >= self.config.breaker_failures else self.config.retries + 1
        for number in range(tries):
            if number:
                time.sleep(self.config.backoff_seconds * 2 ** (number - 1))
            try:
                answer = self._posted(client, body)
            except _FailedError as failure:
                reason = str(failure)
            else:
                self.failures = 0
                return self._scores(answer, part)
        self.failures += 1
        if self.failures == 1 and self.config.fallback is not None:
            log.warning(
                "%s: %s; until it answers, every score is the fallback %g",
                self.where, reason, self.config.fallback,
            )  # fmt: skip
        if self.failures >= self.config.breaker_failures:
            self.closed_until = time.monotonic() + self.config.breaker_seconds
        return self._without(part, f"{reason}, {tries} times")

    def _without(self, part: Sequence[Reply], reason: str) -> list[float]:
        if self.config.fallback is None:
            raise RewardServiceError(
                f"{self.where}: {reason}; see to the service, or set fallback to go on without it"
            )
        return [self.config.fallback] * len(part)

    def _posted(self, client: httpx.Client, body: bytes) -> bytes:
        """The answer's body; the time limit holds for the whole of it, not for each packet."""
        deadline = time.monotonic() + self.config.timeout_seconds
        headers = {"Content-Type": "application/json"}
        try:
            with client.stream("POST", self.config.url, content=body, headers=headers) as response:
                if response.status_code in PASSING:
                    raise _FailedError(f"it answered {response.status_code}")
                if response.status_code != 200:
                    raise TrainingError(
                        f"{self.where}: it answered {response.status_code}; correct the url, the "
                        "token or the service"
                    )
                return self._read(response, deadline)
        except httpx.HTTPError as error:
            # The text of httpx's errors may repeat headers; their class says enough.
            raise _FailedError(f"it can't be reached ({type(error).__name__})") from None

    def _read(self, response: httpx.Response, deadline: float) -> bytes:
        answer = bytearray()
        for chunk in response.iter_bytes():
            answer += chunk
            if len(answer) > MAX_ANSWER:
                raise TrainingError(f"{self.where}: its answer is no list of scores, but longer")
            if time.monotonic() > deadline:
                raise _FailedError(f"it took more than {self.config.timeout_seconds:g} seconds")
        return bytes(answer)

    def _scores(self, answer: bytes, part: Sequence[Reply]) -> list[float]:
        try:
            scores: Any = json.loads(answer)["scores"]
        except (ValueError, RecursionError, KeyError, TypeError, IndexError):
            scores = None
        numbers = isinstance(scores, list) and all(
            isinstance(s, int | float) and not isinstance(s, bool) for s in scores
        )
        if not numbers:
            raise TrainingError(
                f'{self.where}: its answer is no {{"scores": [numbers]}}; mend the service'
            )
        return checked(self.where, scores, part)
