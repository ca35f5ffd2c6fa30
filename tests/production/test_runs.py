"""Runs on three machines with one store: killed, cancelled, approved, retrained."""

import json
import signal
import subprocess
import sys
import time

import pytest

from rlhf.store import open_store
from tasks.lost_runs import RESTART_OF
from tasks.stages import STAGES
from tests.flows.conftest import tiny_tree
from tests.production.blows import (
    kill_server,
    kill_store,
    processes_of,
    signal_run,
)
from tests.production.site import ROOT
from tests.servers import PATIENCE

pytestmark = [pytest.mark.prefect, pytest.mark.s3]
PLACEMENT = {"train-sft": "gpu", "train-reward-model": "reward", "train-policy": "gpu"}
UPDATES = 200


@pytest.fixture
def s3(place, monkeypatch):
    """This process as a client of the store."""
    for name, value in place.environment.items():
        if name.startswith("AWS_"):
            monkeypatch.setenv(name, value)

    def store(name, folder):
        return open_store(f"s3://production/{name}", cache_dir=folder)

    return store


def until(done, every=0.3):
    """What `done` returns once that is true."""
    give_up = time.monotonic() + PATIENCE
    while not (found := done()):
        assert time.monotonic() < give_up
        time.sleep(every)
    return found


def policy_child(place, run, number):
    """The run of train-policy that was made as that one, when it is at work."""

    def at_work():
        children = place.children(run)
        found = [c for c in children if c["name"].endswith("train-policy")]
        wanted = found[number - 1] if len(found) >= number else None
        if wanted and wanted["state"]["name"] == "Running" and processes_of(wanted["id"]):
            return wanted
        return None

    return until(at_work)


@pytest.fixture(scope="module")
def struck(workers, tmp_path_factory):
    """A run whose trainer is killed, whose servers are killed, whose trainer is told to go, and
    which itself is killed. Nobody does anything about it."""
    tree = tiny_tree(tmp_path_factory.mktemp("struck"))
    del tree["runtime"]
    tree["ppo"] |= {"total_episodes": 8 * UPDATES, "checkpoint_every": 5}
    tree["retries"] = {"attempts": 9, "delay_seconds": 0.2}
    tree |= {"name": "struck", "store": "s3://production/struck", "promotion": {"name": "struck"}}
    undisturbed = start_undisturbed(tree, tmp_path_factory.mktemp("undisturbed"))
    saved = workers.machine("gpu") / "home" / "work" / "checkpoints"
    run = workers.submit("rlhf-pipeline", overrides={**tree, "placement": PLACEMENT})
    first = policy_child(workers, run, 1)
    until(lambda: [*saved.glob("train-policy-*/update-*")], 0.05)
    assert signal_run(first["id"], signal.SIGKILL)
    until(lambda: len(workers.children(run)) >= 4, 0.2)
    kill_store(workers)  # just when the second looks for it, before it does anything
    second = policy_child(workers, run, 2)
    lease = workers.api(f"flow_runs/{run}")["state"]["state_details"]
    kill_server(workers)
    # What the run's process asks for every 225 s; refused, it ends.
    assert renewed(workers, lease["deployment_concurrency_lease_id"]) == 204
    assert signal_run(second["id"], signal.SIGTERM)
    third = policy_child(workers, run, 3)
    assert signal_run(run, signal.SIGKILL)
    workers.wait(run, "Crashed")
    assert processes_of(third["id"])
    again = until(lambda: workers.successor(run))
    ended = workers.wait(again)
    assert workers.wait(run)["state"]["name"] == "Crashed"
    children = workers.children(run) + workers.children(again)
    output, _ = undisturbed.communicate()
    assert undisturbed.returncode == 0, output
    return tree, ended, children, json.loads(output.splitlines()[-1])


def renewed(place, lease):
    """The server's answer to the renewal of a concurrency lease."""
    path = f"v2/concurrency_limits/leases/{lease}/renew"
    return place.client.post(path, json={"lease_duration": 300}).status_code


def start_undisturbed(tree, folder):
    """The same stages in a process of their own, while the site is mostly waited for."""
    local = {"store": str(folder / "store"), "runtime": {"work_dir": str(folder / "work"),
             "report_dir": str(folder / "reports"), "threads": 1}}  # fmt: skip
    command = [sys.executable, "-m", "tests.production.undisturbed", json.dumps({**tree, **local})]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)


