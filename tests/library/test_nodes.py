"""A stage on several machines: the bytes of one machine, and an end in time when one is missing."""

from __future__ import annotations

import json
import os
import socket
import struct
import subprocess
import sys
import tempfile
import threading
import time
from contextlib import closing, contextmanager, suppress
from pathlib import Path

import pytest

from rlhf.checkpoints.folder import checkpoints_in
from rlhf.config import BaseModelConfig, PipelineConfig
from rlhf.errors import ConfigError, DataError, Interrupted, StoreError, WorkerDied
from rlhf.files import folder_sha256
from rlhf.launch import Job, Nodes, launch
from rlhf.launch.channel import Channel
from rlhf.launch.nodes import join, meet
from rlhf.launch.torchrun import torchrun_environment
from rlhf.store import Producer, open_store
from tasks.join import prepare_job
from tasks.nodes import check_nodes
from tasks.stages import PREPARE_DATA, STAGES, TRAIN_SFT
from tests.library import toys
from tests.servers import PATIENCE

ROOT = Path(__file__).parents[2]
MEMBER = """
import sys
from rlhf.launch import Job, take_part

def prepare(sent, context, folder):
    # The inputs are on a disk that both see; nothing else of the first machine's is used.
    (folder / "out").mkdir()
    own = {"out_dir": folder / "out", "checkpoints": folder / "checkpoints"}
    return Job.model_validate_json(sent).model_copy(update=own)

take_part(("127.0.0.1", int(sys.argv[1])), 1, prepare)
"""


def job(tmp_path, data, out="out", **options) -> Job:
    (tmp_path / out).mkdir()
    section = toys.changed(toys.SFT, checkpoint_minutes=0, **options)
    return Job(
        stage="train-sft", field="sft", section=section, base=toys.BASE, runtime=toys.RUNTIME,
        inputs={"data": data}, out_dir=tmp_path / out, checkpoints=tmp_path / "checkpoints",
    )  # fmt: skip


@contextmanager
def member(tmp_path, port):
    """Another machine's process, with temporary files of its own."""
    place = tmp_path / "member"
    place.mkdir(exist_ok=True)
    environment = {**os.environ, "TMPDIR": str(place)}
    with subprocess.Popen(
        [sys.executable, "-c", MEMBER, str(port)], cwd=ROOT, env=environment
    ) as process:
        try:
            yield process
            process.wait(PATIENCE)
        finally:
            process.kill()
    end = time.monotonic() + PATIENCE
    while [*place.iterdir()] and time.monotonic() < end:  # its launcher ends a moment later
        time.sleep(0.05)
    assert [*place.iterdir()] == []


def test_two_machines_make_the_bytes_of_one_also_when_one_was_lost(
    data, sft, tmp_path, monkeypatch
):
    place = tmp_path / "t"
    place.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(place))
    monkeypatch.setenv("PET_NNODES", "2")  # of this process, not of the children's launcher
    monkeypatch.setenv("PET_MASTER_ADDR", "nowhere.invalid")
    told, steps, members = [], [], []
    one = job(tmp_path, data, "one", processes=2).model_copy(update={"checkpoints": None})
    launch(one, lambda *a: told.append(a))
    assert toys.distance(tmp_path / "one", sft) < 2e-4  # Adam divides by tiny second moments
    # 96 rows by 16, 3 epochs; by one process alone, and those that are logged once more.
    assert [*dict.fromkeys(step for step, *_ in told)] == list(range(1, 19))
    assert len(told) == 18 + 18  # each step of a short training is logged

    @contextmanager
    def call(port):
        with member(tmp_path, port) as process:
            members.append(process)
            yield

    def progress(step, total, metrics):
        steps.append(step)
        if len(members) == 1 and len(checkpoints_in(tmp_path / "checkpoints")) == 2:
            members[0].kill()

    two = job(tmp_path, data, "two", processes=1, nodes=2)
    with pytest.raises(WorkerDied, match=r"^train-sft: node 2 of 2 \(127.0.0.1\) was lost: it "):
        launch(two, progress, Nodes(call=call))
    assert steps[-1] < 18
    begun = int(checkpoints_in(two.checkpoints)[-1].name.removeprefix("update-"))
    steps.clear()
    launch(two, progress, Nodes(call=call))
    assert steps[0] == begun + 1  # also on the machine without that checkpoint
    assert members[1].returncode == 0
    assert folder_sha256(tmp_path / "two") == folder_sha256(tmp_path / "one")
    assert [*place.iterdir()] == []


