"""Progress of a stage in Prefect's UI."""

import pytest
from prefect import flow

from tasks.progress import StageProgress


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
