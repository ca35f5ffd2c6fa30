"""Rewards from a Python function of the operator's.

The function runs in a process of its own. Only a process can be interrupted for sure: a thread
can't be killed, and a signal's handler runs in the main thread alone, which a task of an
orchestrator seldom is, and not before a C function returns. JSON goes in and out, never pickle.
"""

from __future__ import annotations

import json
import os
import selectors
import signal
import subprocess
import sys
import time
import weakref
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO, Any

from rlhf.config import CustomConfig
from rlhf.custom_code import CustomCode
from rlhf.environments.contract import Reply, checked
from rlhf.errors import ConfigError, TrainingError

WORKER = Path(__file__).with_name("worker.py")


class CustomFunction:
    """Calls `function(batch) -> list of numbers`, the batch being a list of dicts (`Reply.row`).

    The process is started at the first call and kept, so that what the module loads is loaded
    once. A call that takes too long is killed, and is an error.

    Raises:
        ConfigError: It lies outside of the operator's folders, or does not exist.
    """

    def __init__(self, config: CustomConfig, field: str) -> None:
        self.config = config
        self.code = CustomCode(config.function, field)
        self.where, self.digest = self.code.where, self.code.digest
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, batch: Sequence[Reply]) -> list[float]:
        """Values of the batch.

        Raises:
            TrainingError: It failed, took too long, or did not return a number for each reply.
        """
        answer = self._asked({"batch": [reply.row() for reply in batch]})
        if "error" in answer:
            raise TrainingError(f"{self.where} failed ({answer['error']}); mend the function")
        return checked(self.where, answer["values"], batch)

    def dry_run(self, batch: Sequence[Reply]) -> None:
        """Call it once before anything is trained.

        Raises:
            ConfigError: The call fails.
        """
        try:
            self(batch)
        except TrainingError as error:
            raise ConfigError(f"on a dry batch of {len(batch)} replies: {error}") from None

    def close(self) -> None:
        """End the process; the next call starts another."""
        if self.process is not None:
            self._finalizer()
            self.process = None

    def _asked(self, request: dict[str, Any]) -> dict[str, Any]:
        deadline = time.monotonic() + self.config.timeout_seconds
        process = self._running()
        line = json.dumps(request).encode() + b"\n"
        try:
            return json.loads(_exchange(process, line, deadline))
        except TimeoutError:
            self.close()
            raise TrainingError(
                f"{self.where} took more than timeout_seconds = {self.config.timeout_seconds:g} "
                f"for {len(request['batch'])} replies and was stopped; make it faster, or raise it"
            ) from None
        except (EOFError, BrokenPipeError):
            code = process.wait()
            self.close()
            raise TrainingError(
                f"{self.where} ended its process (exit status {code}); mend the function"
            ) from None
        except BaseException:  # Ctrl-C, say: what comes out of the pipe next would be stale
            self.close()
            raise

    def _running(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            code = self.code
            command = [sys.executable, "-P", str(WORKER), str(code.file), code.module, code.name]
            self.process = subprocess.Popen(
                [*command, str(code.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # so that what the function starts ends with it
            )
            self._finalizer = weakref.finalize(self, _end, self.process)
        return self.process


def _end(process: subprocess.Popen[bytes]) -> None:
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def _exchange(process: subprocess.Popen[bytes], line: bytes, deadline: float) -> bytes:
    """Write a line and read one, waiting for neither beyond the deadline.

    Raises:
        TimeoutError: It took longer.
        EOFError, BrokenPipeError: The process ended.
    """
    into, out = _no_wait(process.stdin), _no_wait(process.stdout)
    answer = bytearray()
    with selectors.DefaultSelector() as ready:
        ready.register(into, selectors.EVENT_WRITE)
        ready.register(out, selectors.EVENT_READ)
        while not answer.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            events = ready.select(max(remaining, 0))
            if not events:
                raise TimeoutError
            for key, _ in events:
                if key.fd == into:
                    line = line[os.write(into, line[:65536]) :]
                    if not line:
                        ready.unregister(into)
                elif chunk := os.read(out, 65536):
                    answer += chunk
                else:
                    raise EOFError
    return bytes(answer)


def _no_wait(pipe: IO[bytes] | None) -> int:
    assert pipe is not None
    os.set_blocking(pipe.fileno(), False)
    return pipe.fileno()
