"""Fixtures that several folders of tests share, and how the suite is dealt to two workers."""

import os

# Before anything imports torch or Prefect. One thread per worker: two workers share two cores.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_SERVER_DATABASE_TIMEOUT", "60")
os.environ.setdefault("PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT", "60")
os.environ.setdefault("PREFECT_CLIENT_RETRY_EXTRA_CODES", "500")

import pytest

from tests.ceph import s3_server
from tests.library import typecheck

# Before any test imports rlhf.
typecheck.install()

__all__ = ["s3_server"]


def pytest_configure(config):
    # transformers renamed a switch that TRL and peft still read by its old name.
    for name in ("gradient_checkpointing", "is_gradient_checkpointing"):
        config.addinivalue_line(
            "filterwarnings", f"ignore:`{name}` is deprecated:FutureWarning:transformers"
        )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """The long training first and alone on one worker; one Ceph and one Prefect on the other."""
    for item in items:
        if "test_quickstart" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("quickstart"))
        elif "s3_server" in item.fixturenames:
            item.add_marker(pytest.mark.xdist_group("s3"))
        elif "tests/flows" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("prefect"))
    items.sort(key=lambda item: "test_quickstart" not in item.nodeid)
