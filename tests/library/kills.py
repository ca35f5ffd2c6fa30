"""Ends a process with SIGKILL inside of a save: between any two of its calls, or half-way in one.

What a kill can leave behind is decided by the order of the calls to the file system. So each of
them is a point: the process dies before it, or, where a file is being written, in the midst of it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.modeling import weights
from rlhf.ppo import checkpoint

CALLS = ("open", "close", "fsync", "mkdir", "replace", "unlink", "rmdir")
#: The functions that write a file of a checkpoint, and which argument says where.
WRITES: dict[tuple[Any, str], int] = {(weights, "save_file"): 1, (checkpoint, "write_json"): 0}


@contextmanager
def kill_points(at: int | None = None) -> Iterator[list[str]]:
    """Names every point that is passed; the process dies at point number `at`."""
    passed: list[str] = []

    def point(name: str) -> None:
        if len(passed) == at:
            os.kill(os.getpid(), signal.SIGKILL)
        passed.append(name)

    def before(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            point(f"{name} {args[0] if args else ''}")
            return call(*args, **options)

        return wrapped

    def writes(call: Callable[..., Any], place: int) -> Callable[..., Any]:
        def wrapped(*args: Any, **options: Any) -> Any:
            path = Path(args[place])
            point(f"before {path.name}")
            call(*args, **options)
            if len(passed) == at:
                with path.open("r+b") as file:
                    file.truncate(path.stat().st_size // 2)
            point(f"half of {path.name}")

        return wrapped

    originals = [(os, name, getattr(os, name)) for name in CALLS]
    originals += [(owner, name, getattr(owner, name)) for owner, name in WRITES]
    for owner, name, call in originals:
        place = WRITES.get((owner, name))
        setattr(owner, name, before(name, call) if place is None else writes(call, place))
    try:
        yield passed
    finally:
        for owner, name, call in originals:
            setattr(owner, name, call)


def in_child(work: Callable[[], None]) -> int:
    """Do it in a forked process; returns what `os.waitstatus_to_exitcode` makes of its end."""
    child = os.fork()
    if not child:
        signal.alarm(900)  # a thread that did not survive the fork may be waited for
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
