"""Prefect's API, asked again while its server is away for a moment."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TypeVar

import httpx
from prefect.logging import get_run_logger

T = TypeVar("T")

#: Seconds that a server may be away: time for a restart, or for another machine to take its place.
PATIENCE = 600.0
FIRST_WAIT, LONGEST_WAIT = 0.5, 10.0
SERVER_ERROR = 500


def patiently(ask: Callable[[], T]) -> T:
    """What the API answers; a server that does not answer, or only with a 5xx, is asked again.

    Raises:
        httpx.HTTPError: It was away for longer than `PATIENCE`, or what was asked is wrong.
    """
    give_up = time.monotonic() + PATIENCE
    wait = FIRST_WAIT
    while True:
        try:
            return ask()
        except httpx.HTTPError as error:
            wrong = isinstance(error, httpx.HTTPStatusError) and (
                error.response.status_code < SERVER_ERROR
            )
            if wrong or time.monotonic() > give_up:
                raise
            get_run_logger().warning("Prefect's server is away (%s); asking again", error)
        time.sleep(wait)
        wait = min(2 * wait, LONGEST_WAIT)