def test_ends_as_if_nothing_had_happened(struck, s3, tmp_path):
    _, run, _, undisturbed = struck
    assert run["state"]["name"] == "Completed", run["state"]
    store = s3("struck", tmp_path / "cache")
    champion = store.history.latest("champion/struck")
    assert champion["policy"] == undisturbed["train-policy"]
    for stage in STAGES:
        entries = [
            e
            for name in store.history.names(f"records/{stage}/")
            for e in store.history.entries(name)
        ]
        assert [e["digest"] for e in entries] == [undisturbed[stage]]
    assert len(store.history.entries("champion/struck")) == 1


def test_a_parent_that_is_started_again_waits_for_the_child_that_lives(struck, workers):
    _, run, children, _ = struck
    states = [c["state"]["name"] for c in children if c["name"].endswith("train-policy")]
    assert states == ["Crashed", "Crashed", "Completed"]
    assert "restart:1" in run["tags"]
    assert len(children) == 5
    assert workers.successor(run["id"]) is None


def test_children_are_linked_and_placed(struck, workers):
    _, run, children, _ = struck
    pools = {c["name"].rpartition("-")[2]: c["work_pool_name"] for c in children}
    assert pools == {"sft": "gpu", "model": "reward", "policy": "gpu"}
    for child in children:
        parent = workers.api(f"task_runs/{child['parent_task_run_id']}")
        assert child["name"].endswith(parent["name"])
        assert f"{RESTART_OF}{parent['flow_run_id']}" in run["tags"]


def test_nothing_passes_by_the_disk(struck, workers):
    work = {pool: workers.machine(pool) / "home" / "work" for pool in ("cpu", "reward", "gpu")}
    locks = {pool: {p.name.rpartition("-")[0] for p in folder.glob("*.lock")}
             for pool, folder in work.items()}  # fmt: skip
    assert locks["gpu"] == {"train-sft", "train-policy"}
    assert locks["reward"] == {"train-reward-model"}
    assert not locks["cpu"] & set(PLACEMENT)
    # What one machine needs of another came from the store, into its own cache.
    assert not list((workers.machine("reward") / "home").glob("reports/*"))


def test_cancelling_the_parent_stops_the_child_and_another_parent_takes_it_for_an_answer(
    struck, workers
):
    tree, *_ = struck
    ppo = {**tree["ppo"], "kl_coef": 0.2, "total_episodes": 8 * 5000}
    asked = {**tree, "ppo": ppo, "placement": {"train-policy": "gpu"}}
    run = workers.submit("rlhf-pipeline", overrides=asked)
    child = policy_child(workers, run, 1)
    other = workers.submit("rlhf-pipeline", overrides=asked)
    until(lambda: f"found {child['name']}" in workers.logs(other))
    workers.cancel(run)
    workers.wait(run, "Cancelled")
    workers.wait(child["id"], "Cancelled")
    until(lambda: not processes_of(child["id"]))
    assert workers.wait(other)["state"]["name"] == "Failed"
    assert workers.children(other) == []


@pytest.fixture(scope="module")
def manual(struck):
    """Overrides of a run with a policy of its own, which a person must approve."""
    tree, *_ = struck
    ppo = {**tree["ppo"], "kl_coef": 0.3, "total_episodes": 32}
    return {**tree, "ppo": ppo, "promotion": {"name": "struck", "approval": "manual"}}


def test_a_refused_policy_is_not_promoted(manual, workers, s3, tmp_path):
    run = workers.submit("rlhf-pipeline", overrides={**manual, "promotion": "manual"})
    workers.wait(run, "Suspended")
    workers.run("rlhf", "approve", run[:8], "--refuse", "--by", "bob", "--why", "too curt")
    ended = workers.wait(run)["state"]
    assert ended["name"] == "Refused"
    assert "bob" in ended["message"]
    assert s3("struck", tmp_path / "cache").history.latest("champion/default") is None


