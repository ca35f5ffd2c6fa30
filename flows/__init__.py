"""What runs after what: the pipeline, one flow per stage, and the command line."""

import os

# On its own hardware: nothing is told to anybody, unless the user says so.
os.environ.setdefault("PREFECT_SERVER_ANALYTICS_ENABLED", "false")
os.environ.setdefault("DO_NOT_TRACK", "1")
