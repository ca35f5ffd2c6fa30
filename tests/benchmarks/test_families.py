"""The matrix of families: what counts as exact, refused and at fault, and resuming by its file."""

from __future__ import annotations

import json

import pytest

from benchmarks import families
from benchmarks.family_checks import CHECKS, REHEARSAL, REHEARSAL_LORA

EXACT = dict.fromkeys(CHECKS, "exact") | {"decode": "exact (packed)"}
DOOR = "refused: base.path = 'x': rehearsed in small, PPO fails: reason; cure"


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        ({}, []),
        ({"LoRA": "**wrong**: gap"}, ["LoRA: **wrong**: gap"]),
        ({"LoRA": "**wrong**: gap", REHEARSAL_LORA: DOOR}, []),
        # A refusal by one rehearsal is none by the other.
        ({"PPO": "**crash**: x", REHEARSAL_LORA: DOOR}, ["PPO: **crash**: x", f"{REHEARSAL_LORA}: "
                                                         f"exact, but {DOOR}"]),
        ({REHEARSAL: DOOR}, [f"{REHEARSAL}: exact, but {DOOR}"]),
        ({REHEARSAL: "none: no miniature"}, [f"{REHEARSAL}: none: no miniature"]),
        ({"process": "**crash**: ended with -24 in PPO"}, ["process: **crash**: ended with -24 in "
                                                           "PPO"]),
    ],
)  # fmt: skip
def test_faults_are_failures_that_a_rehearsal_let_through_and_refusals_of_what_is_exact(
    changes, found
):
    assert families.faults(EXACT | changes) == found


def test_what_does_not_load_is_refused_by_its_setting_or_at_fault():
    assert families.faults({"load": "refused: base.path: a model that reads both ways"}) == []
    assert families.faults({"load": "refused: no field"}) == ["load: refused: no field"]
    assert families.faults({"load": "**crash**: x"}) == ["load: **crash**: x"]


def test_a_file_of_results_is_resumed_and_its_table_counts_what_was_not_run(tmp_path, capsys):
    file = tmp_path / "results.jsonl"
    old = {"family": "gpt2", "results": {"load": "**crash**: old"}}
    refused = {"LoRA": "**wrong**: a | b", REHEARSAL_LORA: DOOR}
    lines = [old, {"family": "bloom", "results": EXACT | refused}, old | {"results": EXACT}]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    known = families.read_results(file)
    assert families.missing(["bloom", "llama", "gpt2", "opt"], known, None) == ["llama", "opt"]
    assert families.missing(["bloom", "llama", "gpt2", "opt"], known, 1) == ["llama"]
    families.main(["--results", str(file), "--at-most", "0"])
    out = capsys.readouterr().out
    assert f"Of {len(families.FAMILIES)} configurations 2 were run: 1 are exact" in out
    assert "Decoded packed: `gpt2`." in out  # by its later line
    assert f"| `bloom` | {DOOR} | LoRA: **wrong**: a / b |" in out
