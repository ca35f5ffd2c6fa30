"""The ledger: attempts that fail or are killed, sums of artifacts and lines, budgets by stage."""

from __future__ import annotations

import contextlib
import json
import logging

import pytest

from rlhf.budget import Spending
from rlhf.config import PipelineConfig
from rlhf.costs import Cost
from rlhf.errors import BudgetSpent, ConfigError, StoreError
from rlhf.report.model import StageState
from rlhf.store import Producer
from tasks.budget import check_budget, deadline_of, require_left, stopped_key
from tasks.costs import cost_of_failed
from tasks.forecast import forecast_of, kinds, reserve
from tasks.ledger import ARTIFACTS, Ledger, attempts_of, cost_of_making, costs_of, record_run
from tasks.report import PipelineRun
from tasks.run_costs import (
    RunCosts,
    StageCosts,
    cost_lines,
    find_run,
    forecast_total,
    line_total,
    read_line,
)
from tasks.runner import fingerprint, run_stage, work_of
from tasks.stage import store_of
from tasks.stages import EVALUATE_POLICY, PREPARE_DATA, STAGES, TRAIN_POLICY, TRAIN_SFT

KEY = "ab" * 32
DIGEST = "cd" * 32
PRODUCER = Producer(
    stage="x", code_version="1", dirty=False, config={}, lock_digest=None, seed=0, versions={}
)


def configured(folder, **changes) -> PipelineConfig:
    tree = {
        "store": str(folder / "store"),
        "data": {"world": {"pairs": 64, "demonstrations": 64, "prompts": 32, "eval_pairs": 30,
                           "eval_prompts": 12}},
        "runtime": {"work_dir": str(folder / "work"), "device": "cpu"},
        "gates": {"reward_model": None, "policy": None, "champion": None},
    }  # fmt: skip
    return PipelineConfig.model_validate({**tree, **changes})


@pytest.fixture
def ledger(tmp_path):
    """Function that returns the ledger of one stage's work, as another process would."""
    (tmp_path / "work").mkdir()

    def make(stage=TRAIN_POLICY, folder="work", **changes) -> Ledger:
        config = configured(tmp_path, **changes)
        (tmp_path / folder).mkdir(exist_ok=True)
        return Ledger(stage, KEY, "train-ab", config, store_of(config), tmp_path / folder)

    return make


def attempt(ledger, seconds, steps=0, then=lambda: None):
    """An attempt that took so long by its own account, and then does something."""
    with ledger.attempt() as meter:
        meter._started -= seconds
        meter.steps = steps
        then()


def fail():
    raise OSError("disk")


class _Killed(Exception):
    """Simulates SIGKILL, after which the ledger does nothing."""


def _die(ledger):
    ledger._send = lambda: False
    raise _Killed


# --- attempts -------------------------------------------------------------------------------------


def test_failed_and_killed_attempts_are_in_the_sum(ledger, tmp_path):
    first = ledger()
    assert first.earlier() == []
    with pytest.raises(OSError, match="disk"):
        attempt(first, 100, 3, fail)
    assert not (tmp_path / "work" / "attempts").exists()

    # What a killed process leaves is the file that it wrote last.
    killed = ledger()
    with pytest.raises(_Killed):
        attempt(killed, 50, 5, lambda: (killed._sampled(), _die(killed)))
    assert len([*(tmp_path / "work/attempts").iterdir()]) == 1

    last = ledger()
    earlier = last.earlier()
    assert seconds(earlier) == [100, 50]
    assert not (tmp_path / "work/attempts").exists()
    attempt(last, 10, 9)
    cost = last.conclude(DIGEST, earlier, whole=True)
    assert (seconds([cost]), cost.attempts, cost.steps) == ([160], 3, 9)
    assert cost.device == "cpu"
    assert cost.memory > 10**7
    assert cost.energy is None or cost.energy > 0
    assert costs_of(last._store, [DIGEST, KEY]) == {DIGEST: cost}
    # The next work with this fingerprint, as after its artifact was lost, begins anew.
    assert ledger().earlier() == []


def test_an_attempt_that_was_sent_often_counts_once(ledger):
    first = ledger()
    with pytest.raises(OSError, match="disk"):
        attempt(first, 600, then=lambda: (first._send(), first._send(), fail()))
    (cost,) = ledger().earlier()
    assert seconds([cost]) == [600]
    # One that was sent and then succeeded is no earlier attempt of what comes after it.
    second = ledger()
    with second.attempt():
        second._send()
    second.conclude(DIGEST, [], whole=True)
    assert ledger().earlier() == []


