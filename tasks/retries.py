"""Retries of what a flow does between its stages: in the store, and on Prefect's server."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

import httpx

from rlhf.config import PipelineConfig
from rlhf.errors import RLHFError, StoreError, is_retriable

log = logging.getLogger("rlhf.tasks")
#: Seconds that a server may be down: time for a restart, or for another machine to take over.
RETRY_TIME = 600.0
#: Seconds between two requests; they double from the first to the longest.
FIRST_WAIT, LONGEST_WAIT = 0.5, 10.0
SERVER_ERROR = 500
T = TypeVar("T")


def retried(config: PipelineConfig, what: str, function: Callable[[], T]) -> T:
    """Call a function that uses the store; repeat it as often, and as late, as a stage.

    Args:
        config: Configuration with store and retries.
        what: What the function does, for the log.
        function: Can be repeated.

    Raises:
        StoreError: An error of the system stays; the message names the store.
        RLHFError: The function's own, if a retry can't cure it or did not.
    """
    retries = config.retries
    for attempt in range(retries.attempts + 1):
        try:
            return function()
        except Exception as error:
            if not is_retriable(error):
                raise
            if attempt == retries.attempts:
                if isinstance(error, RLHFError) or not isinstance(error, OSError):
                    raise
                raise StoreError(
                    f"{config.store}: {what} failed ({error}); mend that, and run the same again"
                ) from error
            delay = retries.delay(attempt) * (1 + retries.jitter * random.random())
            log.warning("%s failed (%s); it is tried again in %.0f s", what, error, delay)
            time.sleep(delay)
    raise AssertionError


def asked_server(request: Callable[[], T]) -> T:
    """Return the result of a request to Prefect's server, retried while that is down (or 5xx).

    Raises:
        httpx.HTTPError: The server was down for `RETRY_TIME`, or the request is wrong.
    """
    end = time.monotonic() + RETRY_TIME
    wait = FIRST_WAIT
    while True:
        try:
            return request()
        except httpx.HTTPError as error:
            wrong = isinstance(error, httpx.HTTPStatusError) and (
                error.response.status_code < SERVER_ERROR
            )
            if wrong or time.monotonic() > end:
                raise
            log.warning("Prefect's server is away (%s); asking again", error)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)
