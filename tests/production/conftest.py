"""Fixtures of the production tests: one deployed site, its workers, parameters."""

from __future__ import annotations

import contextlib

import pytest

from tests.ceph import s3_server
from tests.flows.conftest import tiny_tree
from tests.production.site import site
from tests.report.browser import browser
from tests.servers import UnavailableError, client_of

__all__ = ["browser", "s3_server"]


running = contextlib.ExitStack()


@pytest.fixture(scope="session")
def place(s3_server, tmp_path_factory):
    """A site after `make deploy`, without workers."""
    folder = tmp_path_factory.mktemp("site")
    with running:
        try:
            running.enter_context(client_of(s3_server, "production"))
            made = running.enter_context(site(folder, s3_server.environment))
        except UnavailableError as error:
            pytest.skip(str(error))
        made.said = made.run("make", "deploy")
        yield made


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item, nextitem):
    """End the site with its last test: idle, it takes a seventh of a core."""
    if nextitem is None or item.path.parent not in nextitem.path.parents:
        running.close()


@pytest.fixture(scope="session")
def workers(place):
    """The site with three workers, one for each pool."""
    for pool in ("cpu", "reward", "gpu"):
        place.worker(pool)
    return place


@pytest.fixture
def overrides(tmp_path):
    """Function that returns a tiny run's parameters, with a store of its own."""

    def make(name, updates=4, **more):
        tree = tiny_tree(tmp_path)
        del tree["runtime"]
        tree["ppo"] |= {"total_episodes": 8 * updates, "checkpoint_every": 5}
        line = {"promotion": {"name": name}}
        return {**tree, "name": name, "store": f"s3://production/{name}", **line, **more}

    return make
