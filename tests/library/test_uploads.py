"""Uploads of checkpoints during PPO: queueing, blocking, and the end of a run."""

from __future__ import annotations

import errno
import logging
import os
import shutil
import signal
import threading

import pytest

from rlhf.config import StoreConfig
from rlhf.errors import CheckpointError, Interrupted, StoreError, is_retriable
from tests.library.ppo_runs import Stopped, assert_same_run
from tests.library.upload_runs import (
    PATIENCE,
    Machine,
    checkpoint,
    left_behind,
    names,
    stored,
    threads,
    until,
)
from tests.store.proxy import fault_proxy

# --- in the background ----------------------------------------------------------------------------


def test_training_goes_on_while_a_checkpoint_is_sent(train, straight, watched):
    """The first upload ends only when the third update is done."""
    events, third = [], threading.Event()

    def hook(key):
        assert third.wait(PATIENCE)
        events.append("sent")

    def told(step):
        events.append(step)
        if step == 3:
            third.set()

    watched.store._backend.hook = hook
    assert_same_run(train(told=told, **watched.use()), straight)
    assert events[:3] == [1, 2, 3]
    assert "sent" in events


def test_who_is_faster_than_the_store_waits(watched, tmp_path, caplog):
    """One is sent, one waits, and for a third nothing is set aside yet."""
    events, gate, entered = [], threading.Event(), threading.Event()
    folders = [checkpoint(watched.checkpoints.with_name(f"c{i}"), i) for i in range(4)]

    def hook(key):
        entered.set()
        assert gate.wait(PATIENCE)
        events.append("sent")

    def trainer():
        uploads.submit(folders[2], 2, None)
        events.append("third")

    watched.store._backend.hook = hook
    with caplog.at_level(logging.INFO, "rlhf"), watched.uploads() as uploads:
        uploads.submit(folders[0], 0, None)
        assert entered.wait(PATIENCE)
        uploads.submit(folders[1], 1, None)
        assert "waited" not in caplog.text
        thread = threading.Thread(target=trainer)
        thread.start()
        thread.join(0.3)  # time for what must not happen
        assert thread.is_alive()
        assert len([*watched.folder.glob(".upload-*")]) == 2
        gate.set()
        thread.join(PATIENCE)
    assert events.index("third") >= 3  # the first one's files
    assert caplog.text.count("for the upload of earlier checkpoints") == 1


def test_never_more_than_two_are_set_aside(train, watched):
    """However slow the store is."""
    seen, uploads = [], watched.uploads()

    def hook(key):
        until(lambda: len(aside()) > 1 or uploads._ended)
        seen.append(len(aside()))

    def aside():
        return [*watched.checkpoints.glob(".upload-*")]

    watched.store._backend.hook = hook
    train(checkpoints=watched.checkpoints, uploads=uploads)
    assert max(seen) == 2
    assert left_behind(watched) == []
    assert threads() == []


def test_a_checkpoint_may_go_while_it_is_sent(watched, tmp_path, monkeypatch):
    """By hard links, or by copies where there are none."""

    def no_links(source, target):
        if ".upload-" in str(target):
            raise OSError(errno.EPERM, "Operation not permitted")
        link(source, target)

    link = os.link
    gate = threading.Event()
    watched.store._backend.hook = lambda key: gate.wait(PATIENCE)
    for number, links in enumerate((True, False)):
        gate.clear()
        folder = checkpoint(watched.checkpoints.with_name(f"c{number}"), number, str(links))
        if not links:
            monkeypatch.setattr("rlhf.checkpoints.uploads.os.link", no_links)
        with watched.uploads() as uploads:
            uploads.submit(folder, number, None)
            (aside,) = folder.parent.glob(".upload-*")
            assert (aside / "state.json").stat().st_nlink == (2 if links else 1)
            shutil.rmtree(folder)
            gate.set()
            until(lambda n=number: n in stored(watched.store))
        assert not [*folder.parent.glob(".upload-*")]