def kill(work):
    """A process that is killed in its attempt; its file stays."""
    with pytest.raises(_Killed):
        attempt(work, 50, then=lambda: (work._sampled(), _die(work)))


def seconds(costs):
    """Seconds in tens: a machine under load takes some more."""
    return [round(cost.seconds, -1) for cost in costs]


def test_a_killed_attempt_counts_while_the_store_can_t_take_it(ledger, monkeypatch, tmp_path):
    kill(ledger())
    with monkeypatch.context() as patch:
        patch.setattr("rlhf.store.history.Histories.append", refuse)
        assert seconds(ledger().earlier()) == [50]
        failed = ledger()
        with pytest.raises(OSError, match="disk"):
            attempt(failed, 70, then=fail)
        assert sorted(seconds(ledger().earlier())) == [50, 70]
    assert sorted(seconds(ledger().earlier())) == [50, 70]
    assert not (tmp_path / "work/attempts").exists()


def refuse(*_):
    raise StoreError("no answer")


def test_a_process_that_is_killed_after_its_send_counts_once(ledger, monkeypatch):
    kill(ledger())
    with monkeypatch.context() as patch:  # killed before the file was removed
        patch.setattr("tasks.ledger._remove", lambda _: None)
        assert seconds(ledger().earlier()) == [50]
    assert seconds(ledger().earlier()) == [50]


@pytest.mark.parametrize("writes", [0, 1, 2])
def test_a_process_that_is_killed_as_it_concludes_counts_once(ledger, monkeypatch, writes):
    """After the record of its artifact, before so many writes of the ledger were done."""
    first = ledger()
    with pytest.raises(OSError, match="disk"):
        attempt(first, 100, then=fail)
    last = ledger()
    earlier = last.earlier()
    attempt(last, 10)
    done, append = [], last._store.history.append

    def some(*entry):
        if len(done) == writes:
            raise _Killed
        done.append(append(*entry))

    with monkeypatch.context() as patch:
        patch.setattr(last._store.history, "append", some)
        patch.setattr("tasks.ledger._remove", lambda _: None)
        with contextlib.suppress(_Killed):
            last.conclude(DIGEST, earlier, whole=True)
    ledger().settle(DIGEST, whole=True)  # of the next run, which finds the record
    assert seconds(costs_of(last._store, [DIGEST]).values()) == [110]
    assert ledger().earlier() == []


def test_a_killed_stage_with_a_record_gets_its_cost_from_the_next_run(tmp_path, monkeypatch):
    config = configured(tmp_path)

    def killed(*_, **__):
        raise _Killed

    with monkeypatch.context() as patch:
        patch.setattr(Ledger, "conclude", killed)
        with pytest.raises(_Killed):
            run_stage(PREPARE_DATA, config, {})
    again = run_stage(PREPARE_DATA, config, {})
    assert again.cached
    assert costs_of(store_of(config), [again.ref.digest])[again.ref.digest].seconds > 0
    assert not (tmp_path / "work/attempts").exists()


def test_a_damaged_entry_is_left_out_with_one_warning(ledger, caplog, tmp_path):
    store = store_of(configured(tmp_path))
    for name in ("a", "b", "c"):
        run = run_of(name, stage_of("train-sft", Cost(seconds=5)))
        record_run(store, "default", run.model_dump(mode="json", exclude_none=True))
    damaged = tmp_path / "store/refs/costs/runs/default/000002.json"
    damaged.chmod(0o644)
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with caplog.at_level(logging.WARNING, "rlhf"):
        assert [run.run for run in read_line(store, "default")] == ["a", "c"]
    (warning,) = caplog.messages
    assert "costs/runs/default: 1 damaged entry is left out of the costs" in warning
    assert find_run(store, "c").run == "c"

    for took in (30, 40):
        with pytest.raises(OSError, match="disk"):
            attempt(ledger(), took, then=fail)
    damaged = tmp_path / f"store/refs/costs/attempts/train-policy/{KEY}/000001.json"
    damaged.chmod(0o644)
    damaged.write_bytes(b"{}")
    assert seconds(ledger().earlier()) == [40]


