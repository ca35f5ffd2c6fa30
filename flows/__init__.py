"""The flows: the pipeline, one flow per stage, retraining, and the `rlhf` command."""

import os

# Prefect sends no usage data, unless the user allows it.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
