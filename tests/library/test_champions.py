"""Champions of model lines: promotion, lost races, rollback, and their histories."""

from __future__ import annotations

import json
import multiprocessing
import threading
from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path

import pytest

from rlhf import champions
from rlhf.champions import (
    Promotion,
    approval_of,
    champion,
    history,
    promote,
    record_approval,
    rollback,
)
from rlhf.errors import (
    ArtifactCorrupt,
    ArtifactMissing,
    ConfigError,
    PolicyWithdrawn,
    PromotionLost,
    is_retriable,
)
from rlhf.store import Producer, Store, open_store

A, B, C, D = ("a" * 64, "b" * 64, "c" * 64, "d" * 64)


VERDICT = "e" * 64


PRODUCER = Producer(stage="x", code_version="1", config={}, seed=0, versions={})


@pytest.fixture
def store(place) -> Store:
    return place.open()


@pytest.fixture
def local(tmp_path) -> Store:
    return open_store(str(tmp_path / "store"), cache_dir=tmp_path / "cache")


def policy(store: Store, folder: Path, text: str) -> str:
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(text)
    return store.publish(folder, "policy", parents={}, producer=PRODUCER, metrics={}).digest


def put(store: Store, digest: str, by: str = "ann", why: str = "", **more) -> Promotion:
    before = champion(store, "ours")
    return promote(store, "ours", digest, verdict=VERDICT, expected=before, why=why, by=by, **more)


def test_an_entry_says_who_when_why_and_what_was_before(local, monkeypatch):
    assert champion(local, "ours") is None
    assert history(local, "ours") == []
    first = put(local, A, why="it met every gate", run="tiny-1")
    assert champion(local, "ours") == first
    monkeypatch.setenv("RLHF_USER", "bob")
    second = promote(
        local, "ours", B, verdict=None, expected=first, why=" two\n lines\x1b[31m ", unapproved=True
    )
    assert history(local, "ours") == [first, second]
    saved = local.history.latest("champion/ours")
    when = saved.pop("when")
    assert saved == {
        "model": "ours", "policy": B, "verdict": None, "action": "promote", "by": "bob",
        "why": "two lines [31m", "run": None, "previous": A, "unapproved": True, "approval": None,
    }  # fmt: skip
    assert (when[10], when[-6:], len(when)) == ("T", "+00:00", 25)
    assert (first.number, first.previous, first.by, first.run) == (1, None, "ann", "tiny-1")
    assert champion(local, "theirs") is None
    with pytest.raises(ConfigError, match="--why is empty"):
        promote(local, "ours", C, verdict=None, expected=second, why=" \n", unapproved=True)
    with pytest.raises(ConfigError, match="--why: 2001 characters; write at most 2000"):
        promote(local, "ours", C, verdict=None, expected=second, why="x" * 2001)
    assert len(history(local, "ours")) == 2


def test_entries_of_before_there_were_rollbacks(local):
    for digest in (A, B):
        entry = {"model": "ours", "policy": digest, "verdict": VERDICT}
        local.history.append("champion/ours", entry)
    first, second = history(local, "ours")
    assert (first.policy, first.action, first.by, first.number) == (A, "promote", None, 1)
    assert put(local, C).previous == second.policy
    with pytest.raises(PromotionLost, match=f"{B[:12]} became champion; look"):
        promote(local, "ours", D, verdict=VERDICT, expected=first, why="")


@pytest.mark.parametrize(
    ("entry", "problem"),
    [({"number": 1}, "policy: "), ({"policy": "x"}, "policy: "),
     ({"policy": A, "action": "sell"}, "action: ")],
)  # fmt: skip
def test_what_is_no_promotion(local, entry, problem):
    local.history.append("champion/ours", entry)
    with pytest.raises(ArtifactCorrupt, match=f"refs/champion/ours: .*{problem}"):
        champion(local, "ours")