def test_a_stage_that_the_budget_kept_from_beginning_costs_its_run_nothing(tmp_path):
    config = configured(tmp_path)
    run = PipelineRun(config, {}, "r", "2026-11-29T10:00:00+00:00")
    store = store_of(config)
    key = work_of(PREPARE_DATA, config, {}, store).key
    before = Ledger(PREPARE_DATA, key, "prepare", config, store, tmp_path / "work")
    (tmp_path / "work").mkdir()
    with pytest.raises(OSError, match="disk"):
        attempt(before, 100, then=fail)
    assert cost_of_failed(run, PREPARE_DATA, BudgetSpent("spent")) is None
    assert seconds([cost_of_failed(run, PREPARE_DATA, OSError("disk"))]) == [100]


def test_a_training_that_the_budget_stopped_goes_on_in_the_sum(ledger):
    first = ledger()
    attempt(first, 100)
    first.conclude(DIGEST, [], whole=False)
    second = ledger()
    earlier = second.earlier()
    assert seconds(earlier) == [100]
    attempt(second, 10)
    assert seconds([second.conclude("ef" * 32, earlier, whole=True)]) == [110]


def test_damage_and_a_store_that_is_down_end_no_stage(ledger, monkeypatch, caplog, tmp_path):
    (tmp_path / "work/attempts").mkdir()
    for text in ("{", '{"cost": {"seconds": "x"}}', "[]"):
        (tmp_path / "work/attempts").mkdir(exist_ok=True)
        (tmp_path / "work/attempts/train-ab.json").write_text(text)
        assert ledger().earlier() == []
    down = ledger()

    def fail(*_):
        raise StoreError("no answer")

    monkeypatch.setattr(type(down._store.history), "append", fail)
    with caplog.at_level(logging.WARNING, "rlhf"):
        attempt(down, 5)
        assert round(down.conclude(DIGEST, [], whole=True).seconds) == 5
        record_run(down._store, "default", {"run": "a"})
    assert "what the stage cost is not in the ledger (no answer)" in caplog.text


def test_the_whole_cost_of_a_policy_leaves_out_models_of_other_runs(tmp_path):
    store = store_of(configured(tmp_path))
    (tmp_path / "f").mkdir()
    refs = {}
    for name, parents in {
        "old": {}, "data": {}, "sft": {"data": "data", "base": "old"},
        "policy": {"sft": "sft", "data": "data"},
        "verdict": {"policy": "policy", "champion": "old"},
    }.items():  # fmt: skip
        (tmp_path / "f" / "name").write_text(name)
        refs[name] = store.publish(
            tmp_path / "f", "policy", parents={r: refs[p] for r, p in parents.items()},
            producer=PRODUCER, metrics={},
        )  # fmt: skip
        store.history.append(ARTIFACTS + refs[name].digest, Cost(seconds=10).row())
    assert cost_of_making(store, refs["verdict"].digest).seconds == 40
    assert cost_of_making(store, "9" * 64) is None
    # Costs name no artifact, so that they keep none.
    entries = [e for n in store.history.names("costs/") for e in store.history.entries(n)]
    assert not any(ref.digest in json.dumps(entries) for ref in refs.values())


# --- budget ---------------------------------------------------------------------------------------


def test_ppo_gets_what_is_left_by_the_clock_and_all_its_attempts(ledger):
    made = ledger(budget={"hours": 1})
    spent = Spending(seconds=1000, reserve=100)
    assert deadline_of(made, spent, [], now=lambda: 50.0).at == 50 + 3600 - 1000 - 100
    earlier = [Cost(seconds=300), Cost(seconds=200)]
    deadline = deadline_of(made, spent, earlier, now=lambda: 50.0)
    assert deadline.at == pytest.approx(50 + 3600 - 1500 - 100)
    assert deadline.reason == "budget.hours = 1: 0.417 h are used before this try"
    assert deadline_of(ledger(), spent, []) is None
    assert deadline_of(ledger(EVALUATE_POLICY, budget={"hours": 1}), spent, []) is None


def test_money_is_counted_at_the_price_of_all_devices(ledger, tmp_path):
    prices = {"currency": "USD", "price_per_hour": {"cpu": 4.0}}
    made = ledger(
        budget={"money": 10}, costs=prices, ppo={"processes": 2, "nodes": 2},
        store=f"file://{tmp_path}/store",
    )  # fmt: skip
    assert (made.machine.devices, made.machine.processes, made.price_per_hour) == (2, 4, 8.0)
    # Half an hour of an earlier attempt, from before there was a price.
    spent, before = Spending(money=2, reserve=0), Cost(seconds=1800, devices=2)
    left = deadline_of(made, spent, [before], now=lambda: 0.0)
    assert left.at == pytest.approx((10 - 2 - 4) / 8 * 3600)
    with pytest.raises(ConfigError, match=r"no price for 'cpu', on which train-policy runs \(kn"):
        deadline_of(ledger(budget={"money": 1}, costs={"price_per_hour": {"H200": 1}}), spent, [])


