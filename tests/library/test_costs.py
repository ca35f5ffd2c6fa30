"""Costs: sums, prices, what is left of a budget, and the meter on this process."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from rlhf import meter as meter_module
from rlhf.budget import (
    PLANNED,
    RESERVE,
    STOPPED_AT,
    Deadline,
    Spending,
    budget_text,
    exhausted,
    is_stopped,
    stop_line,
    time_left,
)
from rlhf.config.costs import BudgetConfig, CostsConfig
from rlhf.costs import Cost, device_text, energy_text, memory_text, money_text, read_cost, total
from rlhf.meter import Meter, device_name

MB = 2**20


# --- sums -----------------------------------------------------------------------------------------


def test_attempts_add_up_and_peaks_do_not():
    killed = Cost(seconds=60, steps=3, memory=500, energy=10.0, price=2.0, money=1.0, currency="X")
    last = Cost(seconds=30, steps=9, memory=400, reserved=7, price=2.0, money=0.5, currency="X")
    whole = total([killed, last])
    assert whole == Cost(
        seconds=90, steps=9, memory=500, reserved=7, energy=10.0, price=2.0, money=1.5,
        currency="X", attempts=2,
    )  # fmt: skip
    assert total([]) is None


def test_money_is_that_of_all_parts_or_not_known():
    """A sum of the priced parts would look like a bargain; one over currencies means nothing."""
    priced = Cost(seconds=3600, price=2.0, money=2.0, currency="EUR")
    assert total([priced, Cost(seconds=1)]).money is None
    assert total([priced, priced.model_copy(update={"currency": "USD"})]).money is None
    dearer = priced.model_copy(update={"price": 3.0, "money": 3.0})
    assert (total([priced, dearer]).money, total([priced, dearer]).price) == (5.0, None)


def test_a_price_is_of_every_device():
    cost = Cost(seconds=1800, device="NVIDIA H200", devices=8).priced(3.0, "EUR")
    assert (cost.money, cost.price, cost.currency) == (12.0, 3.0, "EUR")
    assert Cost(seconds=1800).priced(None, "EUR").money is None


def test_a_record_has_what_is_known_and_no_zeros_for_the_rest():
    row = Cost(seconds=1.5, memory=7).row()
    assert row == {
        "seconds": 1.5, "attempts": 1, "steps": 0, "devices": 1, "processes": 1, "nodes": 1,
        "memory": 7,
    }  # fmt: skip
    assert read_cost({**row, "of a later version": 1}) == Cost(seconds=1.5, memory=7)
    assert read_cost({"seconds": "long"}) is None
    assert read_cost(None) is None


@pytest.mark.parametrize(
    ("shown", "text"),
    [
        (money_text(12.345, "EUR"), "12.35 EUR"), (money_text(0.00123, "EUR"), "0.0012 EUR"),
        (money_text(None, "EUR"), ""), (energy_text(3600 * 12.4), "12 Wh"),
        (energy_text(3600 * 3400), "3.4 kWh"), (energy_text(900), "0.25 Wh"),
        (energy_text(None), ""), (memory_text(1_240_000_000), "1.2 GB"),
        (memory_text(85_000_000), "85 MB"), (memory_text(None), ""),
        (device_text(Cost(device="NVIDIA H200", devices=4, processes=4)), "4 × NVIDIA H200"),
        (device_text(Cost(device="cpu", devices=2, processes=4, nodes=2)),
         "cpu, 4 processes, 2 machines"),
    ],
)  # fmt: skip
def test_texts(shown, text):
    assert shown == text


# --- budget ---------------------------------------------------------------------------------------


def test_a_price_is_found_by_the_first_name_that_has_one():
    costs = CostsConfig.model_validate({"price_per_hour": {"GPU": 3.0, "cpu": 0.2}})
    assert costs.price(["gpu", "cpu"]) == 3.0
    assert costs.price(["Apple M4", "cpu"]) == 0.2
    assert costs.price(["mps"]) is None
    assert CostsConfig.model_validate({"price_per_hour": 1.5}).price(["mps"]) == 1.5


@pytest.mark.parametrize(
    ("budget", "spent", "per_hour", "seconds", "field"),
    [
        ({"hours": 2}, {"seconds": 3600, "reserve": 600}, None, 3000, "budget.hours"),
        ({"hours": 2}, {"seconds": 3600}, None, 3600 - RESERVE * 7200, "budget.hours"),
        ({"money": 10}, {"money": 4, "reserve": 600}, 12.0, 1800 - 600, "budget.money"),
        ({"hours": 9, "money": 10}, {"money": 9, "reserve": 0}, 2.0, 1800, "budget.money"),
        ({"hours": 1, "money": 99}, {"seconds": 1800, "reserve": 0}, 2.0, 1800, "budget.hours"),
        # Nothing is left: a moment before now.
        ({"hours": 1}, {"seconds": 7200, "reserve": 0}, None, -3600, "budget.hours"),
    ],
)
def test_what_is_left_is_that_of_the_tighter_limit(budget, spent, per_hour, seconds, field):
    section = BudgetConfig.model_validate(budget)
    left, limit = time_left(section, Spending(**spent), "EUR", per_hour)
    assert left == pytest.approx(seconds)
    assert limit.field == field


def test_without_a_budget_nothing_is_used_up():
    spent = Spending(seconds=1e9, money=1e9)
    assert time_left(BudgetConfig(), spent, "EUR", 1.0) is None
    assert exhausted(BudgetConfig(), spent, "EUR") is None
    assert exhausted(BudgetConfig(hours=1), Spending(seconds=3599), "EUR") is None
    limit = exhausted(BudgetConfig(hours=1, money=5), Spending(seconds=60, money=5.5), "EUR")
    assert str(limit) == "budget.money = 5: 5.5 EUR are used"
    assert budget_text(BudgetConfig(hours=1.5, money=5), "EUR") == "1.5 h, 5 EUR"
    assert Spending(seconds=1).plus(2, None).plus(3, 4.0) == Spending(seconds=6, money=4.0)


def test_a_deadline_passes_before_a_step_that_would_not_fit():
    deadline = Deadline(at=100.0, reason="")
    assert not deadline.passes(90.0, 10.0)
    assert deadline.passes(90.0, 10.1)


def test_a_stopped_training_says_so():
    metrics = {STOPPED_AT: 120, PLANNED: 4000, "chosen_update": 100}
    assert is_stopped(metrics)
    assert not is_stopped({"stopped": 1, "updates": 4000})
    assert stop_line({"updates": 3}) == ""
    assert stop_line(metrics) == (
        "PPO was stopped by the budget after 120 of 4,000 updates; the policy of update 100 goes on"
    )


# --- meter ----------------------------------------------------------------------------------------


def test_the_memory_of_this_process_and_its_children_is_measured():
    hold = "import sys; data = bytearray(range(256)) * (300 * 4096); print(); sys.stdin.read()"
    with Meter(every=0.02) as meter:
        before = meter.cost().memory
        with subprocess.Popen(
            [sys.executable, "-c", hold], stdin=subprocess.PIPE, stdout=subprocess.PIPE
        ) as child:
            child.stdout.readline()  # its memory is in use now
            for _ in range(3000):  # until the next sample, however busy the machine is
                if meter.cost().memory > before + 250 * MB:
                    break
                time.sleep(0.02)
            child.stdin.close()
        assert meter.cost().memory > before + 250 * MB
        assert Meter.current is meter
    assert Meter.current is None
    cost = meter.cost()
    time.sleep(0.02)
    assert meter.cost().seconds == cost.seconds > 0  # it has ended
    assert cost.reserved is None  # no GPU


def test_peaks_of_child_processes_are_taken_in():
    with Meter() as meter:
        meter.note({"reserved": 5, "allocated": 4})
        meter.note({"reserved": 3, "memory": 10**15})
    assert (meter.cost().reserved, meter.cost().allocated) == (5, 4)
    assert meter.cost().memory == 10**15


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A counter of a CPU's package, as Linux shows it, with a part that must not count twice."""
    monkeypatch.setattr(meter_module, "POWERCAP", tmp_path)
    for name in ("intel-rapl:0", "intel-rapl:0:0", "dtpm"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "energy_uj").write_text("90000000\n")
        (tmp_path / name / "max_energy_range_uj").write_text("100000000\n")
    return tmp_path / "intel-rapl:0" / "energy_uj"


