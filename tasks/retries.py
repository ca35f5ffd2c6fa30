"""Retries of what a flow does in the store between its stages."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Callable
from typing import TypeVar

from rlhf.config import PipelineConfig
from rlhf.errors import RLHFError, StoreError, is_retriable

log = logging.getLogger("rlhf.tasks")
T = TypeVar("T")


def retried(config: PipelineConfig, what: str, function: Callable[[], T]) -> T:
    """Call a function that reads the store; repeat it as often, and as late, as a stage.

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