def test_a_training_does_not_begin_when_nothing_is_left(tmp_path):
    config = configured(tmp_path, budget={"hours": 1})
    used = Spending(seconds=3600)
    with pytest.raises(BudgetSpent) as error:
        require_left(TRAIN_SFT, config, used)
    assert str(error.value) == (
        "budget.hours = 1: 1 h are used by this run, before train-sft, which was not begun; raise "
        "budget.hours, and run the same again: stages that are done take nothing of it"
    )
    require_left(TRAIN_SFT, config, Spending(seconds=3599))
    for stage in (PREPARE_DATA, TRAIN_POLICY, EVALUATE_POLICY):
        require_left(stage, config, used)
    based = configured(tmp_path, budget={"hours": 1}, base={"path": "/m"}, sft={"enabled": False})
    require_left(TRAIN_SFT, based, used)  # it trains nothing


def test_a_budget_of_money_needs_a_price(tmp_path, monkeypatch):
    config = configured(tmp_path, budget={"money": 10})
    with pytest.raises(ConfigError, match=r"budget.money = 10: needs a price; set costs.price_per"):
        check_budget(config)
    monkeypatch.setenv("RLHF_PRICE_PER_HOUR", "0.5")
    check_budget(config)
    monkeypatch.setenv("RLHF_PRICE_PER_HOUR", "half")
    with pytest.raises(ConfigError, match=r"RLHF_PRICE_PER_HOUR = 'half': .*mend this machine's"):
        check_budget(config)


def test_prices_and_budgets_are_in_no_fingerprint(tmp_path, monkeypatch):
    plain, priced = configured(tmp_path), configured(
        tmp_path, costs={"price_per_hour": 3}, budget={"hours": 2, "money": 9}
    )  # fmt: skip
    for stage in STAGES.values():
        assert fingerprint(stage, plain, {}) == fingerprint(stage, priced, {})
    # What a budget stopped is that budget's alone; of money, at that price.
    assert stopped_key(KEY, plain) is None
    other = configured(tmp_path, budget={"hours": 3, "money": 9})
    dearer = configured(tmp_path, costs={"price_per_hour": 4}, budget={"hours": 2, "money": 9})
    keys = [stopped_key(KEY, each) for each in (priced, dearer, other)]
    assert len({*keys}) == 3
    hours, at_a_price = (
        configured(tmp_path, costs=costs, budget={"hours": 2})
        for costs in ({}, {"price_per_hour": 4})
    )
    assert stopped_key(KEY, hours) == stopped_key(KEY, at_a_price)


def test_equal_runs_have_equal_artifacts_with_and_without_a_price(tmp_path):
    """A stage that really runs, twice."""
    plain = run_stage(PREPARE_DATA, configured(tmp_path / "a"), {})
    prices = {"currency": "USD", "price_per_hour": 36.0}
    priced = run_stage(PREPARE_DATA, configured(tmp_path / "b", costs=prices), {})
    assert priced.ref.digest == plain.ref.digest
    assert plain.cost.money is None
    assert priced.cost.money == pytest.approx(priced.cost.seconds / 100)
    assert priced.cost.currency == "USD"
    # A new price runs nothing again, and what it cost stays what it cost.
    dearer = configured(tmp_path / "b", costs={"price_per_hour": 99.0})
    again = run_stage(PREPARE_DATA, dearer, {})
    assert (again.cached, again.cost) == (True, None)
    assert costs_of(store_of(dearer), [again.ref.digest]) == {again.ref.digest: priced.cost}
    assert attempts_of(store_of(dearer), PREPARE_DATA.name, KEY) == []


# --- runs of a line, and what is expected of the next ---------------------------------------------


def run_of(name, *stages, **facts):
    return RunCosts(run=name, started=f"2026-11-{len(name):02d}", stages=[*stages], **facts)


def stage_of(name, cost=None, **facts):
    return StageCosts(name=name, state="Completed" if cost else "Cached", cost=cost, **facts)