def test_energy_is_that_of_the_package_also_when_its_counter_begins_anew(package):
    with Meter() as meter:
        package.write_text("95000000")
        meter._sample()
        assert meter.cost().energy == pytest.approx(5.0)
        package.write_text("3000000")  # 5 up to its end at 100, and 3
    assert meter.cost().energy == pytest.approx(13.0)


def test_energy_that_may_not_be_read_is_not_known(package):
    package.unlink()
    with Meter() as meter:
        pass
    assert meter.cost().energy is None
    package.write_text("no number")
    with Meter(gpus=1) as meter:  # nor has this machine NVIDIA's library
        pass
    assert meter.cost().energy is None


def test_a_device_has_the_name_that_its_driver_gives(tmp_path, monkeypatch):
    monkeypatch.delitem(sys.modules, "torch", raising=False)
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setattr(meter_module, "NVIDIA", tmp_path / "gpus")
    assert device_name("auto") == "cpu"
    (tmp_path / "gpus" / "0000:01:00.0").mkdir(parents=True)
    information = tmp_path / "gpus" / "0000:01:00.0" / "information"
    information.write_text("Model: \t\t NVIDIA H200\nIRQ:   \t\t 1\n")
    assert device_name("auto") == device_name("cuda") == "NVIDIA H200"
    assert device_name("cpu") == "cpu"
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    assert device_name("auto") == "cpu"
