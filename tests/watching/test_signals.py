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


def test_the_second_ctrl_c_ends_it_at_once(told):
    went_on = []

    def work():
        with deferred_sigterm():
            signal.raise_signal(signal.SIGINT)
            signal.raise_signal(signal.SIGINT)
            went_on.append(True)

    with pytest.raises(KeyboardInterrupt):
        work()
    assert not went_on
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
