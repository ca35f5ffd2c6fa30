"""PPO at the end of its budget: it stops at an update, chooses as ever, and can go on."""

from __future__ import annotations

import math
from itertools import count

import pytest

from rlhf.budget import PLANNED, STOPPED_AT, Deadline
from rlhf.checkpoints.folder import checkpoints_in
from rlhf.files import read_json
from rlhf.launch import Job, launch
from rlhf.ppo.checkpoint import TrainState
from rlhf.ppo.frontier import Finding
from rlhf.ppo.train import _Timer, train_policy
from rlhf.ppo.watchdog import WATCHDOG
from rlhf.ranks import Ranks
from tests.library import toys
from tests.library.ppo_runs import assert_same_run

pytestmark = pytest.mark.device
PAST = Deadline(at=-math.inf, reason="budget.hours = 1: 1.2 h are used before this try")
#: Looks that a short run does not reach, but for those at its start and end.
RARE = {"every": 8, "prompts": 20, "max_kl": None, "min_entropy": 0.0, "min_eos": 0.0}


def minutes():
    """A clock that is a minute later whenever it is asked: at the start, and after each update."""
    ticks = count()
    return lambda: 60.0 * next(ticks)


def test_it_stops_when_another_update_would_not_fit_and_goes_on_to_the_same_bytes(
    train, sft, approved, data, tmp_path, caplog
):  # fmt: skip
    shared = {"total_episodes": 96, "watchdog": RARE, "checkpoint_every": 4}
    whole = train("whole", **shared)
    out, checkpoints = tmp_path / "cut", tmp_path / "c"
    out.mkdir()
    # Two updates end at 120 s, a third would at 180 s.
    result = train_policy(
        toys.changed(toys.PPO, **shared), data, sft, approved, out, runtime=toys.RUNTIME,
        checkpoints=checkpoints, deadline=Deadline(at=179.0, reason="why"), clock=minutes(),
    )  # fmt: skip
    assert (result.metrics[STOPPED_AT], result.metrics[PLANNED]) == (2, 6)
    assert result.metrics["stopped"] == 0  # not by the watchdog
    assert "PPO was stopped by the budget after 2 of 6 updates; the policy of upd" in caplog.text
    assert "goes on (why)" in caplog.text
    # It was looked at where it stopped, so that the best of what there is goes on.
    frontier = read_json(out / WATCHDOG)["frontier"]
    assert [row["update"] for row in frontier] == [0, 2]
    assert result.metrics["chosen_update"] == 2
    # The checkpoint holds none of that.
    (saved,) = checkpoints_in(checkpoints)
    assert saved.name == "update-000002"
    assert len(read_json(saved / "state.json")["frontier"]["looks"]) == 1

    steps = []
    again = train("again", checkpoints=checkpoints, deadline=PAST, told=steps.append, **shared)
    assert steps == []  # not even one more: some have been made
    assert_same_run(again, out)
    longer = train("longer", checkpoints=checkpoints, told=steps.append, **shared)
    assert steps == [3, 4, 5, 6]
    assert_same_run(longer, whole)
    assert (longer / WATCHDOG).read_bytes() == (whole / WATCHDOG).read_bytes()


def test_a_budget_that_is_used_up_before_leaves_one_update(train):
    out = train(deadline=PAST)
    assert len(read_json(out / "curve.json")) == 1
    # The judge, or its absence, chooses among the start and this one.
    out = train("watched", deadline=PAST, watchdog=RARE)
    assert [row["update"] for row in read_json(out / WATCHDOG)["frontier"]] == [0, 1]


def test_a_deadline_that_is_not_reached_changes_nothing(train, straight):
    far = train("far", deadline=Deadline(at=math.inf, reason=""))
    assert_same_run(far, straight)


class _Led(Ranks):
    """A process whose leader has its own clock."""

    def __init__(self, leader: bool) -> None:
        super().__init__(rank=1, count=2)
        self.leader, self.asked = leader, 0

    def from_leader(self, value):
        self.asked += 1
        return self.leader


@pytest.mark.parametrize("leader", [True, False])
def test_all_processes_follow_the_leader(leader):
    ranks = _Led(leader)
    clock = iter([0.0, 10.0] if leader else [0.0, 1e9]).__next__
    timer = _Timer(4, ranks, Deadline(at=1000.0, reason=""), clock)
    state = TrainState(update=1)
    assert timer.stops(state) is leader
    # Asked again after the same update, it asks the others no second time.
    assert timer.stops(state) is leader
    assert ranks.asked == 1
    assert timer.has_stopped is leader
    assert timer.stops(TrainState(update=4))
    found = TrainState(update=2)
    found.frontier.stopped = Finding("eos_loss", 2, "")
    assert timer.stops(found)
    assert ranks.asked == 1


def test_two_processes_stop_together(data, sft, approved, tmp_path):
    out = tmp_path / "two"
    out.mkdir()
    job = Job(
        stage="train-policy", field="ppo", section=toys.changed(toys.PPO, processes=2),
        inputs={"data": data, "sft": sft, "reward-model": approved.subject}, out_dir=out,
        verdict=approved.verdict, checkpoints=tmp_path / "c", runtime=toys.RUNTIME,
        deadline=Deadline(at=0.0, reason="no time"),
    )  # fmt: skip
    result = launch(job)
    assert (result.metrics[STOPPED_AT], result.metrics[PLANNED]) == (1, 4)
    assert [path.name for path in checkpoints_in(tmp_path / "c")] == ["update-000001"]