# --- meeting --------------------------------------------------------------------------------------


def toy_job(**options) -> Job:
    section = toys.changed(toys.SFT, **{"processes": 1, "nodes": 2, **options})
    return Job(
        stage="train-sft", field="sft", section=section, inputs={}, out_dir=Path("never-made")
    )


def never() -> bool:
    return False


@contextmanager
def other(act):
    """Run `act(port)` as another machine in a thread; yields the errors that it raised."""
    raised, threads = [], []

    def run(port):
        try:
            act(port)
        except Exception as error:
            raised.append(error)

    @contextmanager
    def call(port):
        threads.append(threading.Thread(target=run, args=(port,)))
        threads[0].start()
        yield

    yield call, raised
    for thread in threads:
        thread.join(PATIENCE)


def gather(nodes, **options):
    with meet(toy_job(**options), nodes, never):
        pass


def test_a_machine_that_never_comes_is_named():
    started = time.monotonic()
    with pytest.raises(
        WorkerDied, match=r"^train-sft: node 2 of 2 did not come within 0.3 s; start `rlhf n"
    ):
        gather(Nodes(wait=0.3))
    assert time.monotonic() - started < PATIENCE


def test_sigterm_ends_the_wait():
    with (
        pytest.raises(Interrupted, match="SIGTERM before the training began"),
        meet(toy_job(), Nodes(), lambda: True),
    ):
        pass


def test_another_version_is_refused_on_both_machines():
    def act(port):
        with closing(join("127.0.0.1", port, 1, {"rlhf": "2"}, 60, never)) as one:
            one.learn("job", never)

    with (
        other(act) as (call, raised),
        pytest.raises(ConfigError, match=r"node 2 of 2 .* has rlhf 2"),
    ):
        gather(Nodes(call=call, versions={"rlhf": "1"}))
    assert [type(error) for error in raised] == [ConfigError]
    assert "has rlhf 2, and this machine 1" in str(raised[0])


@pytest.mark.parametrize(
    ("error", "caught"),
    # For want of data a judge is done without, which another machine must not decide.
    [(StoreError, StoreError), (DataError, WorkerDied)],
)
def test_what_a_machine_lacks_is_its_error(error, caught):
    def act(port):
        with closing(join("127.0.0.1", port, 1, {}, 60, never)) as one:
            one.learn("job", never)
            one.fail(error("no such bucket"))

    with (
        other(act) as (call, raised),
        pytest.raises(caught, match=r"^node 2 of 2 .*: no such b") as found,
    ):
        gather(Nodes(call=call))
    assert type(found.value) is caught
    assert raised == []


def is_closed(connection):
    """Return whether the other end closes a connection in time, whatever it says before."""
    end = time.monotonic() + PATIENCE
    with suppress(ConnectionError):
        while time.monotonic() < end:
            if not connection.recv(100):
                return True
        return False
    return True


def test_strangers_and_doubles_do_not_take_part():
    """A port scan, another protocol, a number twice, and one out of range."""
    said = []

    def act(port):
        for text in (
            b"",
            b"GET / HTTP/1.1\r\n\r\n",
            b"[1]\n",
            b'{"node": "1"}\n',
            b'{"node": 7}\n',
            b'{"node": [1]}\n',
            b'{"node": 1}\n',
            b'{"node": 1, "versions": {"rlhf": "0"}}\n',
            b"[" * 50_000 + b"\n",
        ):
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.sendall(text)
                stranger.shutdown(socket.SHUT_WR)
                with suppress(OSError):  # closed at once
                    while stranger.recv(100):
                        pass
        with socket.create_connection(("127.0.0.1", port)) as stranger:
            with suppress(OSError):
                stranger.sendall(b"x" * 2**20)  # much, and no line
            assert is_closed(stranger)
        idle = [socket.create_connection(("127.0.0.1", port)) for _ in range(80)]
        assert is_closed(idle[0])
        for _ in range(20):  # a probe that resets the connection, mostly before it is accepted
            with socket.create_connection(("127.0.0.1", port)) as stranger:
                stranger.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        first = join("127.0.0.1", port, 1, {}, 60, never)
        if (sent := first.learn("job", never))["job"]:
            said.append(sent["context"])
        first.start(never)
        assert first.place
        assert (first.place.node, first.place.nodes) == (1, 2)
        first.close()
        for one in idle:
            one.close()

    with (
        other(act) as (call, raised),
        meet(toy_job(), Nodes(call=call, context={"a": 1}), never) as m,
    ):
        assert m.place
        assert m.place.port
        while not m.is_broken():  # it goes away without a report
            time.sleep(0.01)
        assert m.lost == "train-sft: node 2 of 2 (127.0.0.1) was lost: it closed the connection; " \
            "the others were ended"  # fmt: skip
    assert (raised, said) == ([], [{"a": 1}])


