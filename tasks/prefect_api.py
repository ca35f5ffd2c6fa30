"""Requests to Prefect's API, retried while its server is down."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from prefect.logging import get_run_logger

T = TypeVar("T")

#: Seconds that a server may be down: time for a restart, or for another machine to take over.
RETRY_TIME = 600.0
#: Seconds between two requests; they double from the first to the longest.
FIRST_WAIT, LONGEST_WAIT = 0.5, 10.0
SERVER_ERROR = 500


def retried(request: Callable[[], T]) -> T:
    """Return the result of a request, retried while the server is down (or 5xx).

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
            get_run_logger().warning("Prefect's server is away (%s); asking again", error)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)
