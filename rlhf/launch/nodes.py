"""Several machines in one launch: how they find each other, and what becomes of one that is lost.

The first machine (node 0) has the job. It listens, and waits for the others (`Meeting`), which
connect to it (`Member`) and learn from it what to do. When all are ready, a torchrun on each
machine starts the children, by a static rendezvous. From then on a connection to each machine says
whether it lives. Nothing here decides which machines these are: whoever starts the processes does.
"""

from __future__ import annotations

import json
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rlhf.errors import ConfigError, DataError, Interrupted, WorkerDied
from rlhf.launch.channel import SILENCE, Channel
from rlhf.launch.job import (
    AGENT_LOG,
    FAILURES,
    Job,
    agent_log,
    ended_file,
    output_file,
    rebuilt_error,
    tail_of,
)
from rlhf.launch.torchrun import torchrun_environment

#: Seconds in which all machines must have come.
WAIT = 900.0
#: Seconds between two looks at the other machines.
_POLL = 0.05
#: Most connections of which none has said yet which machine it is.
_MOST_STRANGERS = 64


@dataclass(frozen=True)
class Nodes:
    """Settings of a launch on several machines: where they meet, and what the others are sent."""

    port: int = 0
    """Port to listen at; 0 is any that is free."""
    wait: float = WAIT
    """Seconds in which all must have come."""
    context: Mapping[str, Any] = field(default_factory=dict[str, Any])
    """JSON that the others get with the job, as to fetch its inputs."""
    versions: Mapping[str, str] = field(default_factory=dict[str, str])
    """Versions of code and libraries, which must be the same on all machines."""
    call: Callable[[int], AbstractContextManager[object]] = lambda _: nullcontext()
    """Starts the others' part when this machine listens at the port that it is given."""
    cure: str = "start `rlhf node` on it, with its PET_NODE_RANK"
    """What to do about a machine that does not come."""


@dataclass(frozen=True)
class Place:
    """Position of one machine in a launch, for torchrun: its number, where the first one is."""

    node: int
    nodes: int
    host: str
    port: int
    own: str
    """Address of this machine, whose interface the children use."""


def nodes_of_environment(field_name: str, count: int, **values: Any) -> Nodes | None:
    """Return how a launch of `count` machines finds them by torchrun's environment variables.

    Args:
        field_name: Name of the section in the configuration, for messages.
        count: Machines of the launch.
        values: Further fields of `Nodes`.

    Raises:
        ConfigError: They are of another launch, or this is not its first machine.
    """
    told = torchrun_environment()
    if told is None:
        return None
    if told.nodes != count:
        raise ConfigError(
            f"{field_name}.nodes = {count}, but PET_NNODES = {told.nodes}; make them the same"
        )
    if told.node:
        raise ConfigError(
            f"PET_NODE_RANK = {told.node}: this is not the first machine; start `rlhf node` on it"
        )
    return Nodes(port=told.port, **values)


class Alone:
    """A launch on one machine."""

    place: Place | None = None
    lost: str | None = None

    def is_broken(self) -> bool:
        """Return whether the launch must end because of another machine."""
        return False

    def collect(self, folder: Path, failed: bool) -> None:
        """Collect how the other machines' processes ended; there are none."""


@contextmanager
def meet(job: Job, nodes: Nodes | None, terminated: Callable[[], bool]) -> Iterator[Alone]:
    """Wait for the other machines of a job, if it has some; tell them in the end how it ended.

    Raises:
        ConfigError: Nothing says where they are, or they run other code.
        WorkerDied: One did not come in time, or was lost.
        RLHFError: One could not prepare its part; the error is its own.
    """
    count = job.section.nodes
    if count == 1:
        yield Alone()
        return
    nodes = nodes or nodes_of_environment(job.field, count)
    if nodes is None:
        raise ConfigError(
            f"{job.field}.nodes = {count}: nothing says how to find the other machines; set "
            "PET_NNODES, PET_NODE_RANK and PET_MASTER_ADDR as torchrun reads them"
        )
    try:
        server = socket.create_server(("", nodes.port))
    except OSError as error:
        raise WorkerDied(
            f"{job.stage}: can't listen at port {nodes.port} for the other machines ({error}); "
            "end what uses it"
        ) from error
    with server, nodes.call(server.getsockname()[1]):
        meeting = Meeting(job, nodes, server)
        try:
            meeting.gather(terminated)
            meeting.prepare(terminated)
            yield meeting
        except BaseException as error:
            meeting.conclude(error)
            raise
        meeting.conclude(None)


