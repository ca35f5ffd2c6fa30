"""The watchdog on the toy task: it stops bad runs, spares healthy ones, and changes neither."""

from __future__ import annotations

import logging
import random
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rlhf.ppo.optimisation as optimise_module
from rlhf.checkpoints.folder import checkpoints_in
from rlhf.data.rows import PAIRS_JUDGE, Pair, PromptRow, write_rows
from rlhf.errors import ConfigError, TrainingError
from rlhf.files import read_json, write_json
from rlhf.judge import JUDGE
from rlhf.launch import Job, launch
from rlhf.ppo.checkpoint import TrainState
from rlhf.ppo.frontier import NON_FINITE
from rlhf.ppo.train import build_trainer, train_policy
from rlhf.ppo.watchdog import WATCHDOG, make_watchdog
from tests.library import toys
from tests.library.kills import in_child, kill_points
from tests.library.ppo_runs import EVERYTHING, LORA, Stopped, assert_same_run
from tests.library.test_ppo_errors import broken_after
from tests.library.upload_runs import Machine

pytestmark = pytest.mark.device
#: A look at every update, stopping at once: toy runs are short.
EAGER = {"every": 1, "prompts": 20, "patience": 1}
#: Nothing but the judge stops the run: the toy reward likes replies that never end.
JUDGE_ALONE = {
    "max_kl": None, "min_entropy": 0.0, "max_length": None, "min_eos": 0.0,
    "min_explained_variance": None,
}  # fmt: skip


@pytest.fixture
def folder(data, tmp_path):
    """A dataset with a judge split of prompts that no other part has."""
    toys.write_data(tmp_path / "data")
    rows = [
        Pair(f"{a} or {b} or {a}?", "good", "bad") for a in toys.ASKED for b in toys.ASKED if a != b
    ]
    write_rows(tmp_path / "data" / PAIRS_JUDGE, rows)
    return tmp_path / "data"


def judge_of(folder, flipped=False, usable=True):
    """Make a folder a judge: one that likes "good", or one that likes "bad"."""
    if flipped:
        model = toys.weights(folder)
        model["score.weight"] *= -1
        save_file(model, folder / "model.safetensors", {"format": "pt"})
    reason = None if usable else "it is a coin"
    write_json(folder / JUDGE, {"trained": True, "usable": usable, "reason": reason})
    return folder


@pytest.fixture
def judge(reward_model, copy_of):
    return judge_of(copy_of(reward_model))


@pytest.fixture
def contrary(reward_model, tmp_path):
    return judge_of(Path(shutil.copytree(reward_model, tmp_path / "contrary")), flipped=True)


def report_of(out):
    return read_json(out / WATCHDOG)


# --- every detector stops a run -------------------------------------------------------------------


def test_over_optimisation(train, folder, contrary, sft, caplog):
    """What PPO raises lowers the judge's score from the first update on: the start goes on."""
    out = train(
        folder=folder, judge=contrary, total_episodes=320, watchdog={**EAGER, **JUDGE_ALONE}
    )
    report = report_of(out)
    assert report["stopped"]["detector"] == "over_optimisation"
    assert report["stopped"]["update"] == len(read_json(out / "curve.json")) < 20
    assert "below that of update" in report["stopped"]["evidence"]
    assert report["chosen"] <= 2
    assert report["frontier"][-1]["judge"] < report["frontier"][report["chosen"]]["judge"]
    assert report["frontier"][-1]["proxy"] > report["frontier"][0]["proxy"]
    if report["chosen"] == 0:
        toys.assert_same_weights(out, sft)
    assert "watchdog: training stops at update" in caplog.text


