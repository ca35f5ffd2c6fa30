"""What a flow checks before it does anything, with the patience of a run that nobody looks at."""

from __future__ import annotations

import time

from prefect.logging import get_run_logger
from prefect.runtime import deployment

from rlhf.config import PipelineConfig
from rlhf.errors import StoreError
from tasks.preflight import preflight
from tasks.remote import check_placement


def check_first(config: PipelineConfig) -> None:
    """Preflight and placement.

    Whoever types a command learns at once that there is no such store. A run of a deployment may
    have been started again, on another machine, just while the store is away: it asks again, as
    often as a stage is tried.

    Raises:
        ConfigError: One line naming field, value and cure.
    """
    retries = config.retries
    for left in reversed(range(retries.attempts + 1)):
        try:
            preflight(config)
            break
        except StoreError as error:
            if not (deployment.id and left):
                raise
            get_run_logger().warning("%s; asking again", error)
            time.sleep(retries.delay_seconds * 2 ** min(retries.attempts - left, 5))
    check_placement(config)