def test_a_run_that_went_on_is_one_and_work_that_went_on_counts_once(tmp_path):
    store = store_of(configured(tmp_path))
    sft, half = Cost(seconds=50, work="s"), Cost(seconds=100, work="p")
    runs = [
        run_of("week", stage_of("train-sft", sft)),
        run_of("week", stage_of("train-sft", made=sft), stage_of("train-policy", half),
               outcome="Promoted", stopped="PPO was stopped"),
        run_of("week-on", stage_of("train-sft", made=sft),
               stage_of("train-policy", Cost(seconds=300, work="p"))),
        run_of("other", stage_of("train-policy", Cost(seconds=7))),
    ]  # fmt: skip
    for run in runs:
        record_run(store, "default", run.model_dump(mode="json", exclude_none=True))
    store.history.append("costs/runs/default", {"run": 5})
    read = read_line(store, "default")
    assert [run.run for run in read] == ["week", "week-on", "other"]
    assert [run.total.seconds for run in read] == [150, 300, 7]
    assert read[1].total_made.seconds == 350
    assert line_total(read).seconds == 50 + 300 + 7  # not also the first 100 of PPO
    assert find_run(store, "").run == "week-on"  # the newest
    assert find_run(store, "week").outcome == "Promoted"
    with pytest.raises(ConfigError, match="2 runs are meant"):
        find_run(store, "wee")
    with pytest.raises(StoreError, match="is called that; the newest are: week, other, week-on"):
        find_run(store, "x")


def test_what_a_stage_takes_is_known_from_the_same_settings_alone(tmp_path, monkeypatch):
    monkeypatch.setattr("socket.gethostname", lambda: "here")
    config = configured(tmp_path, ppo={"total_episodes": 1024})
    store = store_of(config)
    of_stages = kinds(config, store)
    assert all(len(kind["settings"]) == 32 for kind in of_stages.values())
    before = Cost(seconds=100, steps=8, device="cpu", host="here", money=99.0, currency="EUR")
    past = [stage_of("train-policy", before, **of_stages["train-policy"])]

    def expected(stage=TRAIN_POLICY, past=past, **changes):
        other = configured(tmp_path, **{"ppo": {"total_episodes": 1024}, **changes})
        return forecast_of(stage, other, kinds(other, store)[stage.name], past)

    same = expected()
    assert (same.seconds, same.source, same.money) == (100, "as last time on this machine", None)
    # At the present price.
    assert expected(costs={"price_per_hour": 36}).money == pytest.approx(1.0)
    longer = expected(ppo={"total_episodes": 3072})
    assert (longer.seconds, longer.source) == (300, "from 8 measured steps on this machine")
    for unknown in (
        expected(ppo={"total_episodes": 1024, "kl_coef": 0.3}),
        expected(base={"architecture": {"layers": 9}}), expected(EVALUATE_POLICY),
        expected(past=[]),
        expected(past=[past[0].model_copy(update={"state": StageState.FAILED.value})]),
        expected(past=[past[0].model_copy(update={"cost": None})]),
    ):  # fmt: skip
        assert unknown is None
    monkeypatch.setattr("socket.gethostname", lambda: "elsewhere")
    assert expected() is None  # another CPU
    gpu = before.model_copy(update={"device": "NVIDIA H200"})
    monkeypatch.setattr("tasks.forecast.device_name", lambda _: "NVIDIA H200")
    moved = expected(past=[past[0].model_copy(update={"cost": gpu})])
    assert moved.source == "as last time on another machine's NVIDIA H200"
    assert reserve({"train-policy": same}, [TRAIN_POLICY]) == 100
    assert reserve({"train-policy": same}, [TRAIN_POLICY, EVALUATE_POLICY]) is None
    assert forecast_total([same, longer]).seconds == 400
    assert forecast_total([same, None]) is None


def test_a_run_in_a_sentence():
    from rlhf.costs import Forecast
    from rlhf.report.model import StageRow

    cost = Cost(seconds=90, memory=10**9, energy=36000.0, money=0.5, price=20.0, currency="EUR")
    rows = [
        StageRow(name="a", state=StageState.COMPLETED, cost=cost, forecast=Forecast(seconds=80)),
        StageRow(name="b", state=StageState.CACHED, seconds=0.1, made=Cost(seconds=600)),
    ]
    assert cost_lines(rows, "1 h", "PPO was stopped by the budget after 1 of 4 updates") == [
        "1 min 30 s, peak 1.0 GB, 10 Wh, 0.50 EUR; expected: 1 min 20 s",
        "cached stages, when they were made: 10 min 00 s",
        "PPO was stopped by the budget after 1 of 4 updates; the budget is 1 h: with more the same "
        "command goes on",
    ]
    assert cost_lines([], "", "") == ["nothing ran"]
