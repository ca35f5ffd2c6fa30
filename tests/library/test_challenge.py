"""Comparison with the champion: its checks, its looks, and which champion it is."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from rlhf import champions
from rlhf.challenge import NEW_PROMPTS, with_comparison
from rlhf.config import ChampionGateConfig, GateRule, PipelineConfig
from rlhf.data.gate_prompts import PromptSet
from rlhf.data.rows import PROMPTS_GATE, PromptRow
from rlhf.errors import ArtifactMissing, ConfigError, DataError, GateRejected, NotBetter
from rlhf.gates import Verdict, judge, require
from rlhf.store import ArtifactRef, Producer, Store
from rlhf.store.history import Histories
from tasks.challenge import find_challenge, optional_inputs
from tasks.gate_check import _check_rotation
from tasks.looks import looks_taken, take_look
from tasks.stage import store_of

C, P = "c" * 64, "p" * 64
SETTINGS = ChampionGateConfig()


def rates(name: str, rate: float, prompts: int) -> dict[str, Any]:
    """A win rate of independent prompts."""
    return {name: rate, f"{name}_size": float(prompts), "n": prompts}


def evaluation(rate: float, prompts: int = 300, **more: Any) -> dict[str, Any]:
    part = {"policy": C, **rates("win_rate", rate, prompts), **more}
    return {"sampled": {"kl": 3.0}, "prompts_sha256": "f" * 64, "champion": part}


def compared(found: dict[str, Any], look: int = 1, kl: float = 20.0, **settings: Any) -> Verdict:
    verdict = judge("gate-policy", P, found, [GateRule(metric="sampled.kl", max=kl)])
    return with_comparison(verdict, found, ChampionGateConfig(**settings), look)


# --- the checks -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "looks", "approved"),
    [
        # At even chances of n = 300 Wilson's lower end is at least 0.5 where (p − ½)/√(¼/n) ≥ t:
        # one look at 95 % has t = 1.650, so p ≥ ½ + 1.650 · 0.028868 = 0.5476;
        # one of ten at 99.5 % has t = 2.592, so p ≥ 0.5748.
        (0.548, 1, True),
        (0.547, 1, False),
        (0.548, 10, False),
        (0.575, 10, True),
        (0.574, 10, False),
        (0.3, 10, False),
    ],
)
def test_superiority(rate, looks, approved):
    verdict = compared(evaluation(rate), looks=looks)
    assert verdict.approved is approved
    assert (verdict.champion, verdict.prompts) == (C, "f" * 64)
    assert (verdict.look, verdict.looks) == (1, looks)
    if not approved:
        with pytest.raises(NotBetter, match=r"^keep the champion: champion\.win_rate = 0\.\d+ \["):
            require("policy", P, verdict)


def test_a_rule_that_fails_is_a_rejection_and_no_mere_lack_of_superiority():
    for rate in (0.4, 0.7):
        verdict = compared(evaluation(rate), kl=1.0)
        assert not verdict.keeps_champion
        with pytest.raises(GateRejected) as caught:
            require("policy", P, verdict)
        assert not isinstance(caught.value, NotBetter)
        assert "sampled.kl = 3, needs ≤ 1" in str(caught.value)


def test_the_judge_decides_where_it_is_usable():
    both = evaluation(0.8, **rates("judge_win_rate", 0.5, 300))
    assert compared(both).approved
    both["judge"] = {"usable": False}
    assert compared(both).approved
    both["judge"] = {"usable": True}
    verdict = compared(both)
    assert not verdict.approved
    assert verdict.checks[1].metric == "champion.judge_win_rate"
    # A usable judge whose win rate is missing does not hand the decision to the reward model.
    gone = evaluation(0.8)
    gone["judge"] = {"usable": True}
    assert not compared(gone).approved


@pytest.mark.parametrize("broken", [None, float("nan"), float("inf"), "0.9", True])
def test_a_win_rate_that_is_no_number_is_not_better(broken):
    for name in ("win_rate", "win_rate_size", "n"):
        found = evaluation(0.8)
        found["champion"][name] = broken
        assert not compared(found).approved


def test_non_inferiority_in_slices():
    # 40 prompts at 95 %, t of 39 is 1.685: of 0.55 the lower end is
    # (0.55 + 0.03549 − 1.685 √(0.0061875 + 0.000444)) / 1.07098 = 0.4186;
    # of 0.5 it is 0.3713.
    slices = {"a": rates("win_rate", 0.55, 40), "small": rates("win_rate", 0.1, 29)}
    verdict = compared(evaluation(0.7, by_group=slices))
    assert verdict.approved
    assert [c.metric for c in verdict.checks] == [
        "sampled.kl", "champion.win_rate", "champion.by_group.a.win_rate",
        "champion.by_group.small.win_rate", "look",
    ]  # fmt: skip
    assert verdict.checks[3].note == "not judged: 29 prompts, and slice_n = 30"
    assert {c.kind for c in verdict.checks[1:]} == {"champion"}
    slices["b"] = rates("win_rate", 0.5, 40)
    worse = compared(evaluation(0.7, by_group=slices))
    assert worse.keeps_champion
    assert worse.reason.startswith("champion.by_group.b.win_rate = 0.5 [0.371, ")
    assert compared(evaluation(0.7, by_group=slices), margin=0.13).approved


def test_looks_end():
    assert compared(evaluation(0.8), look=10).approved
    verdict = compared(evaluation(0.8), look=11)
    assert verdict.keeps_champion
    assert verdict.reason == (
        "look = 11, needs ≤ 10 (these gate prompts have been used for as many comparisons as "
        f"planned; {NEW_PROMPTS})"
    )


def test_without_a_champion_nothing_is_compared():
    found = evaluation(0.1)
    del found["champion"]
    verdict = compared(found)
    assert verdict.approved
    assert (verdict.champion, verdict.look, len(verdict.checks)) == (None, None, 1)


@pytest.mark.parametrize("key", ["policy", "prompts_sha256"])
def test_half_a_comparison_is_an_error(key):
    found = evaluation(0.8)
    (found if key in found else found["champion"]).pop(key)
    with pytest.raises(DataError, match="names no champion or no gate prompts"):
        compared(found)


# --- which champion, which prompts, which look ------------------------------------------------


class Line:
    """A model line in a store of its own."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def config(self, **changes: Any) -> PipelineConfig:
        runtime = {"work_dir": str(self.folder / "work")}
        tree = {"store": str(self.folder / "store"), "promotion": {"name": "ours"}}
        return PipelineConfig.model_validate({**tree, "runtime": runtime, **changes})

    @property
    def store(self) -> Store:
        return store_of(self.config())

    def put(self, kind: str, text: str, name: str = "x", **parents: Any) -> ArtifactRef:
        folder = self.folder / "new"
        folder.mkdir(exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        (folder / name).write_text(text)
        settings = parents.pop("settings", {})
        producer = Producer(stage="x", code_version="1", config=settings, seed=0, versions={})
        return self.store.publish(folder, kind, parents=parents, producer=producer, metrics={})

    def promote(self, policy: ArtifactRef, verdict: ArtifactRef | None = None) -> None:
        before = champions.champion(self.store, "ours")
        champions.promote(
            self.store, "ours", policy.digest, verdict=verdict.digest if verdict else None,
            expected=before, why="x", by="ann",
        )  # fmt: skip

    def with_evaluation(self, text: str, rotation: int = 0, name: str = PROMPTS_GATE):
        policy = self.put("policy", text)
        found = self.put("evaluation", text, name, policy=policy, settings={"rotation": rotation})
        self.promote(policy, self.put("verdict", text, policy=policy, evaluation=found))
        return policy, found


@pytest.fixture
def line(tmp_path) -> Line:
    return Line(tmp_path)


def test_a_policy_meets_the_champion_and_the_champion_the_one_before(line):
    assert find_challenge(line.config(), line.store) is None
    first, second = line.put("policy", "1"), line.put("policy", "2")
    line.promote(first)
    for policy in (None, second.digest):
        assert find_challenge(line.config(), line.store, policy).champion.digest == first.digest
    # The champion itself, of a run that is repeated.
    assert find_challenge(line.config(), line.store, first.digest) is None
    line.promote(second)
    assert find_challenge(line.config(), line.store, second.digest).champion.digest == first.digest
    assert find_challenge(line.config(), line.store, first.digest).champion.digest == second.digest
    champions.rollback(line.store, "ours", why="leaks", by="ann")
    assert find_challenge(line.config(), line.store, second.digest).champion.digest == first.digest
    assert find_challenge(line.config(), line.store, first.digest) is None
    refs = {"policy": second}
    assert optional_inputs(line.config(), refs, line.store) == {"champion": first}
    without = line.config(gates={"champion": None})
    assert optional_inputs(without, refs, line.store) == {}


def test_a_champion_that_is_gone_stops_the_run(line):
    first, second = line.put("policy", "1"), line.put("policy", "2")
    line.promote(first)
    line.store.delete(first)
    cure = "set gates.champion to none"
    with pytest.raises(ArtifactMissing, match=f"{first.short} of ours is not there, .*{cure}"):
        find_challenge(line.config(), line.store)
    assert find_challenge(line.config(gates={"champion": None}), line.store) is None
    # The one before the champion decides nothing any more.
    line.promote(second)
    assert find_challenge(line.config(), line.store, second.digest) is None


def test_gate_prompts_stay_until_they_are_rotated(line):
    policy, found = line.with_evaluation("1")
    challenge = find_challenge(line.config(), line.store)
    assert (challenge.champion, challenge.evaluation) == (policy, found)
    assert optional_inputs(line.config(), {"policy": found}, line.store) == {
        "champion": policy, "champion-evaluation": found,
    }  # fmt: skip
    rotated = line.config(data={"rotation": 1})
    assert find_challenge(rotated, line.store).evaluation is None
    line.with_evaluation("2", rotation=1)
    assert find_challenge(rotated, line.store).evaluation is not None
    assert find_challenge(line.config(), line.store).evaluation is None
    # An evaluation of an earlier version has no gate prompts.
    line.with_evaluation("3", name="evaluation.json")
    assert find_challenge(line.config(), line.store).evaluation is None


def prompts(*numbers: int) -> PromptSet:
    return PromptSet.of([PromptRow(f"question {i}?") for i in numbers])


def look(store, line, on, policy, result="", level=0.005):
    """The number of a look."""
    return take_look(store, line, on, policy, result, level=level).count + 1


def taken(store, line, on):
    return looks_taken(store, line, on, level=0.005).count


def test_a_policy_looks_once(line):
    store, first = line.store, prompts(*range(20))
    assert taken(store, "ours", first) == 0
    looks = [look(store, "ours", first, p) for p in ("a", "b", "a", "c", "b")]
    assert looks == [1, 2, 1, 3, 2]
    assert taken(store, "ours", first) == 3
    # Other prompts, another line.
    assert look(store, "ours", prompts(*range(20, 40)), "c") == 1
    assert look(store, "theirs", first, "c") == 1
    # Other replies of the same policy are another chance; an equal repetition is none.
    other = prompts(*range(40, 60))
    assert [look(store, "ours", other, "a", r) for r in ("x", "y", "x")] == [1, 2, 1]


def test_looks_at_nearly_the_same_prompts_count(line):
    """A row that is forgotten, or data that grow, change the digest of the prompts."""
    store = line.store
    assert [look(store, "ours", prompts(*range(20)), p) for p in "ab"] == [1, 2]
    assert look(store, "ours", prompts(*range(1, 20)), "c") == 3
    # Of these 38 the first two saw 20, and the third 19, which is half of them.
    assert look(store, "ours", prompts(*range(38)), "d") == 4
    # Of these 20 the last one saw 10, or 9; of those 30 it saw 27, and the others 9.
    assert taken(store, "ours", prompts(*range(28, 48))) == 1
    assert taken(store, "ours", prompts(*range(29, 49))) == 0
    assert taken(store, "ours", prompts(*range(11, 41))) == 1
    # Of earlier versions' histories only the digest is known.
    store.history.append(f"looks/ours/{prompts(7).digest}", {"policy": "old", "result": "x"})
    assert look(store, "ours", prompts(7), "old", "x") == 1
    assert look(store, "ours", prompts(7), "new") == 6


def test_a_look_whose_entry_is_gone_still_counts(line):
    """What to do with a damaged entry is to delete it."""
    store = line.store
    for policy in "abc":
        look(store, "ours", prompts(1, 2), policy)
    (line.folder / "store/refs/looks/ours/000002.json").unlink()
    assert taken(store, "ours", prompts(1, 2)) == 3
    assert taken(store, "ours", prompts(3)) == 1
    assert look(store, "ours", prompts(1, 2), "c") == 3


def test_of_two_looks_at_once_each_has_a_number(line, monkeypatch):
    store, rival = line.store, line.store
    advance = Histories.advance

    def meanwhile(history, name, *args):
        monkeypatch.setattr(Histories, "advance", advance)
        assert look(rival, "ours", prompts(1), "b") == 1
        return history.advance(name, *args)

    monkeypatch.setattr(Histories, "advance", meanwhile)
    assert look(store, "ours", prompts(1), "a") == 2
    assert taken(store, "ours", prompts(1)) == 2


def test_a_look_spends_the_level_at_which_it_was_judged(line):
    store, on = line.store, prompts(1, 2)
    assert take_look(store, "ours", on, "a", level=0.05).spent == 0
    assert take_look(store, "ours", on, "b", level=0.005).spent == 0.05
    # The same figures at another level: the larger counts, and the number stays.
    again = take_look(store, "ours", on, "b", level=0.01)
    assert (again.count, again.spent) == (1, 0.05)
    assert take_look(store, "ours", on, "b", level=0.005) == again
    found = looks_taken(store, "ours", on, level=1.0)
    assert (found.count, found.spent) == (2, pytest.approx(0.06))
    # Of five prompts these two are less than half, so that there the same figures are a look too.
    assert take_look(store, "ours", prompts(1, 2, 3, 4, 5), "b", level=0.005).count == 0
    assert looks_taken(store, "ours", on, level=1.0) == found
    # An entry of an earlier version tells no level: it is taken for one of these settings.
    store.history.append(f"looks/ours/{on.digest}", {"policy": "old", "result": ""})
    assert looks_taken(store, "ours", on, level=1.0).spent == pytest.approx(1.06)
    # 6 % are more than 5 %, so that there is no look at any level.
    verdict = compared_at(0.06, looks=100)
    assert verdict.reason == (
        "look = 3, needs ≤ 100 (the comparisons before it, at other settings of gates.champion, "
        f"have spent 6.00% of the chance of error of 5.00%; {NEW_PROMPTS})"
    )
    # Of 5 %, 4.9 % leave room for one of a hundred, and 4.96 % do not.
    assert compared_at(0.0495, looks=100).approved
    assert not compared_at(0.0496, looks=100).approved


def compared_at(spent: float, **settings: Any) -> Verdict:
    found = evaluation(0.8)
    verdict = judge("gate-policy", P, found, [GateRule(metric="sampled.kl", max=20.0)])
    return with_comparison(verdict, found, ChampionGateConfig(**settings), 3, spent)


def test_what_another_rotation_trained_on_is_no_start(line):
    """Raising data.rotation holds out what a warm start has learnt."""
    data = line.put("dataset", "rows", settings={"data": {"rotation": 0}})
    older = line.put("dataset", "old rows", settings={"data": {}})  # before there were rotations
    for dataset in (data, older):
        policy = line.put("policy", "p", sft=line.put("policy", "s", data=dataset))
        start = {"base": {"path": f"artifact:{policy.digest}"}}
        _check_rotation(line.config(data={"source": "x.jsonl"}, **start), line.store)
        rotated = line.config(data={"source": "x.jsonl", "rotation": 1}, **start)
        with pytest.raises(ConfigError, match=r"base\.path = .* was trained on data of rotation 0"):
            _check_rotation(rotated, line.store)
    # What was removed since can't be asked; the world's held-out prompts depend on its seed.
    line.store.delete(older)
    _check_rotation(rotated, line.store)


def test_a_look_judged_again_at_a_larger_level_comes_after_those_in_between(line):
    """Fewer planned looks would otherwise judge an early policy anew for nothing."""
    store, on = line.store, prompts(1, 2, 3)
    for policy in "pqrs":
        take_look(store, "ours", on, policy, level=0.0125)
    again = take_look(store, "ours", on, "p", level=0.05)
    assert again.count == 3
    assert again.spent == pytest.approx(3 * 0.0125)
    # At the level of before it is what it was.
    assert take_look(store, "ours", on, "p", level=0.0125).count == 0
    assert looks_taken(store, "ours", on, level=0.0125).spent == pytest.approx(0.05 + 3 * 0.0125)