@pytest.mark.parametrize(
    ("detector", "options", "limits"),
    [
        ("kl_above_budget", {"kl_coef": 0.0, "learning_rate": 0.02}, {"max_kl": 5.0}),
        ("eos_loss", {"kl_coef": 0.0, "missing_eos": "none"}, {}),
        (
            "length_explosion", {"kl_coef": 0.0, "missing_eos": "none", "max_new_tokens": 12},
            {**JUDGE_ALONE, "max_length": 1.4},
        ),
        (
            # Rates and limits far from the edge: a rounding moves a run like this one.
            "entropy_collapse", {"kl_coef": 0.0, "learning_rate": 0.05},
            {**JUDGE_ALONE, "min_entropy": 0.1},
        ),
        (
            "value_collapse",
            {"critic_learning_rate": 10.0, "critic": "policy", "value_clip_range": None},
            {**JUDGE_ALONE, "min_explained_variance": -1.0},
        ),
    ],
)  # fmt: skip
def test_the_others(train, folder, detector, options, limits):
    """Without a judge, on runs that go wrong; the last policy before the fault goes on."""
    options = {"total_episodes": 640, "lr_scheduler": "constant", **options}
    out = train(folder=folder, watchdog={**EAGER, "patience": 2, **limits}, **options)
    report, curve = report_of(out), read_json(out / "curve.json")
    assert report["stopped"], report
    assert report["stopped"]["detector"] == detector, report
    assert report["stopped"]["update"] == len(curve) < 40
    assert report["chosen"] == len(curve) - 2  # two looks in a row had the reason
    assert len(report["frontier"]) == len(curve) + 1
    assert all(row["judge"] is None for row in report["frontier"])


def test_a_healthy_run_is_left_alone(train, folder, judge):
    """Default thresholds; the judge agrees with the reward model."""
    options = {"learning_rate": 1e-3, "total_episodes": 320, "missing_eos_penalty": 9.0}
    watchdog = {"every": 2, "prompts": 20}
    seen = train(folder=folder, judge=judge, watchdog=watchdog, **options)
    report = report_of(seen)
    assert report["stopped"] is None
    assert report["chosen"] == 20
    assert [row["update"] for row in report["frontier"]] == [*range(0, 21, 2)]
    assert report["frontier"][-1]["judge"] > report["frontier"][0]["judge"]
    # It draws numbers of its own alone: the weights are those of a run without it.
    assert_same_run(seen, train("alone", folder=folder, **options))


def test_the_result_is_measured_and_counted(folder, sft, approved, contrary, tmp_path):
    config = toys.changed(toys.PPO, total_episodes=320, watchdog={**EAGER, **JUDGE_ALONE})
    out = tmp_path / "out"
    out.mkdir()
    result = train_policy(config, folder, sft, approved, out, judge=contrary, runtime=toys.RUNTIME)
    chosen, curve = result.metrics["chosen_update"], read_json(out / "curve.json")
    assert result.metrics["stopped"] == 1
    assert result.metrics["updates"] == len(curve) > chosen
    assert result.metrics["kl"] == curve[chosen]["kl"]  # measured before that update
    # At the same prompts and numbers, the published policy is the chosen row.
    trainer = build_trainer(config, out, approved, 0, toys.DEVICE)
    watchdog = make_watchdog(trainer, folder, contrary, [])
    state = TrainState()
    watchdog.look(state)
    (row,) = (r for r in report_of(out)["frontier"] if r["update"] == chosen)
    assert state.frontier.looks[0].judge.value == pytest.approx(row["judge"], abs=1e-4)


# --- a loss that is not finite --------------------------------------------------------------------


def test_not_finite_with_a_judge_the_best_goes_on(train, folder, judge, monkeypatch, caplog):
    options = {"folder": folder, "judge": judge, "watchdog": {**EAGER, **JUDGE_ALONE}}
    straight = train("straight", total_episodes=160, **options)
    with monkeypatch.context() as patch:
        broken = broken_after(4 * 8 + 1, lambda loss: loss * float("nan"))
        patch.setattr(optimise_module, "policy_loss", broken)
        out = train("broken", total_episodes=160, **options)
    report = report_of(out)
    assert report["stopped"]["detector"] == NON_FINITE
    assert report["stopped"]["update"] == 9
    assert 0 < report["chosen"] <= 8
    assert report["frontier"] == report_of(straight)["frontier"][:9]
    assert "watchdog: training stops at update 9" in caplog.text


