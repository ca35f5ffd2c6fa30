"""Resuming on another machine from uploaded checkpoints, and their retention."""

from __future__ import annotations

import logging
import os
import resource
import signal
import uuid

import pytest

from rlhf.checkpoints.folder import checkpoints_in, import_checkpoint
from rlhf.checkpoints.store import HISTORY, CheckpointStore, keep_best
from rlhf.errors import CheckpointError, Interrupted, StoreError, is_retriable
from rlhf.ppo.train import checkpoint_score
from rlhf.store import Store, open_store
from rlhf.store.cache import Cache
from rlhf.store.local import LocalBackend
from tests.library import toys
from tests.library.kills import in_child, kill_points
from tests.library.ppo_runs import EVERYTHING, Stopped, assert_same_run
from tests.library.upload_runs import (
    PRODUCER,
    Machine,
    checkpoint,
    keys_of,
    left_behind,
    names,
    stored,
    until,
)


@pytest.fixture(autouse=True)
def _sigterm_is_survived():
    before = signal.signal(signal.SIGTERM, lambda *_: None)
    yield
    signal.signal(signal.SIGTERM, before)


# --- another machine ------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_killed_run_goes_on_elsewhere_bit_by_bit(train, place, machine, tmp_path, caplog):
    """With everything that has a state."""
    first, second = machine("first"), machine("second")
    straight = train("straight", checkpoints=tmp_path / "s", **EVERYTHING)

    def work():
        def die_when_sent(step):
            if step == 4:
                until(lambda: 2 in stored(first.store))
                os.kill(os.getpid(), signal.SIGKILL)

        train("killed", told=die_when_sent, **first.use(), **EVERYTHING)

    assert in_child(work) == -signal.SIGKILL
    newest = stored(second.store)[-1]
    assert newest in (2, 3)
    steps = []
    with caplog.at_level(logging.INFO, "rlhf"):
        resumed = train("resumed", told=steps.append, **second.use(), **EVERYTHING)
    assert steps[0] == newest + 1
    assert f"checkpoint of update {newest} comes from {place.uri}" in caplog.messages
    assert_same_run(resumed, straight)
    last = [tmp_path / "s" / "update-000004", second.checkpoints / "update-000004"]
    assert len({*(p.name for p in last[0].iterdir())}) == 5
    for path in last[0].iterdir():
        assert path.read_bytes() == (last[1] / path.name).read_bytes(), path.name
    assert left_behind(second) == []


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize("dies_at", [1, 3, 5])
def test_a_kill_in_the_midst_of_an_upload_costs_that_one(
    train, straight, watched, tmp_path, dies_at
):
    """And the same machine clears away what it had set aside."""
    seen = []

    def hook(key):
        seen.append(key)
        if len(seen) == 5 + dies_at:  # the first has five files, none of them like the second's
            os.kill(os.getpid(), signal.SIGKILL)

    watched.store._backend.hook = hook
    assert in_child(lambda: train("killed", **watched.use())) == -signal.SIGKILL
    assert stored(watched.store) == [1]
    assert left_behind(watched)
    elsewhere = Machine(tmp_path / "elsewhere", watched.store.uri)
    steps = []
    assert_same_run(train("resumed", told=steps.append, **elsewhere.use()), straight)
    assert steps[0] == 2
    watched.store._backend.hook = lambda key: None
    assert_same_run(train("here", **watched.use()), straight)
    assert left_behind(watched) == left_behind(elsewhere) == []


def test_only_what_is_newer_is_fetched(train, straight, machine, caplog):
    here, elsewhere = machine("here"), machine("elsewhere")
    for step, one in ((1, here), (3, elsewhere)):
        with pytest.raises(Interrupted):
            train(str(step), sigterm_at=step, checkpoint_every=100, **one.use())
    assert stored(here.store) == [1, 3]
    assert names(elsewhere.checkpoints) == ["update-000001", "update-000003"]
    steps = []
    with caplog.at_level(logging.INFO, "rlhf"):
        with pytest.raises(Stopped):  # it has the newest itself
            train("a", stop_at=4, checkpoint_every=100, **elsewhere.use())
        assert "comes from" not in caplog.text
        again = train("b", told=steps.append, checkpoint_every=100, **here.use())
    assert steps == [4]  # its own is of update 1
    assert_same_run(again, straight)


