"""Functions in child processes: forked, or in a new interpreter if CUDA needs one.

A fork saves the seconds that importing torch and transformers takes. It works as long as the parent
never used the GPU: `start` checks that in the child, and runs a new interpreter if it fails.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

POLL_SECONDS = 0.05


def start(
    entry: str, argument: str, log: Path, *, needs_cuda: bool = False, leads_group: bool = True
) -> Child:
    """Run `module:function` on a text in a child, which appends its output to `log`.

    Args:
        entry: The function; it takes the text.
        argument: The text.
        log: Where standard output and error go.
        needs_cuda: Whether the function itself uses the GPU.
        leads_group: Whether `kill` ends the child's own children too. One that doesn't belongs to
            this process's group.
    """
    sys.stdout.flush()
    sys.stderr.flush()
    pid = os.fork()
    if pid:
        return Child(pid, leads_group)
    code = 1
    try:
        if leads_group:
            os.setsid()
        _redirect(log)
        if needs_cuda and not _can_use_cuda():
            os.execv(sys.executable, [sys.executable, "-m", __spec__.name, entry, argument])
        call(entry)(argument)
        code = 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


@dataclass
class Child:
    """A process that runs one function."""

    pid: int
    leads_group: bool
    code: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, None while it runs; −n if signal n ended it."""
        if self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code = os.waitstatus_to_exitcode(status)
        return self.code

    def wait(self) -> int:
        """Wait for the end and return the exit code."""
        while (code := self.poll()) is None:
            time.sleep(POLL_SECONDS)
        return code

    def kill(self) -> int:
        """Kill the process, and its own children if it leads a group."""
        with contextlib.suppress(ProcessLookupError):  # it may have ended since the last poll
            (os.killpg if self.leads_group else os.kill)(self.pid, signal.SIGKILL)
        return self.wait()


def call(entry: str) -> Callable[..., Any]:
    """Return the function that `module:function` names."""
    module, name = entry.split(":")
    return getattr(importlib.import_module(module), name)


def _redirect(log: Path) -> None:
    """Send standard output and error to the log; standard input is empty."""
    with log.open("ab") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    with Path(os.devnull).open("rb") as nothing:
        os.dup2(nothing.fileno(), 0)
    # The parent may have replaced these by objects that do not write to the descriptors.
    sys.stdout, sys.stderr = (os.fdopen(fd, "w", buffering=1, closefd=False) for fd in (1, 2))


def _can_use_cuda() -> bool:
    import torch

    try:
        torch.zeros(1, device="cuda")
    except (RuntimeError, AssertionError) as error:
        print(f"the fork can't use CUDA ({error}); starting anew", file=sys.stderr)
        return False
    return True


if __name__ == "__main__":
    call(sys.argv[1])(sys.argv[2])
