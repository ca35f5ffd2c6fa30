"""Runs cases: many in one process that is watched, or each in a process of its own."""

from __future__ import annotations

import json
import os
import selectors
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.bad_inputs.cases import Case, Outcome
from benchmarks.bad_inputs.folders import make_folder
from benchmarks.bad_inputs.worker import changes, copy_tree, restore, snapshot

ROOT = Path(__file__).parents[2]
#: Seconds in which a case has to end; most need some milliseconds, the first of a process more.
PATIENCE = 120.0


class Place:
    """A folder to run cases in, and a copy of it as it was."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder / "here"
        original = folder / "original"
        original.mkdir(parents=True)
        make_folder(original)
        copy_tree(original, self.folder)

    def in_one_process(self, cases: Sequence[Case]) -> Iterator[tuple[Case, Outcome]]:
        """Yield what came of each case; a process that hangs or dies is replaced."""
        waiting = [*enumerate(cases)]
        while waiting:
            for number, outcome in self._batch(waiting):
                yield cases[number], outcome
                waiting = waiting[1:]

    def _batch(self, waiting: Sequence[tuple[int, Case]]) -> Iterator[tuple[int, Outcome]]:
        with tempfile.NamedTemporaryFile("w", suffix=".json") as file:
            json.dump([(number, case.arguments) for number, case in waiting], file)
            file.flush()
            command = [sys.executable, "-m", "benchmarks.bad_inputs.worker", str(self.folder)]
            environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
            with subprocess.Popen(
                [*command, file.name], stdout=subprocess.PIPE, stdin=subprocess.DEVNULL,
                env=environment,
            ) as process:  # fmt: skip
                rest = [number for number, _ in waiting]
                for line in _lines(process):
                    fields: dict[str, Any] = json.loads(line)
                    number = fields.pop("number")
                    assert number == rest.pop(0)
                    yield number, Outcome(**{**fields, "changed": tuple(fields["changed"])})
                process.kill()
        if rest:
            restore(self.folder)
            code = process.returncode
            died = None if code in (0, -signal.SIGKILL) else code
            yield rest[0], Outcome(died, errors=f"the process ended by {code}")

    def in_own_process(self, case: Case) -> Outcome:
        """Run one case as a user does: `rlhf`, in a shell."""
        before = snapshot(self.folder)
        digests = json.loads((self.folder / "digests.json").read_text())
        words = list(case.arguments)
        for kind, digest in digests.items():
            words = [word.replace(f"<{kind}>", digest) for word in words]
        command = shlex.join([sys.executable, "-m", "flows.cli", *words])
        text = f"{case.before or ':'}; {command} {case.shell}"
        environment = {
            **{k: v for k, v in os.environ.items() if not k.startswith(("PREFECT_", "RLHF_"))},
            "PYTHONPATH": str(ROOT), "HOME": str(self.folder.parent / "home"),
            "PREFECT_HOME": str(self.folder.parent / "home" / ".prefect"), "HF_HUB_OFFLINE": "1",
            "RLHF_WORK_DIR": str(self.folder.parent / "home" / "work"), "RLHF_THREADS": "1",
        }  # fmt: skip
        for name, value in case.environment.items():
            environment.pop(name, None)
            if value is not None:
                environment[name] = value
        started = os.times()
        with subprocess.Popen(
            ["/bin/bash", "-c", text], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            cwd=self.folder, env=environment, stdin=subprocess.DEVNULL, start_new_session=True,
            errors="replace",
        ) as process:  # fmt: skip
            try:
                out, err = process.communicate(timeout=PATIENCE)
                code = process.returncode
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)
                out, err = process.communicate()
                code = None
        ended, after = os.times(), snapshot(self.folder)
        seconds = ended.children_user - started.children_user
        changed = changes(before, after)
        if changed:
            restore(self.folder)
        return Outcome(code, out, err, seconds, 0.0, changed)


def _lines(process: subprocess.Popen[bytes]) -> Iterator[bytes]:
    """Yield lines of a process until it ends, or writes none for too long."""
    assert process.stdout is not None
    pending, last = b"", time.monotonic()
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while time.monotonic() - last < PATIENCE:
            if not selector.select(1.0):
                continue
            data = os.read(process.stdout.fileno(), 2**16)
            if not data:
                process.wait()
                return
            *lines, pending = (pending + data).split(b"\n")
            for line in lines:
                last = time.monotonic()
                yield line
