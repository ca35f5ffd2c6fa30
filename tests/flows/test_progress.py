"""Progress of a stage in the terminal and in Prefect's UI."""

import io

import pytest
from prefect import flow

from tasks import progress
from tasks.console import PlainConsole
from tasks.progress import BarDisplay, LineDisplay, StageProgress


def console(terminal):
    return PlainConsole(file=io.StringIO(), force_terminal=terminal, width=120)


def test_lines_tell_stage_step_eta_and_metrics(monkeypatch):
    clock = iter([0.0, 10.0, 12.0, 40.0])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(clock))
    out = console(terminal=False)
    lines = LineDisplay(out)
    for step, text in ((1, ""), (11, "reward 1.5"), (12, "too soon"), (41, "reward 2  kl 3")):
        lines.update("train-policy", step, 41, text)
    shown = out.file.getvalue().splitlines()
    # The clock starts with the first step: 10 steps in 10 s leave 30 s for 30 steps.
    assert [line.split() for line in shown] == [
        ["train-policy", "1/41", "ETA", "-:--"],
        ["train-policy", "11/41", "ETA", "0:30", "reward", "1.5"],
        ["train-policy", "41/41", "ETA", "0:00", "reward", "2", "kl", "3"],
    ]


def test_bar_tells_the_same_and_goes_away(monkeypatch):
    out = console(terminal=True)
    bar = BarDisplay(out)
    bar.update("train-sft", 3, 10, "loss 0.5")
    bar.close()
    shown = out.file.getvalue()
    assert "train-sft" in shown
    assert "3/10" in shown
    assert "ETA" in shown
    assert "loss 0.5" in shown
    bar.update("train-reward-model", 1, 2, "")
    bar.close()
    assert "train-reward-model" in out.file.getvalue()


@pytest.mark.prefect
def test_an_api_that_fails_does_not_stop_the_work(monkeypatch):
    def broken(**_):
        raise ConnectionError("the API is away")

    monkeypatch.setattr("prefect.artifacts.create_progress_artifact", broken)
    done = []

    @flow
    def work():
        with StageProgress("train-sft") as told:
            for step in (1, 2):
                told(step, 2, {"loss": 1.0})
                done.append(step)

    work()
    assert done == [1, 2]