def test_a_full_disk_keeps_the_checkpoint(watched, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    folder = checkpoint(watched.checkpoints.with_name("c"), 1)
    monkeypatch.setattr("rlhf.checkpoints.uploads.os.link", full)
    monkeypatch.setattr("rlhf.checkpoints.uploads.shutil.copyfile", full)
    with watched.uploads() as uploads, pytest.raises(CheckpointError, match="is whole, but") as e:
        uploads.submit(folder, 1, None)
    assert is_retriable(e.value)
    assert not [*folder.parent.glob(".upload-*")]


# --- errors and endings ---------------------------------------------------------------------------


def surfaces(train, machine, break_it):
    """An upload fails while update 3 is made, long before the next checkpoint is due."""
    uploads = machine.uploads()

    def told(step):
        if step == 1:
            break_it()
        if step == 3:
            until(lambda: uploads.failed)

    with pytest.raises(StoreError) as caught:
        train("broken", told=told, checkpoints=machine.checkpoints, uploads=uploads,
              checkpoint_every=2)  # fmt: skip
    assert is_retriable(caught.value)
    assert names(machine.checkpoints) == ["update-000002", "update-000003"]
    assert left_behind(machine) == []
    assert threads() == []


def test_a_failed_upload_ends_the_run_at_the_next_update(train, straight, watched, caplog):
    asked = []

    def fail(key):
        asked.append(key)
        raise StoreError("busy")

    def break_it():
        watched.store._backend.hook = fail

    surfaces(train, watched, break_it)
    assert len(asked) <= 5  # the blobs of one checkpoint: nothing more is sent
    assert "busy" not in caplog.text  # it was raised
    watched.store._backend.hook = lambda key: None
    steps = []
    assert_same_run(train("mended", told=steps.append, **watched.use()), straight)
    assert steps == [4]


def test_after_an_error_what_waits_is_not_sent(watched):
    asked, gate = [], threading.Event()
    folders = [checkpoint(watched.folder / f"c{i}", i) for i in range(3)]

    def fail(key):
        asked.append(key)
        assert gate.wait(PATIENCE)
        raise StoreError("busy")

    watched.store._backend.hook = fail
    with watched.uploads() as uploads:
        uploads.submit(folders[0], 0, None)
        uploads.submit(folders[1], 1, None)
        gate.set()
        until(lambda: threads() == [])
        with pytest.raises(StoreError, match="busy"):
            uploads.submit(folders[2], 2, None)
    assert len(asked) <= 3  # files of the first
    assert left_behind(watched) == [*watched.folder.glob(".upload-*")] == []


@pytest.mark.s3
@pytest.mark.parametrize("place", [pytest.param("s3", marks=pytest.mark.s3)], indirect=True)
def test_a_busy_server_is_worth_a_retry(train, straight, place, s3_server, tmp_path):
    with fault_proxy(s3_server.endpoint) as faults:
        here = Machine(tmp_path / "m", place.uri, StoreConfig(endpoint_url=faults.endpoint))

        def break_it():
            faults.refuse = lambda method, path, _: 503 if method == "PUT" else None

        surfaces(train, here, break_it)
        faults.refuse = lambda *_: None
        steps = []
        assert_same_run(train("mended", told=steps.append, **here.use()), straight)
        assert steps == [4]


def test_sigterm_sends_what_waits(train, watched):
    """Before anyone else hears the signal, who may end the process."""
    uploads, heard = watched.uploads(), []
    watched.store._backend.hook = lambda key: until(lambda: uploads._ended)
    before = signal.signal(signal.SIGTERM, lambda *_: heard.append(stored(watched.store)))
    try:
        with pytest.raises(Interrupted):
            train(sigterm_at=2, checkpoints=watched.checkpoints, uploads=uploads)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert heard == [[1, 2]]
    assert left_behind(watched) == []
    assert threads() == []


@pytest.mark.parametrize("ending", ["success", "error"])
def test_another_end_sends_only_what_was_begun(train, watched, ending):
    """So nothing appears in the store once the run is over."""
    uploads, begun = watched.uploads(), threading.Event()

    def hook(key):
        begun.set()
        until(lambda: uploads._ended)

    def told(step):
        assert step == 1 or begun.wait(PATIENCE)

    watched.store._backend.hook = hook
    options = {"checkpoints": watched.checkpoints, "uploads": uploads, "told": told}
    if ending == "success":
        train(total_episodes=32, **options)  # the second waits
    else:
        with pytest.raises(Stopped):
            train(stop_at=3, **options)
    assert stored(watched.store) == [1]
    assert left_behind(watched) == []
    assert threads() == []


def test_an_error_that_nobody_can_be_told_of_is_logged(train, straight, watched, caplog):
    """The run is done: its checkpoints are no longer needed."""
    uploads, begun = watched.uploads(), threading.Event()

    def fail(key):
        begun.set()
        until(lambda: uploads._ended)
        raise StoreError("busy")

    def told(step):
        assert step < 3 or begun.wait(PATIENCE)

    watched.store._backend.hook = fail
    options = {"checkpoints": watched.checkpoints, "uploads": uploads, "checkpoint_every": 2}
    assert_same_run(train(told=told, **options), straight)
    assert "the last checkpoint is not in" in caplog.text
    assert left_behind(watched) == []
