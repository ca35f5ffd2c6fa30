"""Run the GPU benchmark's sections: `python -m benchmarks.gpu`.

Each section is a process with a time limit. benchmarks/gpu.sh starts this program after it has
installed the missing packages. gpu.json and gpu.md are rewritten after every section and every few
seconds in between, so that a run that is cut off leaves its measurements; gpu.log has the output of
all sections.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import json
import os
import signal
import sys
import tarfile
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.gpu import processes, report
from benchmarks.gpu.section import (
    Context,
    Results,
    SectionFailedError,
    SectionSkippedError,
    finite,
    not_finite,
)

ARCHIVE = "carried.tar.gz"
#: With fewer seconds left than this, no further section is started.
LEAST_SECONDS = 5.0
WRITE_EVERY = 5.0
#: Concurrent sections without timing: more would wait for each other on the GPU.
MOST_AT_A_TIME, CORES_OF_EACH = 4, 4
PRELOADED = ("torch", "transformers", "peft", "accelerate", "rlhf.ppo.train")


@dataclass(frozen=True)
class Section:
    """A section: its function, its time limit, and whether it must run alone."""

    name: str
    entry: str
    seconds: float
    timed: bool = False
    needs_cuda: bool = True


#: Most important first: the time budget cuts off the end.
SECTIONS = (
    Section("environment", "environment:environment", 30),
    Section("resume", "resume:resume", 170, needs_cuda=False),
    Section("learning", "learning:learning", 170),
    Section("tests", "suite:tests", 170, needs_cuda=False),
    Section("golden", "suite:golden", 60, needs_cuda=False),
    Section("precision", "precision:precision", 90),
    Section("cache", "cache:cache", 90),
    Section("learning-bf16", "learning:learning_bf16", 150),
    Section("rates", "environment:rates", 30, timed=True),
    Section("rollouts-500m", "speed:rollouts_500m", 90, timed=True),
    Section("update-500m", "speed:update_500m", 100, timed=True),
    Section("profile", "profiling:profiles", 60, timed=True),
    Section("trl", "comparison:comparison", 90, timed=True, needs_cuda=False),
    Section("lora", "speed:lora", 60, timed=True),
    Section("largest", "speed:largest", 90, timed=True),
    Section("rollouts-124m", "speed:rollouts_124m", 60, timed=True),
    Section("update-124m", "speed:update_124m", 45, timed=True),
)


def main() -> None:
    """Run the sections that the command line names."""
    args = arguments()
    # On SIGTERM the sections are ended first.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = (
        "1"  # else the check initialises CUDA in this process
    )
    if args.device == "cuda" and (reason := no_gpu()):
        refuse(f"{reason}; --cpu tries the script without one")
    from filelock import FileLock, Timeout  # late: no_gpu() must work without it

    Path(args.out).mkdir(parents=True, exist_ok=True)
    lock = FileLock(Path(args.out) / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout:
        refuse(f"another run writes to {args.out}; give another --out")
    with (
        lock,
        tempfile.TemporaryDirectory(prefix="rlhf-gpu-", ignore_cleanup_errors=True) as scratch,
        contextlib.suppress(BrokenPipeError, KeyboardInterrupt),
    ):
        sys.exit(0 if Benchmark(args, Path(scratch)).run(chosen(args)) else 1)
    sys.exit(130)


def arguments(given: Sequence[str] | None = None) -> argparse.Namespace:
    """Parse the command line."""
    parser = argparse.ArgumentParser(prog="benchmarks/gpu.sh", description=__doc__)
    add = parser.add_argument
    add("sections", nargs="*", metavar="SECTION",
        help=f"all, or some of: {', '.join(s.name for s in SECTIONS)}")  # fmt: skip
    add("--cpu", action="store_true", help="on the CPU, with tiny sizes: proves the script")
    add("--out", required=True, help="folder of gpu.json, gpu.md and gpu.log")
    add("--carried", default=".gpu", help="folder of wheels and archive")
    add("--seconds", type=float, default=450.0, help="time budget of all sections")
    add("--fail", action="append", default=[], metavar="SECTION", help=argparse.SUPPRESS)
    add("--missing", default="", help=argparse.SUPPRESS)
    args = parser.parse_args(given)
    args.device, args.tiny = ("cpu", True) if args.cpu else ("cuda", False)
    names = [s.name for s in SECTIONS]
    if unknown := [name for name in args.sections if name not in names]:
        parser.error(f"no section is called {unknown[0]!r}; there are {', '.join(names)}")
    if args.seconds < 2 * LEAST_SECONDS:
        parser.error(
            f"--seconds {args.seconds:g} is too little; give at least {2 * LEAST_SECONDS:g}"
        )
    return args


def no_gpu() -> str:
    """Return the reason why no GPU can be used; empty if one can."""
    try:
        import torch
    except ImportError as error:
        return f"this Python can't import torch ({error})"
    if torch.cuda.is_available():
        return ""
    return f"torch {torch.__version__} finds no NVIDIA GPU"


def refuse(reason: str) -> NoReturn:
    """Exit with code 2 before any section has started."""
    print(f"gpu.sh: {reason}", file=sys.stderr)
    sys.exit(2)


def chosen(args: argparse.Namespace) -> list[Section]:
    """Return the sections to run, with those that their tables need."""
    if not args.sections:
        return list(SECTIONS)
    wanted = {*args.sections, "environment"}
    if any(s.timed for s in SECTIONS if s.name in wanted):
        wanted.add("rates")
    return [s for s in SECTIONS if s.name in wanted]


class Benchmark:
    """A run of sections, and the files that it writes."""

    def __init__(self, args: argparse.Namespace, scratch: Path) -> None:
        self.args, self.scratch = args, scratch
        self.out = Path(args.out)
        self.out.mkdir(parents=True, exist_ok=True)
        self.started = time.monotonic()
        self.end = self.started + args.seconds
        self.unpacked = scratch / "carried"
        self.result: dict[str, Any] = {
            "device": args.device, "tiny": args.tiny, "missing_packages": args.missing,
            "started": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "sections": {},
        }  # fmt: skip
        if args.sections:  # only some sections: keep the others of an earlier run
            self.result["sections"] = earlier_sections(self.out / "gpu.json", args)
        self.running: list[Running] = []
        self._written = 0.0
        if not self.result["sections"]:
            (self.out / "gpu.log").write_bytes(b"")

    def run(self, sections: Sequence[Section]) -> bool:
        """Run the sections; return whether none failed."""
        self.result["archive"] = unpack(Path(self.args.carried) / ARCHIVE, self.unpacked)
        print_line(f"device {self.args.device}, archive: {self.result['archive']}")
        _preload()
        waiting, names = list(sections), {s.name for s in sections}
        together = max(1, min(MOST_AT_A_TIME, (os.cpu_count() or 1) // CORES_OF_EACH))
        try:
            while waiting or self.running:
                while waiting and self._has_room(waiting[0], together):
                    self._start(waiting.pop(0))
                self._poll()
                time.sleep(processes.POLL_SECONDS)
        finally:
            for running in list(self.running):
                running.child.kill()
                self.running.remove(running)
                self._collect(running, "interrupted", "the run was ended")
            for section in waiting:
                self._record(section, "not run", "the run was ended", 0.0, {})
            self.write()
        failed = [
            n for n, s in self.result["sections"].items()
            if n in names and s["status"] not in ("ok", "skipped")
        ]  # fmt: skip
        print_line(f"{len(sections) - len(failed)} of {len(sections)} sections ok or skipped in "
            f"{time.monotonic() - self.started:.0f} s; {self.out}/gpu.md"
            + (f"; failed: {', '.join(failed)}" if failed else ""))  # fmt: skip
        return not failed

    def _has_room(self, section: Section, together: int) -> bool:
        """Return whether the section may start: timed ones run alone."""
        if not self.running:
            return True
        alone = section.timed or any(r.section.timed for r in self.running)
        return not alone and len(self.running) < together

    def _start(self, section: Section) -> None:
        remaining = self.end - time.monotonic()
        if remaining < LEAST_SECONDS:
            self._record(section, "not run", f"no time left of {self.args.seconds:.0f} s", 0.0, {})
            return
        folder = self.scratch / section.name
        folder.mkdir()
        context = Context(
            section.name, self.args.device, self.args.tiny, self.args.carried, str(self.unpacked),
            str(folder), str(self.scratch / f"{section.name}.json"),
            section.name in self.args.fail,
        )  # fmt: skip
        log = self.scratch / f"{section.name}.log"
        child = processes.start(
            f"{__package__}.__main__:run_section", context.to_json(), log,
            needs_cuda=section.needs_cuda and self.args.device == "cuda",
        )  # fmt: skip
        limit = min(section.seconds, remaining)
        self.running.append(Running(section, context, child, log, time.monotonic() + limit))

    def _poll(self) -> None:
        """Collect sections that have ended and kill those past their deadline."""
        for running in list(self.running):
            late = time.monotonic() > running.deadline
            code = running.child.poll()
            if code is None and late:
                code = running.child.kill()
            if code is not None:
                self.running.remove(running)
                limit = running.deadline - running.started
                reason = (
                    f"stopped after {limit:.0f} s" if late else f"its process ended with {code}"
                )
                self._collect(running, "failed", reason)
        if time.monotonic() - self._written > WRITE_EVERY:
            self.write()

    def _collect(self, running: Running, without_status: str, why: str) -> None:
        """Record a section that ended.

        `without_status` and `why` apply if the section itself left no status.
        """
        results = Results.read(Path(running.context.results))
        values, status, reason = results.values, results.status, results.reason
        if not status:
            status, reason = without_status, why
        wrong = not_finite(values)
        if status == "ok" and wrong:
            status, reason = "failed", f"not finite: {', '.join(wrong[:5])}"
        self._record(running.section, status, reason, running.seconds, values)
        with (self.out / "gpu.log").open("ab") as log:
            log.write(f"\n===== {running.section.name}: {status} {reason}\n".encode())
            log.write(running.log.read_bytes() if running.log.is_file() else b"")

    def _record(
        self, section: Section, status: str, reason: str, seconds: float, values: dict[str, Any]
    ) -> None:
        self.result["sections"][section.name] = {
            "status": status, "reason": reason, "seconds": seconds, "limit_seconds":
            section.seconds, "results": values,
        }  # fmt: skip
        print_line(f"[{time.monotonic() - self.started:5.0f} s] {section.name}: {status} in "
            f"{seconds:.1f} s{': ' + reason if reason else ''}")  # fmt: skip
        self.write()

    def write(self) -> None:
        """Write gpu.json and gpu.md with all results, running sections included."""
        self._written = time.monotonic()
        sections = dict(self.result["sections"])
        for running in self.running:
            values = Results.read(Path(running.context.results)).values
            sections[running.section.name] = {
                "status": "running", "reason": "", "seconds": running.seconds,
                "limit_seconds": running.section.seconds, "results": values,
            }  # fmt: skip
        order = {s.name: sections[s.name] for s in SECTIONS if s.name in sections}
        result = {**self.result, "sections": order, "seconds": time.monotonic() - self.started}
        for name, text in (
            ("gpu.json", json.dumps(finite(result), indent=1, allow_nan=False) + "\n"),
            ("gpu.md", report.markdown(result)),
        ):
            temporary = self.out / f"{name}.tmp"
            temporary.write_text(text)
            temporary.replace(self.out / name)


@dataclass
class Running:
    """A running section: its process, log and deadline."""

    section: Section
    context: Context
    child: processes.Child
    log: Path
    deadline: float
    started: float = field(default_factory=time.monotonic)

    @property
    def seconds(self) -> float:
        return time.monotonic() - self.started


def earlier_sections(path: Path, args: argparse.Namespace) -> dict[str, Any]:
    """Results of an earlier run on the same device with the same sizes, by section."""
    try:
        earlier = json.loads(path.read_text())
        same = (earlier["device"], earlier["tiny"]) == (args.device, args.tiny)
        return dict(earlier["sections"]) if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def unpack(archive: Path, folder: Path) -> str:
    """Unpack the archive and return the outcome in words.

    Paths that lead out of the folder are refused.
    """
    folder.mkdir()
    if not archive.is_file():
        return f"none ({archive} is not there)"
    try:
        with tarfile.open(archive) as tar:
            tar.extractall(folder, filter="data")
    except (tarfile.TarError, OSError, EOFError) as error:
        return f"broken ({type(error).__name__}: {error})"
    return "unpacked"


def _preload() -> None:
    """Import the packages that sections need, so that forks share them."""
    for module in PRELOADED:
        try:
            importlib.import_module(module)
        except Exception as error:  # each section that needs it fails with this error
            print_line(f"can't import {module}: {error}")


def run_section(argument: str) -> None:
    """Body of a section's process: run its function and note how it ended."""
    context = Context.from_json(argument)
    section = next(s for s in SECTIONS if s.name == context.name)
    results = Results(Path(context.results))
    try:
        if context.fails:
            raise SectionFailedError("told to fail")
        _prepare(context)
        processes.call(f"{__package__}.{section.entry}")(context, results)
    except SectionSkippedError as error:
        results.end("skipped", str(error))
    except SectionFailedError as error:
        results.end("failed", str(error))
    except Exception as error:
        results.end("failed", f"{type(error).__name__}: {' '.join(str(error).split())[:500]}")
        raise
    else:
        results.end("ok")


def _prepare(context: Context) -> None:
    import torch
    from transformers.utils import logging

    torch.set_num_threads(context.threads)
    logging.set_verbosity_error()
    logging.disable_progress_bar()


def print_line(line: str) -> None:
    """Print a line and flush."""
    print(line, flush=True)


if __name__ == "__main__":
    main()