def test_a_number_twice_is_refused():
    said = []

    def act(port):
        connections = [socket.create_connection(("127.0.0.1", port)) for _ in range(2)]
        channels = [Channel(connection) for connection in connections]
        for channel in channels:
            channel.send(node=1, versions={})
        while not said:
            said.extend(filter(None, (channel.receive(0.02) for channel in channels)))
        for channel in channels:
            channel.close(linger=0)

    job = toy_job(nodes=3, batch_size=24)
    with (
        other(act) as (call, raised),
        pytest.raises(Interrupted),
        meet(job, Nodes(call=call), lambda: bool(said)),
    ):
        pass
    assert raised == []
    assert said == [{"refused": "PET_NODE_RANK = 1 is here already; number the machines from 0"}]


def test_a_silent_machine_is_lost():
    one = socket.create_server(("127.0.0.1", 0))
    ends = socket.create_connection(one.getsockname()), one.accept()[0]
    channel = Channel(ends[0], silence=0.3)
    end = time.monotonic() + PATIENCE
    while channel.lost is None and time.monotonic() < end:
        time.sleep(0.02)
    assert channel.lost
    assert channel.lost.startswith("no sign of life for ")
    channel.close()
    for each in (ends[1], one):
        each.close()


def test_the_first_machine_may_be_away():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(
        WorkerDied, match=rf"node 1 at 127.0.0.1:{port} did not answer within 0.1 s"
    ):
        join("127.0.0.1", port, 1, {}, 0.1, never)


# --- environment ----------------------------------------------------------------------------------


@pytest.fixture
def told(monkeypatch):
    def tell(**variables):
        for name in [name for name in os.environ if name.startswith("PET_")]:
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(f"PET_{name}", value)

    tell()
    return tell


def test_torchruns_variables(told):
    assert torchrun_environment() is None
    told(NNODES="2", NODE_RANK="1", MASTER_ADDR="pod-0.svc", MASTER_PORT="29400")
    found = torchrun_environment()
    assert found
    assert (found.nodes, found.node, found.host, found.port) == (2, 1, "pod-0.svc", 29400)
    told(NNODES="3:3", RDZV_ENDPOINT="[::1]:7")
    found = torchrun_environment()
    assert found
    assert (found.nodes, found.node, found.host, found.port) == (3, 0, "::1", 7)


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"NNODES": "1:2", "MASTER_ADDR": "a"}, "PET_NNODES = '1:2'"),
        ({"NNODES": "two", "MASTER_ADDR": "a"}, "PET_NNODES = 'two'"),
        ({"NNODES": "2", "NODE_RANK": "-1", "MASTER_ADDR": "a"}, "PET_NODE_RANK = '-1'"),
        ({"NNODES": "2", "NODE_RANK": "2", "MASTER_ADDR": "a"}, "PET_NODE_RANK = 2, but PET_NN"),
        ({"NNODES": "2"}, "PET_NNODES = '2', but PET_MASTER_ADDR is not set"),
        ({"NNODES": "2", "MASTER_ADDR": "a", "MASTER_PORT": "x"}, "PET_MASTER_PORT = 'x'"),
        ({"NNODES": "2", "RDZV_ENDPOINT": "a:99999"}, "PET_RDZV_ENDPOINT = 'a:99999'"),
    ],
)  # fmt: skip
def test_variables_without_a_meaning_are_refused(told, variables, message):
    told(**variables)
    with pytest.raises(ConfigError, match=f"^{message}"):
        torchrun_environment()


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({}, r"^sft.nodes = 2: nothing says how to find the other machines; set PET_NNODES"),
        ({"NNODES": "3", "MASTER_ADDR": "a"}, r"^sft.nodes = 2, but PET_NNODES = 3"),
        ({"NNODES": "2", "NODE_RANK": "1", "MASTER_ADDR": "a"}, "start `rlhf node` on it"),
    ],
)  # fmt: skip
def test_a_launch_of_several_machines_must_find_them(told, variables, message):
    told(**variables)
    with pytest.raises(ConfigError, match=message), meet(toy_job(), None, never):
        pass


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"nodes": 2}, "nodes = 2 .* set processes too"),
        ({"nodes": 0, "processes": 1}, "nodes"),
        ({"nodes": 3, "processes": 2, "batch_size": 16},
         "batch_size = 16 can't be shared evenly by processes = 2 on each of nodes = 3; make it a "
         "multiple of 6"),
        ({"nodes": 2, "processes": 2, "batch_size": 24, "micro_batch_size": 4},
         "must divide 6, the share of batch_size = 24 that each of processes = 2 on each of nodes"),
    ],
)  # fmt: skip
def test_sizes_are_shared_by_all_machines(section, message):
    with pytest.raises(ValueError, match=message):
        PipelineConfig(sft=section)


