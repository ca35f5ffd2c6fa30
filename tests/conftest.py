"""Fixtures that several folders of tests share."""

import os

# Before anything imports torch or Prefect.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS", "120")
os.environ.setdefault("PREFECT_SERVER_DATABASE_TIMEOUT", "60")
os.environ.setdefault("PREFECT_SERVER_DATABASE_CONNECTION_TIMEOUT", "60")
os.environ.setdefault("PREFECT_CLIENT_RETRY_EXTRA_CODES", "500")

import pytest

from tests.ceph import s3_server
from tests.swift import s3_weak_server

# Before any test imports rlhf. Off for the whole quickstart, which runs at a user's speed, and on
# a bare GPU machine, which has no beartype.
if os.environ.get("RLHF_CHECK_SHAPES", "1") == "1":
    from tests.library import typecheck

    typecheck.install()

__all__ = ["s3_server", "s3_weak_server"]


def pytest_configure(config):
    # transformers renamed a switch that TRL and peft still read by its old name.
    for name in ("gradient_checkpointing", "is_gradient_checkpointing"):
        config.addinivalue_line(
            "filterwarnings", f"ignore:`{name}` is deprecated:FutureWarning:transformers"
        )


def pytest_ignore_collect(collection_path, config):
    """With `-m device`, import no other modules: a bare GPU machine lacks what they need."""
    if not config.option.markexpr.startswith("device") or collection_path.suffix != ".py":
        return None
    # pytest asks this for conftest.py too.
    is_test = collection_path.name.startswith("test_")
    return (is_test and "pytest.mark.device" not in collection_path.read_text("utf-8")) or None


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Skip what needs a CPU elsewhere; deal tests to two workers.

    One Ceph runs on one of them, one Prefect on the other.
    """
    for item in items:
        cpu_only = item.get_closest_marker("cpu_only")
        if cpu_only and (os.environ.get("RLHF_DEVICE") or "cpu") != "cpu":
            item.add_marker(pytest.mark.skip(reason=f"CPU only: {cpu_only.args[0]}"))
        if "tests/production" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("production"))
        elif "s3_server" in item.fixturenames or item.get_closest_marker("s3"):
            item.add_marker(pytest.mark.xdist_group("s3"))
        elif "tests/flows" in item.nodeid:
            item.add_marker(pytest.mark.xdist_group("prefect"))
    items.sort(key=lambda item: "tests/flows" not in item.nodeid)