def spoil(place, store, update, how):
    """Damage the stored checkpoint of an update."""
    ref, manifest, _ = next(a for a in store.list() if a.manifest.metrics["update"] == update)
    weights = next(e for e in manifest.files if e.path == "policy.safetensors").sha256
    key = f"blobs/sha256/{weights[:2]}/{weights}"
    if how == "manifest":
        place.write(f"manifests/{ref.digest}.json", b"{}")
    elif how == "gone":
        place.remove(key)
    else:
        data = place.read(key)
        place.write(key, data[:-1] + bytes([data[-1] ^ 1]))


@pytest.mark.parametrize(
    ("place", "how"),
    [
        ("folder", "flipped"),
        ("folder", "gone"),
        ("folder", "manifest"),
        pytest.param("s3", "gone", marks=pytest.mark.s3),
    ],
    indirect=["place"],
)
def test_a_damaged_one_is_named_passed_over_and_mended(
    train, straight, place, machine, caplog, how
):
    first, second = machine("first"), machine("second")
    for step in (2, 3):
        with pytest.raises(Interrupted):
            train(str(step), sigterm_at=step, checkpoint_every=100, **first.use())
    assert stored(first.store) == [2, 3]
    spoil(place, first.store, 3, how)
    steps = []
    with caplog.at_level(logging.INFO, "rlhf"), pytest.raises(Interrupted):
        train("b", told=steps.append, sigterm_at=3, checkpoint_every=100, **second.use())
    assert steps == [3]
    assert "is damaged" in caplog.text
    assert f"checkpoint of update 2 comes from {place.uri}" in caplog.messages
    # The same update, saved again, is whole now: what was damaged had to go first.
    third = machine("third")
    assert stored(third.store) == [2, 3]
    steps.clear()
    assert_same_run(train("c", told=steps.append, **third.use()), straight)
    assert steps == [4]


def test_with_no_whole_one_it_starts_from_the_beginning(train, straight, place, machine, caplog):
    first, second = machine("first"), machine("second")
    with pytest.raises(Interrupted):
        train("a", sigterm_at=2, checkpoint_every=100, **first.use())
    spoil(place, first.store, 2, "flipped")
    steps = []
    assert_same_run(train("b", told=steps.append, **second.use()), straight)
    assert steps[0] == 1
    assert "checkpoint of update 2" in caplog.text


@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_a_kill_at_any_point_of_the_copy_leaves_no_half_checkpoint(tmp_path):
    source = checkpoint(tmp_path / "source", 3)
    files = {path.name: path.read_bytes() for path in source.iterdir()}
    with kill_points() as points:
        import_checkpoint(tmp_path / "counted", source, 3)
    assert len(points) > 8
    found = []
    for at in range(len(points)):
        folder = tmp_path / str(at)

        def work(at=at, folder=folder):
            with kill_points(at):
                import_checkpoint(folder, source, 3)

        assert in_child(work) == -signal.SIGKILL
        found.append(names(folder))
        for path in checkpoints_in(folder):
            assert {p.name: p.read_bytes() for p in path.iterdir()} == files, points[at]
        import_checkpoint(folder, source, 3)
        assert names(folder) == ["update-000003"]
        assert not [*folder.glob(".partial-*")]
    assert found[0] == []
    assert found == sorted(found)
    # Everything is on the disk before the name is.
    partial = str(tmp_path / "counted" / ".partial-update-000003")
    named = points.index(f"replace {partial}")
    assert {f"open {partial}", *(f"open {partial}/{name}" for name in files)} < {*points[:named]}


