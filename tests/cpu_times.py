"""`pytest --cpu-times`: CPU time of directories, files and tests, with their child processes.

The time of a whole run is CPU time (AGENTS.md), and `--durations` shows waits. A child process
counts once it has been waited for: a server's time is that of the test that ends it. A fixture's
time is that of the first test that uses it, in the column `setup`.
"""

import os
from collections import defaultdict
from pathlib import PurePath

import pytest


def add_option(parser) -> None:
    """Declare `--cpu-times`."""
    parser.addoption(
        "--cpu-times",
        metavar="N",
        nargs="?",
        type=int,
        const=30,
        help="print the CPU seconds of each directory, and of the N files and tests that took most",
    )


class CpuTimes:
    """Notes CPU seconds in each report of a test, which xdist carries, and prints their sums."""

    def __init__(self) -> None:
        self.last = _now()
        #: Of each test: seconds of its set-up, and of all.
        self.seconds: dict[str, tuple[float, float]] = {}

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self):
        # Without what happened between two tests, such as their collection.
        self.last = _now()

    def pytest_runtest_logreport(self, report):
        setup, whole = self.seconds.get(report.nodeid, (0.0, 0.0))
        taken = dict(report.user_properties).get(f"cpu {report.when}", 0.0)
        first = taken if report.when == "setup" else 0.0
        self.seconds[report.nodeid] = (setup + first, whole + taken)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_makereport(self, item, call):
        now = _now()
        item.user_properties.append((f"cpu {call.when}", round(now - self.last, 3)))
        self.last = now

    def pytest_terminal_summary(self, terminalreporter, config):
        count = config.getoption("cpu_times")
        write = terminalreporter.write_line
        total = sum(whole for _, whole in self.seconds.values())
        terminalreporter.section(f"CPU times: {total:.0f} s")
        for name, part, most in (
            ("directory", _directory, None),
            ("file", lambda test: test.split("::")[0], count),
            # Cases of one function together: a matrix of many is what takes long.
            ("test", lambda test: test.split("[")[0], count),
        ):
            write(f"{'CPU s':>8} {'setup':>8} {'tests':>6}  {name}")
            for where, (setup, whole, cases) in self._sums(part)[:most]:
                write(f"{whole:8.1f} {setup:8.1f} {cases:6}  {where}")

    def _sums(self, part) -> list[tuple[str, tuple[float, float, int]]]:
        sums = defaultdict(lambda: (0.0, 0.0, 0))
        for test, (setup, whole) in self.seconds.items():
            before = sums[part(test)]
            sums[part(test)] = (before[0] + setup, before[1] + whole, before[2] + 1)
        return sorted(sums.items(), key=lambda entry: -entry[1][1])


def _directory(test: str) -> str:
    return PurePath(test.split("::", maxsplit=1)[0]).parent.as_posix()


def _now() -> float:
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system
