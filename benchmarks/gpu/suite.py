"""Sections: golden vectors and the library's device tests, run by pytest."""

from __future__ import annotations

import os
import subprocess
import sys
import xml.etree.ElementTree as ET
from collections import Counter
from pathlib import Path
from typing import Any

from benchmarks.gpu.section import Context, Results, SectionFailedError

SHOWN = 10


def golden(context: Context, results: Results) -> None:
    """Run the golden vectors of PPO's formulas in float32 and float64."""
    _pytest(context, results, ["-m", "device", "tests/golden/test_golden.py"])


def tests(context: Context, results: Results) -> None:
    """Run the library's device tests; in the smoke test one file of them."""
    _pytest(
        context, results,
        ["-m", "device", "tests/library/test_losses.py"]
        if context.tiny else ["-m", "device", "tests/library"],
    )  # fmt: skip


def _pytest(context: Context, results: Results, selection: list[str]) -> None:
    """Run a selection of tests in a child process and read its report.

    Raises:
        SectionFailedError: A test failed, or none ran.
    """
    report = Path(context.scratch) / "report.xml"
    environment = {
        **os.environ, "RLHF_DEVICE": context.device, "RLHF_CHECK_SHAPES": "0",
        "RLHF_TOY_MODELS": str(Path(context.unpacked) / "toys"), "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-q", "-rs",
         f"--junitxml={report}", *selection], check=False, env=environment,
    )  # fmt: skip
    if not report.is_file():
        raise SectionFailedError(f"pytest ended with {done.returncode} and left no report")
    outcome = _outcomes(report)
    results.put(selection=selection, **outcome)
    failed = outcome["failed"] + outcome["errors"]
    if done.returncode or not outcome["passed"]:
        first = f"; first: {outcome['failures'][0]}" if outcome["failures"] else ""
        raise SectionFailedError(
            f"{failed} of {sum(outcome[n] for n in ('passed', 'failed', 'errors'))} tests failed, "
            f"pytest ended with {done.returncode}{first}"
        )


def _outcomes(report: Path) -> dict[str, Any]:
    """Count tests by outcome, and return the first failures with their messages."""
    counts: Counter[str] = Counter()
    failures = []
    for case in ET.parse(report).getroot().iter("testcase"):
        tag = next((c.tag for c in case if c.tag in ("failure", "error", "skipped")), "passed")
        counts[tag] += 1
        if tag in ("failure", "error"):
            element = case.find(tag)
            message = "" if element is None else (element.get("message") or "")
            line = " ".join(message.split())[:300]
            failures.append(f"{case.get('classname')}::{case.get('name')}: {line}")
    return {
        "passed": counts["passed"], "failed": counts["failure"], "errors": counts["error"],
        "skipped": counts["skipped"], "failures": failures[:SHOWN],
    }  # fmt: skip