def test_a_manual_promotion_waits_without_a_process(manual, workers, s3, tmp_path):
    run = workers.submit("rlhf-pipeline", overrides=manual)
    waiting = workers.wait(run, "Suspended")
    until(lambda: not processes_of(run))
    keyset = waiting["state"]["state_details"]["run_input_keyset"]
    form = workers.api(f"flow_runs/{run}/input/{keyset['description']}")
    assert "gate-policy" in form
    assert "sampled.kl" in form
    store = s3("struck", tmp_path / "cache")
    before = store.history.latest("champion/struck")
    said = workers.run("rlhf", "approve", waiting["name"], "--by", "ann", "--why", "reads well")
    assert "approved" in said
    assert workers.wait(run)["state"]["name"] == "Completed"
    after = store.history.latest("champion/struck")
    assert after["policy"] != before["policy"]
    assert (after["by"], after["why"], after["run"]) == ("ann", "reads well", waiting["name"])


def test_retraining_looks_first(struck, workers, s3, tmp_path):
    tree, *_ = struck
    short = {**tree, "ppo": {**tree["ppo"], "total_episodes": 32}}
    again = workers.submit("retraining/retraining", preset="none", overrides=short)
    workers.wait(again, "Running")  # or else the other run may be the first
    nothing = workers.submit("retraining/retraining", preset="none", overrides=short)
    workers.wait(nothing, "AwaitingConcurrencySlot")
    first = workers.wait(again)
    assert first["state"]["name"] == "Completed", first["state"]
    store = s3("struck", tmp_path / "cache")
    champion = store.history.latest("champion/struck")
    sft = store.manifest(champion["policy"]).parents["sft"]
    assert "base" in store.manifest(sft).parents
    ended = workers.wait(nothing)
    assert (ended["state"]["name"], ended["state"]["type"]) == ("NoNewData", "COMPLETED")
    assert first["name"] in ended["state"]["message"]
    assert "train-sft" not in workers.logs(nothing)
    more = {**short, "data": {"world": {**tree["data"]["world"], "pairs": 70}},
            "retraining": {"min_new_pairs": 1000}}  # fmt: skip
    few = workers.wait(workers.submit("retraining/retraining", preset="none", overrides=more))
    assert few["state"]["name"] == "NoNewData"
    assert "min_new_pairs = 1000" in few["state"]["message"]


def lost_while_pending(place, pool, find):
    """The run that this pool's machine was lost with, before the run's process began."""
    place.workers[pool].lose()

    def pending():
        run = find()
        if run is None:
            return None
        if place.workers[pool].process.poll() is not None:
            place.workers[pool].start()  # only now, so that Pending is not missed
        return run if run["state"]["type"] == "PENDING" else None

    run = until(pending, 0.05)
    place.workers[pool].lose()
    return run["id"]


def test_runs_left_pending_by_a_dead_worker_are_replaced(struck, workers):
    """A stage by its pipeline, and then a pipeline by what starts lost ones again."""
    tree, *_ = struck
    reward_model = {**tree["reward_model"], "learning_rate": 3e-3}
    retries = {"attempts": 9, "delay_seconds": 0.2, "pending_seconds": 10}
    asked = {**tree, "reward_model": reward_model, "retries": retries,
             "placement": {"train-reward-model": "reward"}}  # fmt: skip
    run = workers.submit("rlhf-pipeline", overrides=asked)
    stuck = lost_while_pending(workers, "reward", lambda: next(iter(workers.children(run)), None))
    workers.workers["reward"].start()
    ended = workers.wait(stuck)["state"]
    assert (ended["name"], ended["type"]) == ("NeverStarted", "CANCELLED")
    assert "for more than 10 s: its worker is gone" in ended["message"]
    until(lambda: [c for c in workers.children(run) if c["state"]["name"] == "Completed"])
    workers.cancel(run)
    workers.wait(run, "Cancelled")
    waiting = workers.submit("rlhf-pipeline", overrides=tree)
    lost_while_pending(workers, "cpu", lambda: workers.api(f"flow_runs/{waiting}"))
    workers.workers["cpu"].start()
    workers.wait(workers.submit("restart-lost-runs", pending_seconds=1))
    assert workers.wait(waiting)["state"]["name"] == "NeverStarted"
    ended = workers.wait(workers.successor(waiting))
    assert ended["state"]["name"] == "Completed", ended["state"]
    assert workers.successor(run) is None, "it was cancelled on purpose"