def test_not_finite_without_a_better_policy_is_an_error(train, folder, contrary, monkeypatch):
    for given in (None, contrary):
        with monkeypatch.context() as patch:
            broken = broken_after(5, lambda loss: loss * float("nan"))
            patch.setattr(optimise_module, "policy_loss", broken)
            with pytest.raises(TrainingError, match="not finite"):
                train("broken", folder=folder, judge=given, watchdog={**EAGER, **JUDGE_ALONE})


# --- resume ---------------------------------------------------------------------------------------


def assert_same_result(a, b):
    assert_same_run(a, b)
    assert (a / WATCHDOG).read_bytes() == (b / WATCHDOG).read_bytes()


@pytest.mark.parametrize("stop_at", [1, 2, 3, 4])
@pytest.mark.parametrize("options", [{}, {"lora": LORA}], ids=["weights", "lora"])
def test_a_resumed_run_is_the_same_run(train, folder, contrary, tmp_path, stop_at, options):
    """The start's weights go on, and pass through a checkpoint."""
    shared = {
        "folder": folder, "judge": contrary, **options,
        "watchdog": {**EAGER, **JUDGE_ALONE, "every": 2, "patience": 9},
    }  # fmt: skip
    straight = train("straight", **shared)
    if not options:  # adapters have hardly moved
        assert report_of(straight)["chosen"] < 4
    with pytest.raises(Stopped):
        train("stopped", checkpoints=tmp_path / "c", stop_at=stop_at, **shared)
    torch.manual_seed(12345)
    assert_same_result(train("resumed", checkpoints=tmp_path / "c", **shared), straight)
    names = {path.name for path in checkpoints_in(tmp_path / "c")[-1].iterdir()}
    assert "retained.safetensors" in names
    # Complete: only written again.
    assert_same_result(train("again", checkpoints=tmp_path / "c", **shared), straight)


@pytest.mark.cpu_only("a forked process has no accelerator")
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_kills_between_looks_lose_nothing_of_the_policy_that_goes_on(
    train, folder, tmp_path
):  # fmt: skip
    """Update 2 is the last within the limits and goes on, while the training leaves it behind."""
    shared = {
        "folder": folder, "judge": None, "total_episodes": 128,
        "watchdog": {**EAGER, **JUDGE_ALONE, "every": 2, "patience": 9, "max_kl": 0.6},
    }  # fmt: skip
    with kill_points() as points:
        straight = train("straight", checkpoints=tmp_path / "s", **shared)
    report = report_of(straight)
    assert report["chosen"] == 2
    assert [row["kl"] > 0.6 for row in report["frontier"]] == [False, False, True, True, True]
    # From the first checkpoint on whose weights are not the retained ones, to the last one.
    third = points.index(f"replace {tmp_path / 's/.partial-update-000003'}")
    last = points.index(f"replace {tmp_path / 's/.partial-update-000008'}")
    for at in random.Random(3).sample(range(third + 1, last), 3):
        killed = tmp_path / f"killed-{at}"

        def work(at=at, killed=killed):
            with kill_points(at):
                train("killed", checkpoints=killed, **shared)

        assert in_child(work) == -signal.SIGKILL
        newest = checkpoints_in(killed)[-1]
        kept, present = (load_file(newest / f"{n}.safetensors") for n in ("retained", "policy"))
        assert any(not torch.equal(kept[name], present[name]) for name in kept), newest
        steps = []
        resumed = train("resumed", checkpoints=killed, told=steps.append, **shared)
        assert steps[0] >= 4, points[at]
        assert_same_result(resumed, straight)
        contents = [{p.name: p.read_bytes() for p in f.iterdir()} for f in (straight, resumed)]
        assert contents[0] == contents[1]


def test_everything_is_resumed_on_another_machine(train, folder, judge, tmp_path):
    shared = {"folder": folder, "judge": judge, **EVERYTHING, "watchdog": {**EAGER, "every": 2}}
    first, second = (Machine(tmp_path / n, str(tmp_path / "store")) for n in ("a", "b"))
    straight = train("straight", **shared)
    with pytest.raises(Stopped):
        train("stopped", stop_at=4, **first.use(), **shared)
    steps = []
    resumed = train("resumed", told=steps.append, **second.use(), **shared)
    assert 1 < steps[0] <= 4
    assert_same_result(resumed, straight)


