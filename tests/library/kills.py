"""SIGKILL at every point of a save: between any two of its calls, or within a write.

The order of the calls to the file system decides which files a kill leaves. So each call is a
point: the process dies before it or, for the writing of a file, half-way through it.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from rlhf.checkpoints import trainer
from rlhf.modeling import weights
from rlhf.ppo import checkpoint

CALLS = ("open", "close", "fsync", "mkdir", "replace", "unlink", "rmdir")
#: Functions that write a file of a checkpoint, with the position of the path's argument.
WRITES: dict[tuple[Any, str], int] = {
    (weights, "save_file"): 1, (checkpoint, "write_json"): 0, (trainer, "write_json"): 0,
}  # fmt: skip


@contextmanager
def kill_points(at: int | None = None) -> Iterator[list[str]]:
    """Yield the names of the points passed so far; kill the process at number `at`."""
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
    """Run `work` in a forked process, and return its exit code, negative for a signal."""
    child = os.fork()
    if not child:
        signal.alarm(900)  # the child may wait for ever for a thread that the fork did not copy
        try:
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
