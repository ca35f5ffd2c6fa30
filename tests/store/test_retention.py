"""Records of old runs are let go of; what a person or going work may need stays."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from rlhf.errors import ArtifactCorrupt, StoreConfigError, StoreError
from rlhf.store import ArtifactRef, Producer, Store, open_store
from rlhf.store import store as store_module
from rlhf.store.retention import ABANDONED, Retention, end_use, in_use
from tests.examples import examples

DAY = 24 * 3600.0
OLD = Retention(older_than=90 * DAY)
PRODUCER = Producer(stage="x", code_version="1", config={}, seed=0, versions={})


class Site:
    """A store in a folder with runs of the pipeline, made by its public means."""

    def __init__(self, folder: Path) -> None:
        self.root, self._files = folder / "store", folder / "files"
        self.store: Store = open_store(str(self.root), cache_dir=folder / "cache")
        self._files.mkdir(parents=True)
        self._count = 0

    def make(self, kind: str, metrics=None, **parents: ArtifactRef) -> ArtifactRef:
        """Publish an artifact of its own bytes, and record it as a stage does."""
        self._count += 1
        (self._files / "a.json").write_text(f"{self._count}")
        ref = self.store.publish(
            self._files, kind, producer=PRODUCER, metrics=metrics or {},
            parents={role.replace("_", "-"): parent for role, parent in parents.items()},
        )  # fmt: skip
        self.store.history.append(f"records/{kind}/{ref.digest}", ref.model_dump(mode="json"))
        return ref

    def run(self, approved: bool = False) -> dict[str, ArtifactRef]:
        """Make all artifacts of a run, and its report."""
        r = {"data": self.make("dataset")}
        r["sft"] = self.make("policy", data=r["data"])
        r["rm"] = self.make("reward-model", data=r["data"], sft=r["sft"])
        r["rm_evaluation"] = self.make("evaluation", data=r["data"], reward_model=r["rm"])
        r["rm_verdict"] = self.make(
            "verdict", {"approved": True}, reward_model=r["rm"], evaluation=r["rm_evaluation"]
        )
        r["judge"] = self.make("judge", data=r["data"], sft=r["sft"])
        r["policy"] = self.make(
            "policy", data=r["data"], sft=r["sft"], reward_model=r["rm"], verdict=r["rm_verdict"]
        )
        r["evaluation"] = self.make(
            "evaluation", data=r["data"], policy=r["policy"], reward_model=r["rm"], judge=r["judge"]
        )
        r["verdict"] = self.make(
            "verdict", {"approved": approved}, policy=r["policy"], evaluation=r["evaluation"]
        )
        r["report"] = self.make(
            "report", train_policy=r["policy"], gate_policy=r["verdict"], train_judge=r["judge"],
            **{name: r[name] for name in ("data", "sft", "rm", "rm_verdict", "evaluation")},
        )  # fmt: skip
        return r

    def age(self, days: float, part: str = "") -> None:
        for path in self.root.rglob("*"):
            if path.is_file() and part in str(path):
                then = path.stat().st_mtime - days * DAY
                os.utime(path, (then, then))

    def whole(self, run: dict[str, ArtifactRef]) -> set[str]:
        return {name for name, ref in run.items() if not self.store.problems(ref, deep=True)}

    def recorded(self) -> set[str]:
        names = self.store.history.names("records/")
        return {name.rpartition("/")[2] for name in names}

    def let_go(self, rule: Retention = OLD, **options):
        """Collect by a rule; the dry run finds the same, and removes nothing."""
        before = set(self.root.rglob("*"))
        told = self.store.collect(retention=rule, **options)
        assert not told.removed
        assert {p for p in before if p.is_file()} <= set(self.root.rglob("*"))
        done = self.store.collect(retention=rule, dry_run=False, **options)
        assert (done.artifacts, done.records) == (told.artifacts, told.records)
        assert done.size == told.size
        # A record stays just as long as its artifact, and nothing that stays lacks a part.
        assert self.recorded() <= set(self.store.digests())
        for digest in self.store.digests():
            assert self.store.problems(digest) == []
            self.store.lineage(digest)
        assert self.store.collect(grace=options.get("grace", DAY)).artifacts == []
        return done


@pytest.fixture(autouse=True)
def unsynced(monkeypatch):
    """No power fails here, and syncing takes most of the time."""
    monkeypatch.setattr(os, "fsync", lambda _: None)


@pytest.fixture
def site(tmp_path) -> Site:
    return Site(tmp_path)


def test_an_old_run_goes_with_all_it_alone_kept(site):
    old, new = site.run(), None
    site.age(100)
    new = site.run()
    assert site.store.collect().artifacts == []  # records keep both
    found = site.let_go()
    assert set(found.artifacts) == {ref.digest for ref in old.values()}
    assert {name.split("/")[2] for name in found.records} == {r.digest for r in old.values()}
    assert found.contents[old["policy"].digest] == ("policy", old["policy"].size)
    assert site.whole(new) == {*new}
    assert site.whole(old) == set()


PROTECTIONS = {
    "champion": lambda s, r: s.store.history.append(
        "champion/x", {"policy": r["policy"].digest, "verdict": r["verdict"].digest}
    ),
    "champion without a verdict": lambda s, r: s.store.history.append(
        "champion/x", {"policy": r["policy"].digest, "verdict": None}
    ),
    "pin": lambda s, r: s.store.pins.add("good", r["policy"]),
    "approval": lambda s, r: s.store.history.append(
        f"approvals/x/{r['policy'].digest}", {"approved": True, "by": "ann"}
    ),
    "refusal, which may be changed": lambda s, r: s.store.history.append(
        f"approvals/x/{r['policy'].digest}", {"approved": False, "by": "ann"}
    ),
}


@pytest.mark.parametrize("rule", [OLD, Retention(keep_runs=1)])
def test_what_people_rely_on_stays_with_its_whole_lineage(site, rule):
    runs = {name: site.run() for name in PROTECTIONS}
    # Of two champions the earlier stays too: a rollback may name it.
    for name, run in runs.items():
        PROTECTIONS[name](site, run)
    other = site.run()
    site.age(100)
    site.run()
    assert {*site.let_go(rule).artifacts} == {ref.digest for ref in other.values()}
    for name, run in runs.items():
        assert site.whole(run) == {*run}, name
        assert {ref.digest for ref in run.values()} <= site.recorded(), name


def test_a_policy_that_waits_for_a_persons_decision_stays(site):
    waiting, rejected = site.run(approved=True), site.run()
    site.age(400)
    site.let_go()
    assert site.whole(waiting) == {*waiting}
    assert site.whole(rejected) == set()


def test_looks_stay_and_keep_no_policy(site):
    run = site.run()
    entry = {"policy": run["policy"].digest, "keys": ["a" * 64], "prompts": "b" * 64}
    site.store.history.append("looks/x", entry)
    site.store.history.append("retrainings/x", {"dataset": run["data"].digest})
    later = site.make("dataset")
    site.store.history.append("retrainings/x", {"dataset": later.digest})
    site.age(100)
    site.let_go()
    assert site.store.history.entries("looks/x") == [entry]
    assert len(site.store.history.entries("retrainings/x")) == 2
    assert site.whole(run) == set()
    assert site.store.exists(later)  # the next retraining counts what is new in its data


def test_runs_are_counted_by_their_reports(site):
    runs = []
    for _ in range(4):
        runs.append(site.run())
        site.age(10)
    # The second of two reports of one run, which waited in between.
    last = {k: v for k, v in runs[3].items() if k != "report"}
    site.make("report", **last, promotion=site.make("promotion", policy=last["policy"]))
    site.age(2)
    alone = site.make("policy", data=runs[0]["data"])
    site.age(2)
    site.let_go(Retention(keep_runs=2))
    assert [len(site.whole(run)) for run in runs] == [1, 0, 10, 10]
    assert site.whole({"a": alone, "b": runs[0]["data"]}) == {"a", "b"}
    found = site.let_go(Retention(keep_runs=5))
    assert (found.artifacts, found.runs) == ([], 2)


def test_use_makes_a_record_young(site):
    used, other = site.run(), site.run()
    site.age(100)
    assert all(site.store.renew(ref) for ref in used.values())
    site.age(2)
    site.let_go()
    assert site.whole(used) == {*used}
    assert site.whole(other) == set()
    assert not site.store.renew(other["sft"])


@pytest.mark.parametrize("fails", [False, True])
def test_going_work_keeps_its_inputs(site, fails):
    """A training may take longer than the grace; killed, it can go on for a while."""
    run = site.run()
    site.age(100)
    inputs = [run["policy"], run["judge"]]

    def work():
        with in_use(site.store.history, "train/x", inputs):
            site.age(9)
            site.let_go()
            assert site.whole(run) == {*run}
            if fails:
                raise StoreError("no answer")

    if not fails:
        work()
        site.age(2)
    else:
        with pytest.raises(StoreError):
            work()
        site.let_go()
        assert site.whole(run) == {*run}
        site.age(ABANDONED / DAY)
    found = site.let_go()
    assert site.whole(run) == set()
    assert "records/policy/" + run["policy"].digest in found.records
    assert site.store.history.names("running/") == []


def test_work_that_begins_again_is_going(site):
    ref = site.make("policy")
    site.age(100)
    with in_use(site.store.history, "train/x", [ref]):
        pass
    with in_use(site.store.history, "train/x", [ref]):
        site.age(2)
        site.let_go()
        assert site.store.exists(ref)
    end_use(site.store.history, "train/x")
    site.age(2)
    # Without retention the record keeps it, and the mark goes.
    assert site.store.collect(dry_run=False).artifacts == []
    assert site.store.history.names("running/") == []


def test_a_record_that_is_used_during_a_collection(site, monkeypatch):
    """The collection has seen it old: whoever uses it waits, and learns that it is gone."""
    ref = site.make("policy")
    site.age(100)
    backend, order = site.store._backend, []
    real, wait = backend.delete, store_module.wait_for_collection
    other = open_store(str(site.root), cache_dir=site.root.parent / "other")

    def late(keys):
        keys = [*keys]
        if not order and keys[0].startswith("refs/"):
            order.append("renewed")
            monkeypatch.setattr(store_module, "wait_for_collection", lambda _: real(keys))
            assert not other.renew(ref)
            monkeypatch.setattr(store_module, "wait_for_collection", wait)
        real(keys)

    monkeypatch.setattr(backend, "delete", late)
    site.store.collect(retention=OLD, dry_run=False)
    assert order == ["renewed"]


def test_a_store_that_refuses_to_renew_is_used_all_the_same(site, monkeypatch, caplog):
    ref = site.make("policy")
    site.age(100)

    def put(key, data):
        raise StoreConfigError("access denied")

    monkeypatch.setattr(site.store._backend, "put", put)
    assert site.store.renew(ref)
    assert "access denied" in caplog.text


def test_damaged_manifests(site):
    """One that stays stops the collection; another goes with its record."""
    gone, stays = site.make("policy"), site.make("policy")
    site.store.pins.add("good", stays)
    site.age(100)
    path = site.root / f"manifests/{gone.digest}.json"
    path.write_bytes(b"{}")
    site.age(2, gone.digest)
    os.utime(path, (path.stat().st_mtime - 200 * DAY,) * 2)
    assert site.store.collect(retention=OLD, dry_run=False).artifacts == [gone.digest]
    (site.root / f"manifests/{stays.digest}.json").write_bytes(b"{}")
    with pytest.raises(ArtifactCorrupt):
        site.store.collect(retention=OLD, dry_run=False)


@settings(max_examples=examples(8))
@given(st.data())
def test_whatever_is_protected_is_whole(tmp_path_factory, data):
    """Any runs that share artifacts, any protections, any rule."""
    site = Site(tmp_path_factory.mktemp("site"))
    approvals = data.draw(st.lists(st.booleans(), min_size=1, max_size=2))
    runs = [site.run(approved) for approved in approvals]
    shared = site.make("policy", sft=runs[0]["sft"], reward_model=runs[-1]["rm"])
    runs.append({**runs[0], "policy": shared, "verdict": site.make("verdict", policy=shared)})
    names = [(i, n) for i, run in enumerate(runs) for n in run]
    pinned = data.draw(st.lists(st.sampled_from(names), max_size=3, unique=True))
    for i, name in pinned:
        site.store.pins.add(f"pin{i}{name}", runs[i][name])
    for i, name in enumerate(data.draw(st.lists(st.sampled_from([*PROTECTIONS][:2]), max_size=2))):
        PROTECTIONS[name](site, runs[i % len(runs)])
    site.age(100)
    rules = [OLD, *(Retention(keep_runs=n) for n in (1, 2, 3))]
    kept = {a.ref.digest for i, n in pinned for a in site.store.lineage(runs[i][n])}
    kept |= {e["policy"] for e in site.store.history.entries("champion/x")}
    site.let_go(data.draw(st.sampled_from(rules)))
    assert kept <= set(site.store.digests())
