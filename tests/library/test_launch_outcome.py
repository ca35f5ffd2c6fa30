"""What a launch came to, told from what its processes left."""

from __future__ import annotations

import json

import pytest

from rlhf.errors import DataError, Interrupted, StoreError, WorkerDied, worth_retrying
from rlhf.files import write_json
from rlhf.launch import folder as names
from rlhf.launch.outcome import outcome


def ended(folder, rank, **words):
    write_json(names.ended_file(folder, rank), {"time": rank, **words})


BROKEN = {"kind": "DistBackendError", "message": "Connection closed by peer"}


@pytest.mark.parametrize(
    ("words", "kind", "text"),
    [
        # ours is the cause, whatever broke at the others
        ([BROKEN, {"kind": "DataError", "message": "no rows"}], DataError, "^no rows$"),
        ([{"kind": "Interrupted", "message": "saved"}] * 2, Interrupted, "^saved$"),
        # one stopped, the other could not save
        (
            [{"kind": "Interrupted", "message": "x"}, {"kind": "StoreError", "message": "away"}],
            StoreError, "^away$",
        ),
        # who says nothing is the cause of what the others say
        ([BROKEN, None], WorkerDied, "process 2 of 2 was ended by SIGKILL"),
        ([{"kind": "Interrupted", "message": "x"}, None], WorkerDied, "process 2 of 2"),
        ([{"kind": "ValueError", "message": "bad"}, BROKEN], ValueError, "^bad$"),
        ([{"kind": "Strange", "message": "bad"}, BROKEN], RuntimeError, "^Strange: bad$"),
    ],
)  # fmt: skip
def test_the_cause_is_found(tmp_path, words, kind, text):
    folder = tmp_path / "folder"
    folder.mkdir()
    for rank, said in enumerate(words):
        if said:
            ended(folder, rank, **said)
    (folder / names.FAILURES).write_text(json.dumps({"0": 1, "1": -9}))
    with pytest.raises(kind, match=text) as caught:
        outcome(folder, "stage", 2, 1)
    assert type(caught.value) is kind


def test_a_death_is_told_with_what_was_printed_last(tmp_path):
    names.output_file(tmp_path, 0).write_text("\n".join(f"line {n}" for n in range(50)))
    (tmp_path / names.FAILURES).write_text(json.dumps({"0": 3, "1": -15}))
    with pytest.raises(WorkerDied, match=r"(?s)process 1 of 2 ended with status 3.*line 49$") as e:
        outcome(tmp_path, "stage", 2, 1)
    assert "line 41" not in str(e.value)
    assert worth_retrying(e.value)
    (tmp_path / names.FAILURES).unlink()
    with pytest.raises(WorkerDied, match="the launcher of its processes was ended by SIGKILL"):
        outcome(tmp_path, "stage", 2, -9)