class Meeting(Alone):
    """The other machines of a launch, as the first one sees them."""

    def __init__(self, job: Job, nodes: Nodes, server: socket.socket) -> None:
        self._job, self._nodes, self._server = job, nodes, server
        self._count, self._processes = job.section.nodes, job.section.processes or 1
        self._channels: dict[int, Channel] = {}
        self._reports: dict[int, dict[str, Any]] = {}
        self.place: Place | None = None
        self.lost: str | None = None

    def gather(self, terminated: Callable[[], bool]) -> None:
        """Wait until all have connected.

        Raises:
            WorkerDied: One did not in time.
            ConfigError: One runs other code.
            Interrupted: SIGTERM arrived.
        """
        end = time.monotonic() + self._nodes.wait
        strangers: list[Channel] = []
        self._server.settimeout(2 * _POLL)
        try:
            while missing := [n for n in range(1, self._count) if n not in self._channels]:
                _stop_if(terminated, self._job.stage)
                if time.monotonic() > end:
                    raise WorkerDied(self._absent(missing[0]))
                strangers += self._connected()
                for oldest in strangers[:-_MOST_STRANGERS]:  # what never says who it is
                    strangers.remove(oldest)
                    oldest.close(linger=0)
                for stranger in [*strangers]:
                    is_lost = stranger.lost is not None
                    hello = stranger.receive(0)
                    if hello is not None or is_lost:
                        strangers.remove(stranger)
                    if hello is not None:
                        self._admit(stranger, hello)
                    elif is_lost:
                        stranger.close(linger=0)
                for node, channel in [*self._channels.items()]:
                    if channel.lost:  # it may come again
                        channel.close(linger=0)
                        del self._channels[node]
        finally:
            # Else a machine that has just come would wait for the job of a launch that ended.
            for stranger in strangers:
                stranger.close(linger=0)

    def _connected(self) -> list[Channel]:
        """Return the connection of a machine that has come, if one has within a moment."""
        with suppress(OSError):  # nobody has, or one that has gone again, such as a port's probe
            connection = self._server.accept()[0]
            try:
                return [Channel(connection, is_stranger=True)]
            except OSError:
                connection.close()
        return []

    def prepare(self, terminated: Callable[[], bool]) -> None:
        """Give the job to all, wait until they are ready for it, and have them start.

        Raises:
            WorkerDied: One was lost.
            RLHFError: One could not prepare its part.
            Interrupted: SIGTERM arrived.
        """
        for channel in self._channels.values():
            channel.send(job=self._job.model_dump_json(), context=dict(self._nodes.context))
        waiting = set(self._channels)
        while waiting:
            _stop_if(terminated, self._job.stage)
            for node in [*waiting]:
                message = self._channels[node].receive(_POLL)
                if message and "failed" in message:
                    kind, text = message["failed"]
                    error = rebuilt_error(kind, f"{self._name(node)}: {text}")
                    # For want of data a stage may do without its model: the data are this one's.
                    raise WorkerDied(str(error)) if isinstance(error, DataError) else error
                if message and "ready" in message:
                    waiting.discard(node)
                elif self._channels[node].lost:
                    raise WorkerDied(self._loss(node))
        port = _free_port()
        for channel in self._channels.values():
            channel.send(start=port, nodes=self._count)
        own = self._channels[1].own
        self.place = Place(0, self._count, own, port, own)

    def is_broken(self) -> bool:
        """Return whether a machine was lost, or its part failed."""
        for node, channel in self._channels.items():
            while message := channel.receive(0):
                if "ended" in message:
                    self._reports[node] = message["ended"]
            if channel.lost and node not in self._reports and self.lost is None:
                self.lost = self._loss(node)
        failed = any(report["status"] for report in self._reports.values())
        return self.lost is not None or failed

    def collect(self, folder: Path, failed: bool) -> None:
        """Write down how the other machines' processes ended, as those of this one are.

        Args:
            folder: Folder of the launch.
            failed: Whether this machine's part failed, so that the others must end too.
        """
        end = time.monotonic() + SILENCE
        told = False
        while True:
            broken = self.is_broken()
            if (broken or failed) and not told:
                told = True
                for channel in self._channels.values():
                    channel.send(end=True)
            waiting = [
                n for n, c in self._channels.items() if n not in self._reports and not c.lost
            ]
            if not waiting:
                break
            if time.monotonic() > end:
                self.lost = self.lost or self._loss(waiting[0], "it does not say how it ended")
                break
            time.sleep(_POLL)
        for node, report in self._reports.items():
            write_report(folder, node, report, self._processes)

    def conclude(self, error: BaseException | None) -> None:
        """Tell the others how the launch ended, and let them go."""
        outcome = None if error is None else [type(error).__name__, str(error)]
        for channel in self._channels.values():
            channel.send(outcome=outcome)
            channel.close()

    def _admit(self, channel: Channel, hello: Mapping[str, Any]) -> None:
        """Take a machine that has connected in, if it is one of the launch."""
        node: Any = hello.get("node")
        taken = self._channels
        theirs: Any = hello.get("versions")
        is_one = isinstance(node, int) and 0 < node < self._count
        refused = ""
        if not is_one or node in taken:
            what = "is here already" if is_one else f"is none of 1 to {self._count - 1}"
            refused = f"PET_NODE_RANK = {node!r:.40} {what}; number the machines from 0"
        elif not isinstance(theirs, dict) or theirs.keys() != self._nodes.versions.keys():
            # A stranger's guess must not end the launch.
            refused = "other versions are told than the first machine asks for; install the same"
        if refused:
            channel.send(refused=refused)
            channel.close(linger=1)
            return
        taken[node] = channel
        channel.is_stranger = False
        for name, version in self._nodes.versions.items():
            if (other := theirs[name]) != version:
                raise ConfigError(
                    f"{self._job.stage}: {self._name(node)} has {name} {other}, and this machine "
                    f"{version}; install the same on all"
                )

    def _name(self, node: int) -> str:
        at = f" ({self._channels[node].peer})" if node in self._channels else ""
        return f"node {node + 1} of {self._count}{at}"

    def _absent(self, node: int) -> str:
        port, host = self._server.getsockname()[1], socket.gethostname()
        return (
            f"{self._job.stage}: {self._name(node)} did not come within {self._nodes.wait:g} s; "
            f"{self._nodes.cure}, and see that it reaches port {port} of {host}"
        )

    def _loss(self, node: int, reason: str | None = None) -> str:
        return (
            f"{self._job.stage}: {self._name(node)} was lost: "
            f"{reason or self._channels[node].lost}; the others were ended"
        )


