"""torchrun's environment variables: which machine of a launch this is, and where the first one is.

Kubeflow's TrainJob sets them in every pod. A person may set them too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from rlhf.errors import ConfigError

#: torchrun's port where its environment names none.
_PORT = 29500


@dataclass(frozen=True)
class Torchrun:
    """Values of torchrun's environment variables, as Kubeflow's TrainJob sets them."""

    nodes: int
    node: int
    host: str
    port: int


def torchrun_environment() -> Torchrun | None:
    """Return what torchrun's environment variables say of this machine; None without them.

    Raises:
        ConfigError: One has no meaning here.
    """
    count = os.environ.get("PET_NNODES")
    if not count:
        return None
    least, _, most = count.partition(":")
    if most not in ("", least):
        raise ConfigError(f"PET_NNODES = {count!r}: a stage's machines are a fixed number; set one")
    host = os.environ.get("PET_MASTER_ADDR", "")
    port = os.environ.get("PET_MASTER_PORT", str(_PORT))
    name = "PET_MASTER_PORT"
    if endpoint := os.environ.get("PET_RDZV_ENDPOINT"):
        host, port = endpoint_of("PET_RDZV_ENDPOINT", endpoint)
        name = "PET_RDZV_ENDPOINT"
    nodes, node = (
        _number("PET_NNODES", least),
        _number("PET_NODE_RANK", os.environ.get("PET_NODE_RANK", "0")),
    )
    if not host:
        raise ConfigError(
            f"PET_NNODES = {count!r}, but PET_MASTER_ADDR is not set; name the first machine in it"
        )
    if node >= nodes:
        raise ConfigError(f"PET_NODE_RANK = {node}, but PET_NNODES = {nodes}; count from 0")
    return Torchrun(nodes, node, host, _number(name, str(port)))


def endpoint_of(name: str, text: str) -> tuple[str, int]:
    """Return host and port of `host:port`; `name` says in errors where it stands.

    Raises:
        ConfigError: It is something else.
    """
    host, colon, port = text.rpartition(":")
    if not colon:
        host, port = text, str(_PORT)
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ConfigError(f"{name} = {text!r} is no host:port; write such as 10.0.0.7:29500")
    return host.strip("[]"), int(port)


def _number(name: str, text: str) -> int:
    if not text.isdecimal() or len(text) > 5:
        raise ConfigError(f"{name} = {text!r} is no number of such a kind; write a whole number")
    return int(text)