def test_a_copy_that_finds_no_room_says_so(tmp_path):
    source = checkpoint(tmp_path / "source", 3, same="long" * 100)
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100, limits[1]))
    try:
        with pytest.raises(CheckpointError, match=r"update-000003: can't be copied .*too lar") as e:
            import_checkpoint(tmp_path / "c", source, 3)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert is_retriable(e.value)
    assert names(tmp_path / "c") == []


# --- what is kept ---------------------------------------------------------------------------------


def test_the_last_two_and_the_best_stay_with_their_blobs_and_nothing_else(place, machine, tmp_path):
    store = machine("m").store
    kept = CheckpointStore(store, PRODUCER)
    place.write("blobs/sha256/ab/left-by-a-killed-upload", b"x")
    rounds = [
        (5, 0.5, [5], True), (10, None, [5, 10], False), (15, 0.75, [10, 15], True),
        (20, 0.25, [15, 20], False), (25, 0.75, [15, 20, 25], False),
        (30, -1.0, [15, 25, 30], False), (35, 1.5, [30, 35], True),
    ]  # fmt: skip
    for update, score, expected, _ in rounds:
        # The first three have the same policy, as in a critic's warm-up.
        same = "warm-up" if update < 20 else str(update)
        kept.save(checkpoint(tmp_path / str(update), update, same), update, score)
        assert stored(store) == expected
        objects = {key for key in place.objects() if not key.startswith("refs/")}
        assert objects == keys_of(store)
        assert all(store.exists(artifact.ref) for artifact in store.list())
    history = store.history.entries(HISTORY)
    assert [(e["update"], e["score"], e["best"]) for e in history] == [
        (update, score, best) for update, score, _, best in rounds
    ]
    assert history[-1]["digest"] in {artifact.ref.digest for artifact in store.list()}
    keep_best(store)
    assert stored(store) == [35]
    assert {key for key in place.objects() if not key.startswith("refs/")} == keys_of(store)


def test_a_store_that_forbids_deletion_only_grows(tmp_path, caplog):
    class Forbidding(LocalBackend):
        def delete(self, keys):
            if [*keys]:
                raise StoreError("denied")

    store = Store(Forbidding(tmp_path / "s"), Cache(tmp_path / "c"))
    kept = CheckpointStore(store, PRODUCER)
    for update in (1, 2, 3):
        kept.save(checkpoint(tmp_path / str(update), update), update, -float(update))
    kept.save(checkpoint(tmp_path / "4", 4), 4, -4.0)
    assert stored(store) == [1, 2, 3, 4]
    assert "older checkpoints can't be dropped now (denied)" in caplog.text


def test_the_score_is_the_objective_of_the_last_updates():
    curve = [{"reward": r, "kl": k} for r, k in ((9.0, 0.0), (1.0, 2.0), (2.0, 4.0))]
    config = toys.changed(toys.PPO, kl_coef=0.5, checkpoint_every=2)
    assert checkpoint_score(curve, config) == 0.0  # (1 − 0.5·2 + 2 − 0.5·4) / 2
    assert checkpoint_score(curve[:1], config) == 9.0
    for bad in (float("nan"), float("inf")):
        assert checkpoint_score([*curve, {"reward": bad, "kl": 1.0}], config) is None
        assert checkpoint_score([*curve, {"reward": bad, "kl": bad}], config) is None


def test_names_of_runs_do_not_meet(tmp_path):
    """Two runs' own stores below one: neither drops the other's."""
    main = open_store(str(tmp_path / "main"), cache_dir=tmp_path)
    runs = [open_store(f"{main.uri}/checkpoints/{n}", cache_dir=tmp_path) for n in "ab"]
    folder = checkpoint(tmp_path / uuid.uuid4().hex, 1)
    main.publish(folder, "policy", parents={}, producer=PRODUCER, metrics={})
    for run in runs:
        CheckpointStore(run, PRODUCER).save(folder, 1, None)
    keep_best(runs[0])  # none has a score
    assert [stored(run) for run in runs] == [[], [1]]
    (artifact,) = main.list()
    assert main.exists(artifact.ref)
