"""Lines that no test ran: counted in all processes of xdist, and too few fail the session."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(("wanted", "code", "verdict"), [("99", 1, "FAILED"), ("1", 0, "enough")])
def test_lines_of_all_processes_are_added_up(wanted, code, verdict):
    tests = ("tests/test_typecheck.py", "tests/report/test_charts.py")
    inherited = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST_")}
    ended = subprocess.run(
        [sys.executable, "-m", "pytest", *tests, "-n", "2", "--dist", "loadfile"],
        cwd=ROOT, env=inherited | {"RLHF_LINE_COVERAGE": wanted},
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert ended.returncode == code, ended.stdout
    assert re.search(rf"\d\.\d\d % of the lines ran, {wanted} % wanted: {verdict}", ended.stdout)
    rows = dict(re.findall(r"^(rlhf/\S+) +\d+ +\d+ +(\d+) ", ended.stdout, re.MULTILINE))
    # Each is run by one of the two files, and the last is imported by none. All lines: not listed.
    assert int(rows["rlhf/ppo/losses.py"]) > 20
    assert int(rows.get("rlhf/report/charts.py", 100)) > 50
    assert int(rows["rlhf/gguf.py"]) == 0
