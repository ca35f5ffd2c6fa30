"""The result or error of a launch, from the files that its children wrote."""

from __future__ import annotations

import json

import pytest

from rlhf.errors import DataError, Interrupted, StoreError, WorkerDied, is_retriable
from rlhf.files import write_json
from rlhf.launch.job import FAILURES, ended_file, output_file
from rlhf.launch.parent import read_result


def ended(folder, rank, **report):
    write_json(ended_file(folder, rank), {"time": rank, **report})


BROKEN = {"kind": "DistBackendError", "message": "Connection closed by peer"}


@pytest.mark.parametrize(
    ("reports", "error", "text"),
    [
        # an error of the library is the cause, whatever broke at the others
        ([BROKEN, {"kind": "DataError", "message": "no rows"}], DataError, "^no rows$"),
        ([{"kind": "Interrupted", "message": "saved"}] * 2, Interrupted, "^saved$"),
        # one stopped, the other could not save
        (
            [{"kind": "Interrupted", "message": "x"}, {"kind": "StoreError", "message": "away"}],
            StoreError, "^away$",
        ),
        # a child without a report is the cause of what the others report
        ([BROKEN, None], WorkerDied, "process 2 of 2 was ended by SIGKILL"),
        ([{"kind": "Interrupted", "message": "x"}, None], WorkerDied, "process 2 of 2"),
        ([{"kind": "ValueError", "message": "bad"}, BROKEN], ValueError, "^bad$"),
        ([{"kind": "Strange", "message": "bad"}, BROKEN], RuntimeError, "^Strange: bad$"),
    ],
)  # fmt: skip
def test_the_cause_is_found(tmp_path, reports, error, text):
    folder = tmp_path / "folder"
    folder.mkdir()
    for rank, report in enumerate(reports):
        if report:
            ended(folder, rank, **report)
    (folder / FAILURES).write_text(json.dumps({"0": 1, "1": -9}))
    with pytest.raises(error, match=text) as caught:
        read_result(folder, "stage", 2, 1)
    assert type(caught.value) is error


def test_a_dead_childs_error_has_its_last_output(tmp_path):
    output_file(tmp_path, 0).write_text("\n".join(f"line {n}" for n in range(50)))
    (tmp_path / FAILURES).write_text(json.dumps({"0": 3, "1": -15}))
    with pytest.raises(WorkerDied, match=r"(?s)process 1 of 2 ended with status 3.*line 49$") as e:
        read_result(tmp_path, "stage", 2, 1)
    assert "line 41" not in str(e.value)
    assert is_retriable(e.value)
    (tmp_path / FAILURES).unlink()
    with pytest.raises(WorkerDied, match="the launcher of its processes was ended by SIGKILL"):
        read_result(tmp_path, "stage", 2, -9)
