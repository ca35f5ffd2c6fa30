"""Records of runs in the work folder, and what is said of runs whose process is gone."""

from __future__ import annotations

import io
import json
import os
import signal
import subprocess
import sys
from datetime import datetime

import psutil
import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.runs import runs
from flows.watch import exit_code, watch
from rlhf.errors import ArtifactMissing, ConfigError
from tasks.board import board
from tasks.console import PlainConsole
from tasks.run_record import (
    AWAY,
    KEPT,
    KILLED,
    RUNNING,
    find_record,
    new_record,
    read_records,
    remove_old,
    write_record,
)


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("PREFECT_API_URL", "")
    return tmp_path / "runs"


def test_a_run_of_this_process_runs_and_one_that_was_killed_does_not(folder):
    write_record(new_record("mine", ["train-sft"]), folder)
    child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    started = psutil.Process(child.pid).create_time()
    theirs = new_record("theirs", ["train-sft"]).model_copy(
        update={"pid": child.pid, "process_start": started}
    )
    write_record(theirs, folder)
    assert {r.name: r.state for r in read_records(folder)} == {"mine": RUNNING, "theirs": RUNNING}
    child.send_signal(signal.SIGKILL)
    child.communicate()
    assert {r.name: r.state for r in read_records(folder)} == {"mine": RUNNING, "theirs": KILLED}


def test_another_process_with_the_same_id_is_not_the_run(folder):
    record = new_record("reused", []).model_copy(update={"process_start": 1.0})
    write_record(record, folder)
    assert [r.state for r in read_records(folder)] == [KILLED]
    write_record(record.model_copy(update={"host": "another"}), folder)
    assert [r.state for r in read_records(folder)] == [AWAY]  # only that machine knows


def test_a_run_of_the_board_names_its_store(folder):
    board.show_on(PlainConsole(file=io.StringIO()))
    with board.running("mine", [], folder.parent, "s3://bucket/store"):
        assert [r.store for r in read_records(folder)] == ["s3://bucket/store"]
    board.show_on(None)


def test_a_record_of_another_version_is_listed(folder):
    write_record(new_record("newer", []), folder)
    (file,) = folder.glob("*.json")
    written = json.loads(file.read_text())
    written["store_options"]["of_tomorrow"] = "x"
    written["of_tomorrow"] = 1
    file.write_text(json.dumps(written))
    assert [(r.name, r.store_options) for r in read_records(folder)] == [("newer", None)]


def test_what_is_no_record_is_passed_over(folder):
    write_record(new_record("good", []), folder)
    (folder / "bad.json").write_text("{")
    (folder / "other.json").write_text('{"name": 3}')
    (folder / "folder.json").mkdir()
    os.mkfifo(folder / "pipe.json")
    assert [r.name for r in read_records(folder)] == ["good"]


def test_old_records_are_removed(folder):
    for number in range(KEPT + 3):
        write_record(new_record(f"r{number}", []), folder)
        os.utime(folder / f"r{number}.json", (number, number))
    remove_old(folder)
    left = {path.stem for path in folder.iterdir()}
    assert len(left) == KEPT
    assert not {"r0", "r1", "r2"} & left


def test_names_may_be_shortened_if_one_run_is_meant(folder):
    records = [new_record(name, []) for name in ("tiny-1", "tiny-10", "other")]
    assert find_record(records, "oth").name == "other"
    assert find_record(records, "tiny-1").name == "tiny-1"  # whole
    assert find_record(records, "none") is None
    with pytest.raises(ConfigError, match="2 runs are meant"):
        find_record(records, "tiny")


@pytest.fixture
def no_server():
    """Without one, whatever other tests of this process have set."""
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


@pytest.mark.usefixtures("no_server")
def test_the_commands_tell_of_a_killed_run(folder, tmp_path, capsys):
    record = new_record("lost", ["train-sft"]).model_copy(update={"process_start": 1.0})
    write_record(record, folder)
    runs(work_dir=tmp_path, json=True)
    assert '"state": "Killed"' in capsys.readouterr().out
    runs(work_dir=tmp_path)
    said = capsys.readouterr().out
    assert "lost" in said
    assert datetime.now().astimezone().strftime("%Y-") in said
    assert watch("lo", work_dir=tmp_path) == 1
    assert "lost: Killed  its process is gone; the same command goes on" in capsys.readouterr().out
    with pytest.raises(ArtifactMissing, match="the newest are: lost"):
        watch("never", work_dir=tmp_path)


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [("Promoted", None, 0), ("NotBetter", None, 0), ("Completed", None, 0), ("Failed", None, 1),
     ("Failed", 2, 2),
     ("GateRejected", None, 3), ("Interrupted", 130, 130), ("Killed", None, 1)],
)  # fmt: skip
def test_watch_ends_as_the_run_did(state, code, expected, folder, tmp_path, capsys):
    update = {"state": state, "code": code}
    write_record(new_record("done", ["train-sft"]).model_copy(update=update), folder)
    assert watch(work_dir=tmp_path) == expected
    assert exit_code(read_records(folder)[0]) == expected
    assert f"done: {state}" in capsys.readouterr().out