class Member(Alone):
    """The first machine of a launch, as another one sees it.

    Args:
        node: Number of this machine.
        channel: Connection to the first one.
    """

    def __init__(self, node: int, channel: Channel) -> None:
        self.node, self._channel = node, channel
        self._name = f"node 1 ({channel.peer})"
        self._ends = False
        self._outcome: dict[str, Any] | None = None
        self.place: Place | None = None
        self.lost: str | None = None

    def learn(self, key: str, terminated: Callable[[], bool]) -> dict[str, Any]:
        """Wait for a message with this key, and return it.

        Raises:
            WorkerDied: The first machine was lost.
            RLHFError: The launch failed; the error is the first machine's.
            ConfigError: It refuses this machine.
            Interrupted: SIGTERM arrived.
        """
        while True:
            _stop_if(terminated, self._name)
            message = self._channel.receive(_POLL)
            if message is None:
                if self._channel.lost:
                    raise WorkerDied(f"{self._name} was lost: {self._channel.lost}")
            elif key in message:
                return message
            elif "refused" in message:
                raise ConfigError(f"{self._name} refuses this machine: {message['refused']}")
            elif message.get("outcome"):
                raise rebuilt_error(*message["outcome"])

    def start(self, terminated: Callable[[], bool]) -> None:
        """Say that this machine is ready, and wait until all are."""
        self._channel.send(ready=True)
        message, channel = self.learn("start", terminated), self._channel
        self.place = Place(self.node, message["nodes"], channel.peer, message["start"], channel.own)

    def fail(self, error: BaseException) -> None:
        """Tell the first machine that this one can't take part."""
        self._channel.send(failed=[type(error).__name__, str(error)])

    def is_broken(self) -> bool:
        """Return whether the first machine was lost, or wants this one to end."""
        while message := self._channel.receive(0):
            self._ends |= "end" in message or "outcome" in message
            if "outcome" in message:
                self._outcome = message
        if self._channel.lost:
            self.lost = f"{self._name} was lost: {self._channel.lost}"
        return self._ends or self.lost is not None

    def conclude(self, report: Mapping[str, Any], terminated: Callable[[], bool]) -> None:
        """Say how this machine's processes ended, and wait for how the launch did.

        Raises:
            RLHFError: The launch failed; the error is the first machine's, or that it was lost.
        """
        self._channel.send(ended=dict(report))
        outcome = self._outcome or self.learn("outcome", terminated)
        if outcome["outcome"]:
            raise rebuilt_error(*outcome["outcome"])

    def close(self) -> None:
        """Close the connection."""
        self._channel.close()


