"""Rewards by a Python function of the operator, run in a process of its own.

Only a process can be interrupted reliably: a thread can't be killed, and a signal handler runs in
the main thread alone, which an orchestrator's task rarely uses, and only after a C function has
returned. Batches and values are exchanged as JSON, never by pickle.
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
from rlhf.environments.contract import Reply, check_values
from rlhf.errors import ConfigError, TrainingError

WORKER = Path(__file__).with_name("worker.py")


class CustomFunction:
    """Calls `function(batch) -> list of numbers` with a list of dicts (`Reply.row`).

    The process is started by the first call and serves the following ones, so that the module is
    loaded once. A call that exceeds the timeout is killed and raises.

    Raises:
        ConfigError: The file is outside of the operator's folders, or does not exist.
    """

    def __init__(self, config: CustomConfig, field: str) -> None:
        self.config = config
        self.code = CustomCode(config.function, field)
        self.where, self.digest = self.code.where, self.code.digest
        self.process: subprocess.Popen[bytes] | None = None

    def __call__(self, batch: Sequence[Reply]) -> list[float]:
        """Return the function's values for a batch.

        Raises:
            TrainingError: It failed, took too long, or did not return a number for each reply.
        """
        response = self._call({"batch": [reply.row() for reply in batch]})
        if "error" in response:
            raise TrainingError(f"{self.where} failed ({response['error']}); mend the function")
        return check_values(self.where, response["values"], batch)

    def dry_run(self, batch: Sequence[Reply]) -> None:
        """Test the function before training.

        Raises:
            ConfigError: The call fails.
        """
        try:
            self(batch)
        except TrainingError as error:
            raise ConfigError(f"on a dry batch of {len(batch)} replies: {error}") from None

    def close(self) -> None:
        """End the process; the next call starts a new one."""
        if self.process is not None:
            self._finalizer()
            self.process = None

    def _call(self, request: dict[str, Any]) -> dict[str, Any]:
        """Send a request and return the response; on any failure end the process."""
        deadline = time.monotonic() + self.config.timeout_seconds
        process = self._running_process()
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
        except BaseException:  # such as Ctrl-C: the next line of the pipe would be stale
            self.close()
            raise

    def _running_process(self) -> subprocess.Popen[bytes]:
        if self.process is None:
            code = self.code
            command = [sys.executable, "-P", str(WORKER), str(code.file), code.module, code.name]
            self.process = subprocess.Popen(
                [*command, str(code.folder)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                bufsize=0,
                start_new_session=True,  # so that processes started by the function end with it
            )
            self._finalizer = weakref.finalize(self, _end, self.process)
        return self.process


def _end(process: subprocess.Popen[bytes]) -> None:
    """Kill a process and its children, and close its pipes."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    for pipe in (process.stdin, process.stdout):
        if pipe:
            pipe.close()


def _exchange(process: subprocess.Popen[bytes], line: bytes, deadline: float) -> bytes:
    """Write a line to the process and read one, with a deadline for both.

    Raises:
        TimeoutError: The deadline has passed.
        EOFError, BrokenPipeError: The process ended.
    """
    stdin, stdout = _nonblocking(process.stdin), _nonblocking(process.stdout)
    response = bytearray()
    with selectors.DefaultSelector() as selector:
        selector.register(stdin, selectors.EVENT_WRITE)
        selector.register(stdout, selectors.EVENT_READ)
        while not response.endswith(b"\n"):
            remaining = deadline - time.monotonic()
            events = selector.select(max(remaining, 0))
            if not events:
                raise TimeoutError
            for key, _ in events:
                if key.fd == stdin:
                    line = line[os.write(stdin, line[:65536]) :]
                    if not line:
                        selector.unregister(stdin)
                elif chunk := os.read(stdout, 65536):
                    response += chunk
                else:
                    raise EOFError
    return bytes(response)


def _nonblocking(pipe: IO[bytes] | None) -> int:
    """Set a pipe to non-blocking mode and return its file descriptor."""
    assert pipe is not None
    os.set_blocking(pipe.fileno(), False)
    return pipe.fileno()
