"""Preflight checks of a flow run, retried in a deployment if the store is down."""

from __future__ import annotations

import time

from rlhf.config import PipelineConfig
from rlhf.errors import StoreError
from tasks.preflight import is_checked, preflight


def preflight_flow(config: PipelineConfig) -> None:
    """Run the checks of a flow: placement, and preflight unless its command did it.

    A run of a deployment may be resumed on another machine just while the store is down, so it
    retries as often as a stage does. A command fails at once.

    Raises:
        ConfigError: One line naming field, value and cure.
    """
    # A command imports this module before it sets Prefect's environment variables.
    from prefect.logging import get_run_logger
    from prefect.runtime import deployment

    from tasks.remote import check_placement

    retries = config.retries
    if not is_checked(config):
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
