"""`RLHF_LINE_COVERAGE=90 pytest`: share of the lines of `rlhf` that the tests ran, by SlipCover.

A variable, for the conftest.py of a folder is imported before options are known. SlipCover puts a
probe before each line of the byte code. A tracer such as coverage.py's slows down all Python code
of its process instead, that of libraries too.
"""

import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = "rlhf"


class LineCoverage:
    """Puts probes into each module at its import, and adds up what the processes of xdist saw."""

    def __init__(self, wanted: float) -> None:
        import slipcover  # which a bare GPU machine lacks

        self.wanted = wanted
        self.seen = None
        self.worker = os.environ.get("PYTEST_XDIST_WORKER")
        # Never taken out again: that looks through all functions each time, and code that runs in
        # another thread would change.
        whole = None if self.worker else [str(ROOT / PACKAGE)]  # also what nobody imports
        self.probes = slipcover.Slipcover(d_miss_threshold=-1, source=whole)
        if early := [name for name in sys.modules if _is_ours(name)]:
            raise RuntimeError(f"imported before their lines could be counted: {early}")
        sys.meta_path.insert(0, self)

    def find_spec(self, name, path=None, target=None):
        """Find a module as the other finders do, and instrument its code as it is loaded."""
        if not _is_ours(name):
            return None
        others = (finder for finder in sys.meta_path if finder is not self)
        specs = (finder.find_spec(name, path, target) for finder in others)
        spec = next(filter(None, specs), None)
        if spec is not None:
            # Not a loader around it: those that check shapes cache under names of their own, which
            # their `exec_module` sets around `get_code`.
            get_code = spec.loader.get_code
            spec.loader.get_code = lambda name: self.probes.instrument(get_code(name))
        return spec

    def pytest_configure(self, config):
        """Remember where the workers leave their figures."""
        if self.worker or not config.getoption("numprocesses", None):
            # Tests that start a pytest of their own don't want its figures.
            os.environ.pop("RLHF_LINE_COVERAGE")
        if self.worker:
            self.folder = Path(config.workerinput["line_coverage"])
        else:
            self.folder = Path(tempfile.mkdtemp(prefix="line-coverage-"))

    @pytest.hookimpl(optionalhook=True)
    def pytest_configure_node(self, node):
        """Tell a worker where to leave its figures."""
        node.workerinput["line_coverage"] = str(self.folder)

    @pytest.hookimpl(trylast=True)
    def pytest_sessionfinish(self, session):
        """Write a worker's figures; add them up where the workers' end has been seen."""
        if self.worker:
            text = json.dumps(self.probes.get_coverage())
            (self.folder / self.worker).write_text(text, "utf-8")
            return
        if session.testscollected or list(self.folder.iterdir()):
            from slipcover import merge_coverage

            self.seen = self.probes.get_coverage()
            for file in sorted(self.folder.iterdir()):
                merge_coverage(self.seen, json.loads(file.read_text("utf-8")))
            if self.share < self.wanted and session.exitstatus == pytest.ExitCode.OK:
                session.exitstatus = pytest.ExitCode.TESTS_FAILED
        shutil.rmtree(self.folder)

    @property
    def share(self) -> float:
        """Per cent of all lines that ran."""
        return self.seen["summary"]["percent_covered"]

    def pytest_terminal_summary(self, terminalreporter):
        """Print a table of the files of which lines are missing, and the verdict."""
        if self.seen is None:
            return
        from slipcover import print_coverage

        terminalreporter.section("line coverage")
        print_coverage(self.seen, outfile=_Lines(terminalreporter), skip_covered=True)
        verdict = "enough" if self.share >= self.wanted else "FAILED: not enough"
        line = f"{self.share:.2f} % of the lines ran, {self.wanted:g} % wanted: {verdict}"
        terminalreporter.write_line(line)


class _Lines:
    def __init__(self, reporter) -> None:
        self.write = reporter.write


def _is_ours(name: str) -> bool:
    return name == PACKAGE or name.startswith(f"{PACKAGE}.")