def test_of_promotions_at_once_one_wins_and_the_others_are_told_by_whom(place, store):
    stores = [place.open() for _ in range(6)]
    for round_ in range(2):
        before = champion(store, "ours")
        line = threading.Barrier(6)

        def one(writer: int, before=before, line=line, round_=round_) -> Promotion | PromotionLost:
            line.wait()
            digest = f"{10 * round_ + writer:064}"
            try:
                return promote(
                    stores[writer], "ours", digest, verdict=VERDICT, expected=before,
                    why=f"reason {writer}", by=f"writer {writer}",
                )  # fmt: skip
            except PromotionLost as error:
                return error

        with ThreadPoolExecutor(6) as pool:
            told = list(pool.map(one, range(6)))
        (won,) = (each for each in told if isinstance(each, Promotion))
        assert champion(store, "ours") == won
        assert won.number == round_ + 1
        for lost in (each for each in told if each is not won):
            assert (
                f"{won.policy[:12]} became champion by {won.by} at {won.when} ({won.why})"
                in str(lost)
            )
            assert "`rlhf promote 0000" in str(lost)
            assert not is_retriable(lost)


def _in_a_process(folder: str, writer: int) -> int:
    store = open_store(folder, cache_dir=Path(folder, "cache"))
    won = 0
    while (before := champion(store, "ours")) is None or before.number < 12:
        try:
            promote(store, "ours", f"{writer:064}", verdict=None, expected=before, why="")
            won += 1
        except PromotionLost:
            pass
    return won


def test_promotions_of_several_processes(local, tmp_path):
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(3, mp_context=context) as pool:
        won = list(pool.map(_in_a_process, [str(tmp_path / "store")] * 3, range(3)))
    entries = history(local, "ours")
    # Nobody wrote over anybody, and each saw whom it followed.
    assert [entry.number for entry in entries] == list(range(1, 13))
    assert [sum(int(e.policy) == writer for e in entries) for writer in range(3)] == won
    assert [e.previous for e in entries[1:]] == [e.policy for e in entries[:-1]]


def test_rollback_goes_back_one_champion_at_a_time(local, tmp_path):
    first, second, third = (policy(local, tmp_path / "p", text) for text in "123")
    for digest in (first, second, third):
        put(local, digest)
    entry = rollback(local, "ours", why="worse on long prompts", by="ann")
    assert (entry.policy, entry.previous, entry.action, entry.number) == (
        second, third, "rollback", 4
    )  # fmt: skip
    assert (entry.verdict, entry.why) == (VERDICT, "worse on long prompts")
    assert champion(local, "ours") == entry
    # Not to the third again, which is what was champion before by the number of entries.
    assert rollback(local, "ours", why="worse, too").policy == first
    with pytest.raises(
        ArtifactMissing, match=f"before {first[:12]} .* had no champion that was not"
    ):
        rollback(local, "ours", why="x")
    # A champion that was promoted once more stands where it stands now.
    put(local, second)
    put(local, first)
    assert rollback(local, "ours", why="x").policy == second
    with pytest.raises(ArtifactMissing, match="no champion that was not rolled back"):
        rollback(local, "ours", why="x")
    assert len(history(local, "ours")) == 8


def test_rollback_to_a_named_champion(local, tmp_path):
    first, second, third = (policy(local, tmp_path / "p", text) for text in "123")
    for digest in (first, second, third):
        put(local, digest, unapproved=digest == first, why="a")
    entry = rollback(local, "ours", to=first, why="the others leak")
    assert (entry.policy, entry.previous, entry.unapproved) == (first, third, True)
    for digest in (second, third):
        with pytest.raises(PolicyWithdrawn):
            champions.require_standing(history(local, "ours"), "ours", digest)
    # One that was rolled back may be named as well.
    rollback(local, "ours", to=second, why="it was not that one")
    champions.require_standing(history(local, "ours"), "ours", second)
    for to, said in ((second, "is the champion of 'ours' already"), (D, "was never champion")):
        with pytest.raises(ConfigError, match=f"--to {to[:12]}: {said}"):
            rollback(local, "ours", to=to, why="x")
    local.delete(third)
    with pytest.raises(ArtifactMissing, match=f"policy {third[:12]} is not there"):
        rollback(local, "ours", to=third, why="x")
    with pytest.raises(ConfigError, match="--why is empty"):
        rollback(local, "ours", why="")
    with pytest.raises(ArtifactMissing, match="'theirs' has no champion to roll back"):
        rollback(local, "theirs", why="x")