def join(
    host: str, port: int, node: int, versions: Mapping[str, str], wait: float,
    terminated: Callable[[], bool],
) -> Member:  # fmt: skip
    """Connect to the first machine of a launch, which may start later than this one.

    Raises:
        WorkerDied: It does not answer in time.
        Interrupted: SIGTERM arrived.
    """
    end = time.monotonic() + wait
    while True:
        _stop_if(terminated, f"node {node + 1}")
        try:
            channel = Channel(socket.create_connection((host, port), timeout=5.0))
            break
        except OSError as error:  # also a name that has no address yet
            if time.monotonic() > end:
                raise WorkerDied(
                    f"node 1 at {host}:{port} did not answer within {wait:g} s ({error}); see "
                    "whether its stage runs, with as many nodes, and this machine reaches it"
                ) from error
            time.sleep(0.5)
    channel.send(node=node, versions=dict(versions))
    return Member(node, channel)


def report_of(folder: Path, ranks: range, status: int) -> dict[str, Any]:
    """Return how a machine's processes ended, for the first machine."""
    codes = folder / FAILURES
    ended = {rank: ended_file(folder, rank) for rank in ranks}
    return {
        "status": status,
        "codes": json.loads(codes.read_text()) if codes.exists() else {},
        "ended": {str(r): file.read_text() for r, file in ended.items() if file.exists()},
        "output": {str(rank): tail_of(output_file(folder, rank)) for rank in ranks},
        "log": tail_of(folder / AGENT_LOG),
    }


def write_report(folder: Path, node: int, report: Mapping[str, Any], processes: int) -> None:
    """Write another machine's report into the folder of a launch; see `report_of`."""
    for rank in range(node * processes, (node + 1) * processes):
        if (text := report["ended"].get(str(rank))) is not None:
            ended_file(folder, rank).write_text(text)
        output_file(folder, rank).write_text(report["output"].get(str(rank), ""))
    agent_log(folder, node).write_text(report["log"])
    codes = folder / FAILURES
    known = json.loads(codes.read_text()) if codes.exists() else {}
    codes.write_text(json.dumps({**known, **report["codes"]}))


def _stop_if(terminated: Callable[[], bool], what: str) -> None:
    if terminated():
        raise Interrupted(f"{what}: SIGTERM before the training began; run the same again")


def _free_port() -> int:
    with socket.create_server(("", 0)) as server:
        return server.getsockname()[1]
