"""SIGTERM and Ctrl-C while a training saves: a word at once, and the second Ctrl-C ends it."""

from __future__ import annotations

import signal

import pytest

from rlhf import signals
from rlhf.signals import deferred_sigterm


@pytest.fixture
def told(monkeypatch):
    lines = []
    monkeypatch.setattr(signals, "notify", lines.append)
    return lines


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_told_at_once_and_delivered_after_the_save(number, told):
    delivered = []
    before = signal.signal(number, lambda got, _: delivered.append(got))
    try:
        with deferred_sigterm() as came:
            assert not came()
            signal.raise_signal(number)
            assert came()
            assert delivered == []
            (line,) = told
            assert "saving after this update" in line
            assert ("Ctrl-C again" in line) == (number == signal.SIGINT)
        assert delivered == [number]
    finally:
        signal.signal(number, before)


def test_the_time_until_the_save_is_told_from_the_time_of_an_update(told):
    now = [0.0]
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    try:
        with deferred_sigterm(lambda: now[0]) as came:
            for now[0] in (200.0, 200.1, 200.2, 440.0, 440.1):  # an update takes 240 s
                assert not came()
            for now[0] in (460.0, 640.0, 675.0, 900.0):
                signal.raise_signal(signal.SIGTERM)
    finally:
        signal.signal(signal.SIGTERM, before)
    more = "; kill -9 ends it without, and keeps the save before"
    assert told == [
        "terminated: saving after this update, in about 4 min",
        f"terminated again: saving after this update, in about 40 s{more}",
        f"terminated again: saving after this update{more}",  # in a moment
        f"terminated again: saving after this update{more}",  # overdue
    ]


def test_the_second_ctrl_c_ends_it_at_once(told):
    def press_twice():
        with deferred_sigterm():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            pytest.fail("it went on")

    # A job in the background of a shell without job control ignores it.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            press_twice()
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(told) == 1


def test_an_ignored_ctrl_c_stays_ignored(told):
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with deferred_sigterm() as came:
            signal.raise_signal(signal.SIGINT)
            assert not came()
    finally:
        signal.signal(signal.SIGINT, before)
    assert told == []