def test_a_rollback_that_comes_too_late_is_told(local, tmp_path, monkeypatch):
    for text in "12":
        put(local, policy(local, tmp_path / "p", text))
    real = local.exists

    def meanwhile(digest: str) -> bool:
        put(local, C, by="bob")
        return real(digest)

    monkeypatch.setattr(local, "exists", meanwhile)
    with pytest.raises(PromotionLost, match=f"{C[:12]} became champion by bob at"):
        rollback(local, "ours", why="x")
    assert champion(local, "ours").policy == C


def test_what_was_rolled_back_is_for_people_to_promote(local, tmp_path):
    for text in "12":
        put(local, policy(local, tmp_path / "p", text))
    taken = champion(local, "ours").policy
    champions.require_standing(history(local, "ours"), "ours", taken)
    rollback(local, "ours", why="it leaks", by="ann")
    with pytest.raises(PolicyWithdrawn) as caught:
        champions.require_standing(history(local, "ours"), "ours", taken)
    assert f"{taken[:12]} of model line 'ours' was rolled back by ann at 20" in str(caught.value)
    assert "(it leaks)" in str(caught.value)
    assert f"`rlhf promote {taken[:12]} --name ours`" in str(caught.value)
    put(local, C)
    with pytest.raises(PolicyWithdrawn):
        champions.require_standing(history(local, "ours"), "ours", taken)
    put(local, taken)
    champions.require_standing(history(local, "ours"), "ours", taken)


def verdict(
    store: Store, folder: Path, subject: str, judged: str, approved: bool, gate: str
) -> str:
    """A verdict on `subject`, published as a child of `judged`."""
    folder.mkdir(exist_ok=True)
    check = {"metric": "m", "value": 1.0, "bound": "≥ 2", "passed": approved}
    said = {"gate": gate, "subject": subject, "approved": approved, "checks": [check]}
    (folder / "verdict.json").write_text(json.dumps(said))
    parents = {"policy": store.resolve(judged)}
    ref = store.publish(folder, "verdict", parents=parents, producer=PRODUCER, metrics={})
    return ref.digest


def test_the_newest_verdict_of_a_policy(local, tmp_path):
    ours, other = (policy(local, tmp_path / "p", text) for text in "12")
    assert champions.verdict_of(local, ours) is None
    verdict(local, tmp_path / "v", other, other, True, "another's")
    verdict(local, tmp_path / "v", other, ours, True, "of what it is not")
    assert champions.verdict_of(local, ours) is None
    verdict(local, tmp_path / "v", ours, ours, False, "first")
    newest = verdict(local, tmp_path / "v", ours, ours, True, "second")
    found = champions.verdict_of(local, ours)
    assert (found[0].digest, found[1].approved, found[1].checks[0].metric) == (newest, True, "m")
    verdict(local, tmp_path / "v", ours, ours, False, "third")
    assert champions.verdict_of(local, ours)[1].gate == "third"


def test_garbage_collection_keeps_what_a_rollback_can_reach(local, tmp_path):
    """Champions of all times; what people said of a policy keeps nothing."""
    first, second, trial = (policy(local, tmp_path / "p", text) for text in "123")
    for digest in (first, second):
        put(local, digest)
    record_approval(local, "ours", trial, approved=False, by="ann")
    found = local.collect(grace=0.0, dry_run=False)
    assert found.artifacts == [trial]
    assert rollback(local, "ours", why="x").policy == first
    assert local.collect(grace=0.0, dry_run=False).artifacts == []
    assert approval_of(local, "ours", trial).by == "ann"
