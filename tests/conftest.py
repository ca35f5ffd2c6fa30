"""Fixtures that several folders of tests share."""

import os

# Before anything imports torch or Prefect: two cores, no noise, room for a slow first start.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")

from tests.ceph import s3_server

__all__ = ["s3_server"]
