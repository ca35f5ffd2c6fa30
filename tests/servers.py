"""What the tests' S3 servers have in common: a fixture's life, and serving by hand."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Protocol, TypeVar

import pytest


class UnavailableError(Exception):
    """The server can't be installed here."""


class _Server(Protocol):
    @property
    def environment(self) -> Mapping[str, str]: ...


S = TypeVar("S", bound=_Server)


def for_tests(start: Callable[[], AbstractContextManager[S]]) -> Iterator[S]:
    """A fixture's body: the server; skips where it can't be had, except in CI."""
    with contextlib.ExitStack() as stack:
        try:
            server = stack.enter_context(start())
        except UnavailableError as error:
            (pytest.fail if os.environ.get("CI") else pytest.skip)(str(error))
        yield server


def serve(start: Callable[[], AbstractContextManager[_Server]]) -> None:
    """Print what a shell needs to reach the server, until Ctrl-C or SIGTERM."""
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    with contextlib.suppress(KeyboardInterrupt), start() as server:
        for name, value in server.environment.items():
            sys.stdout.write(f"export {name}={value}\n")
        sys.stdout.flush()
        signal.pause()