def test_a_run_must_know_its_machines_before_any_work(told, tmp_path):
    config = PipelineConfig(sft={"nodes": 2, "processes": 1})
    with pytest.raises(
        ConfigError, match=r"^sft.nodes = 2: train-sft does not know its other mach"
    ):
        check_nodes(config, STAGES)
    check_nodes(config, {PREPARE_DATA.name: PREPARE_DATA})
    without = {"nodes": 2, "processes": 1, "enabled": False}
    check_nodes(PipelineConfig(base={"path": "owner/name"}, sft=without), STAGES)
    reward_model = {"nodes": 2, "processes": 1}
    idle = {"ppo": {"reward_model_path": str(tmp_path)}, "judge": {"enabled": False}}
    check_nodes(PipelineConfig(reward_model=reward_model, **idle), STAGES)
    with pytest.raises(ConfigError, match=r"^reward_model.nodes = 2: train-judge does not know"):
        check_nodes(PipelineConfig(reward_model=reward_model, ppo=idle["ppo"]), STAGES)
    told(NNODES="2", MASTER_ADDR="10.0.0.1")
    check_nodes(config, STAGES)
    with pytest.raises(ConfigError, match=r"^reward_model.nodes = 3, but PET_NNODES = 2"):
        check_nodes(
            PipelineConfig(reward_model={"nodes": 3, "processes": 1, "batch_size": 24}), STAGES
        )


def test_another_machine_fetches_inputs_and_has_folders_of_its_own(data, tmp_path, monkeypatch):
    store = open_store(str(tmp_path / "store"), cache_dir=tmp_path / "cache")
    made = Producer(
        stage="x", code_version="1", dirty=None, config={}, lock_digest=None, seed=0, versions={}
    )
    ref = store.publish(data, "dataset", parents={}, producer=made, metrics={})
    monkeypatch.setenv("RLHF_WORK_DIR", str(tmp_path / "own"))
    config = PipelineConfig(
        store=str(tmp_path / "store"), runtime={"work_dir": "/of/the/first", "threads": 3}
    )
    sent = toy_job().model_copy(
        update={"inputs": {"data": Path("/of/the/first/x")}, "checkpoints": Path("/of/the/first/c")}
    )
    context = {
        "stage": TRAIN_SFT.name, "config": config.model_dump(mode="json"),
        "refs": {"data": ref.digest}, "digests": {},
    }  # fmt: skip
    folder = tmp_path / "folder"
    folder.mkdir()
    here = prepare_job(sent.model_dump_json(), context, folder)
    assert folder_sha256(here.inputs["data"]) == folder_sha256(data)
    assert here.out_dir.is_dir()
    assert here.checkpoints == folder / "checkpoints"
    assert "/of/the/first" not in here.model_dump_json()
    assert here.runtime.threads == int(os.environ.get("RLHF_THREADS", "3"))
    assert (
        json.loads(here.model_dump_json())["section"]
        == json.loads(sent.model_dump_json())["section"]
    )
    other_model = {**context, "digests": {"base.path": "0" * 64}}
    with pytest.raises(ConfigError, match=r"^base.path: is another model on this machine"):
        prepare_job(sent.model_dump_json(), other_model, folder)
    # What is no input was not compared, and not checked against this machine's permissions.
    for path in ("/etc", "/of/the/first/x"):
        changed = sent.model_copy(update={"base": BaseModelConfig(path=path)})
        other = tmp_path / path[1:3]
        other.mkdir()
        with pytest.raises(ConfigError, match=rf"^base.path = '{path}': the first machine names"):
            prepare_job(changed.model_dump_json(), context, other)