def test_a_stopped_run_stays_stopped(train, folder, contrary, tmp_path):
    shared = {
        "folder": folder, "judge": contrary, "total_episodes": 320, "checkpoints": tmp_path / "c",
        "watchdog": {**EAGER, **JUDGE_ALONE},
    }  # fmt: skip
    first = train("first", **shared)
    steps = []
    assert_same_result(train("second", told=steps.append, **shared), first)
    assert steps == []


def test_another_judge_is_refused(train, folder, judge, contrary, tmp_path):
    shared = {"folder": folder, "checkpoints": tmp_path / "c", "watchdog": EAGER}
    train("a", judge=judge, **shared)
    with pytest.raises(ConfigError, match=r"its judge is .*delete the folder"):
        train("b", judge=contrary, **shared)


def test_a_damaged_snapshot_is_damage(train, folder, judge, tmp_path, caplog):
    shared = {"folder": folder, "judge": judge, "checkpoints": tmp_path / "c", "watchdog": EAGER}
    first = train("a", **shared)
    newest = checkpoints_in(tmp_path / "c")[-1]
    (newest / "retained.safetensors").unlink()
    with caplog.at_level(logging.WARNING, "rlhf"):
        assert_same_result(train("b", **shared), first)
    assert f"{newest} is damaged" in caplog.text


# --- prompts, judges, processes -------------------------------------------------------------------


def test_the_looks_are_at_prompts_of_the_judge_split(sft, approved, folder, judge):
    trainer = build_trainer(toys.changed(toys.PPO, watchdog={}), sft, approved, 0, toys.DEVICE)
    watchdog = make_watchdog(trainer, folder, judge, [PromptRow("tea or cup?")])
    assert len(watchdog.rows) == 20
    assert all(str(row.prompt).count(" or ") == 2 for row in watchdog.rows)
    assert watchdog.judge is not None
    assert watchdog.notes == ["there are 20 prompts to look at, of 64 asked for"]


def test_without_a_usable_judge_it_says_so(train, folder, data, reward_model, copy_of):
    coin = judge_of(copy_of(reward_model), usable=False)
    for options, note in [
        ({"judge": coin, "folder": folder}, "the judge is not usable: it is a coin"),
        ({"folder": folder}, "no judge was given"),
        ({"folder": data}, "no judge split"),
    ]:
        report = report_of(train(watchdog={**EAGER, **JUDGE_ALONE}, **options))
        assert report["chosen"] == 4
        assert note in " ".join(report["notes"])
        assert {row["judge"] for row in report["frontier"]} == {None}


def test_rewards_that_need_the_training_are_taken_from_it(train, folder):
    """Comparisons of replies add up to nothing at every look; the training's mean is no better."""
    out = train(
        folder=folder, env_type="preference_comparison", watchdog={**EAGER, "every": 2},
        total_episodes=64,
    )  # fmt: skip
    curve = [row["reward"] for row in read_json(out / "curve.json")]
    proxies = [row["proxy"] for row in report_of(out)["frontier"]]
    assert proxies == pytest.approx([curve[0], sum(curve[:2]) / 2, sum(curve[2:]) / 2])


def test_two_processes_look_alike(train, folder, sft, approved, contrary, tmp_path):
    options = {"watchdog": {**EAGER, **JUDGE_ALONE}, "total_episodes": 128}
    alone = train("alone", folder=folder, judge=contrary, **options)
    out = tmp_path / "two"
    out.mkdir()
    job = Job(
        stage="train-policy", field="ppo", section=toys.changed(toys.PPO, processes=2, **options),
        inputs={"data": folder, "sft": sft, "reward-model": approved.subject, "judge": contrary},
        out_dir=out, verdict=approved.verdict, checkpoints=tmp_path / "c", runtime=toys.RUNTIME,
    )  # fmt: skip
    launch(job)
    one, two = report_of(alone), report_of(out)
    assert two["chosen"] == one["chosen"]
    assert two["stopped"]["update"] == one["stopped"]["update"]
    assert toys.distance(alone, out) < 2e-4
    for a, b in zip(one["frontier"], two["frontier"], strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-3)
