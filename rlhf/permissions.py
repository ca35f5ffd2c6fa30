"""Permissions that the operator of this machine gives to runs: sources, services, code …

The file is read from a fixed place, because the parameters of a run, and in a pool that is not
locked its environment too, come from those who start it. What it does not list is refused. Without
the file nothing of the kind is: a user's own run may read what the user may. Only services at
addresses that are not public are refused then to a worker's run, and at link-local ones to any:
there a cloud's machines find their credentials. docs/security.md says what this is worth.
"""

from __future__ import annotations

import functools
import ipaddress
import logging
import os
import socket
import stat
import tomllib
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Annotated
from urllib.parse import urlsplit

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from rlhf.errors import ConfigError
from rlhf.files import expand_home

#: The operator's file. No variable can name another: a run's environment may be its starter's.
FILE = Path("/etc/rlhf-pipeline/permissions.toml")
#: Set by Prefect in the process of a run that a worker started.
WORKER_RUN = "PREFECT__FLOW_RUN_ID"
#: Addresses that answer with a machine's credentials and are link-local in all but their number.
METADATA = tuple(map(ipaddress.ip_address, ("168.63.129.16", "100.100.100.200", "fd00:ec2::254")))
#: Prefix of IPv6 addresses that a gateway translates to the IPv4 address in their last 32 bits.
NAT64 = ipaddress.IPv6Network("64:ff9b::/96")

log = logging.getLogger(__name__)
Address = ipaddress.IPv4Address | ipaddress.IPv6Address


def _place(value: str) -> str:
    """Check a root: an absolute folder, s3://bucket/prefix or hf://owner/name."""
    if value.startswith(("s3://", "hf://")):
        if any(part in (".", "..") for part in value.split("/")):
            raise ValueError(f"{value!r} holds . or ..; write it without")
    elif not Path(value).is_absolute():
        raise ValueError(f"{value!r} is no absolute folder, s3://bucket/prefix or hf://owner/name")
    return value


def _network(value: str) -> str:
    ipaddress.ip_network(value)
    return value


Place = Annotated[str, AfterValidator(_place)]


class Permissions(BaseModel):
    """The operator's file; a key that is left out permits nothing."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    sources: list[Place] = []
    """Roots of data and models: folders, `s3://bucket/prefix`, `hf://owner/name`."""
    stores: list[Place] = []
    """Roots of artifact stores: folders, `s3://bucket/prefix`."""
    folders: list[Place] = []
    """Roots of `runtime.work_dir`, `runtime.report_dir` and `tracking.log_dir`, where they differ
    from their defaults."""
    endpoints: list[str] = []
    """Values of `store_options.endpoint_url`."""
    profiles: list[str] = []
    """Values of `store_options.profile`."""
    reward_hosts: list[str] = []
    """Hosts of reward services, by name or address."""
    reward_networks: list[Annotated[str, AfterValidator(_network)]] = []
    """Networks that are not public where they may be, such as `10.20.0.0/16`."""
    code: list[Place] = []
    """Folders of custom code, instead of RLHF_ALLOWED_CODE."""
    tokens: list[str] = []
    """Tokens of reward services as `NAME@host`, instead of RLHF_ALLOWED_TOKENS."""


def permissions() -> Permissions | None:
    """Return what the operator's file permits; None if there is no file.

    Raises:
        ConfigError: It can't be read or is not valid, or others than its owner may write it.
    """
    try:
        with FILE.open("rb") as file:
            mode = os.fstat(file.fileno()).st_mode
            text = file.read()
    except (FileNotFoundError, NotADirectoryError):
        return None
    except OSError as error:
        raise ConfigError(f"{FILE}: can't be read ({error.strerror}); mend its rights") from None
    if mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise ConfigError(f"{FILE}: others than its owner may write it; chmod go-w")
    try:
        return Permissions.model_validate(tomllib.loads(text.decode()))
    except ValidationError as error:
        problem = error.errors(include_url=False)[0]
        where = ".".join(map(str, problem["loc"]))
        raise ConfigError(f"{FILE}: {where}: {problem['msg']}; mend it") from None
    except ValueError as error:  # no TOML, or no UTF-8
        raise ConfigError(f"{FILE}: is no TOML ({error}); mend it") from None


def check_paths(setting: str, paths: Iterable[Path], kind: str = "sources") -> None:
    """Refuse local paths outside the roots of a kind, wherever links and `..` lead.

    Args:
        setting: Field and value, for the error.
        paths: Files or folders; they need not exist.
        kind: Key of the file.

    Raises:
        ConfigError: One of them is not permitted.
    """
    permitted = permissions()
    if permitted is None:
        if kind == "sources" and os.environ.get(WORKER_RUN):
            _warn(setting)
        return
    roots = [Path(root).resolve() for root in getattr(permitted, kind) if root.startswith("/")]
    for path in paths:
        real = _real(setting, path)
        if not any(real.is_relative_to(root) for root in roots):
            raise _refused(setting, f"{str(real)!r} lies outside", kind)


def check_uri(setting: str, uri: str, kind: str = "sources") -> None:
    """Refuse an `s3://bucket/key` or `hf://owner/name` under no root of a kind.

    Raises:
        ConfigError: It is not permitted.
    """
    permitted = permissions()
    if permitted is None:
        return
    parts = uri.rstrip("/").split("/")
    roots = [root.rstrip("/").split("/") for root in getattr(permitted, kind)]
    # A server, or a gateway before it, may resolve them.
    is_plain = not {".", ".."} & {*parts}
    if not is_plain or not any(parts[: len(root)] == root for root in roots):
        raise _refused(setting, f"{uri!r} lies outside", kind)


def check_store(uri: str, folder: Path | None) -> None:
    """Refuse a store outside the roots `stores`; `folder` is that of a local one."""
    if folder is not None:
        check_paths(f"store = {uri!r}", [folder], "stores")
    else:
        check_uri(f"store = {uri!r}", uri, "stores")


def check_s3_options(endpoint: str | None, profile: str | None, ca_bundle: str | None) -> None:
    """Refuse S3 options of a run that would send the operator's requests or keys elsewhere."""
    permitted = permissions()
    if permitted is None:
        return
    if endpoint is not None and endpoint not in permitted.endpoints:
        raise _refused(f"store_options.endpoint_url = {endpoint!r}", "it is not among", "endpoints")
    if profile is not None and profile not in permitted.profiles:
        raise _refused(f"store_options.profile = {profile!r}", "it is not among", "profiles")
    if ca_bundle is not None:
        check_paths(f"store_options.ca_bundle = {ca_bundle!r}", [Path(ca_bundle)])


def allowed_code(variable: str) -> tuple[list[str], str]:
    """Return the folders that custom code may run from, and where they are listed."""
    permitted = permissions()
    if permitted is not None:
        return permitted.code, f"code in {FILE}"
    listed = [folder for folder in os.environ.get(variable, "").split(os.pathsep) if folder]
    return listed, variable


def allowed_tokens(variable: str) -> tuple[list[str], str]:
    """Return the tokens that may be sent, as NAME@host, and where they are listed."""
    permitted = permissions()
    if permitted is not None:
        return permitted.tokens, f"tokens in {FILE}"
    listed = [entry.strip() for entry in os.environ.get(variable, "").split(",")]
    return listed, variable


def check_host(setting: str, url: str) -> None:
    """Refuse the host of a reward service that is not listed, without asking for its address.

    Raises:
        ConfigError: It is not permitted.
    """
    permitted = permissions()
    host = _host(url)
    if permitted is None or host in [_host(f"//{listed}") for listed in permitted.reward_hosts]:
        return
    address = _literal(host)
    if address is None or not _is_in(address, permitted.reward_networks):
        raise _refused(setting, f"host {host!r} is not among", "reward_hosts")


def check_addresses(setting: str, url: str, addresses: Sequence[str]) -> None:
    """Refuse addresses of a reward service's host that are not public, unless they are listed.

    Args:
        setting: Field and value, for the error.
        url: The service.
        addresses: What its host resolves to; requests must go to these.

    Raises:
        ConfigError: One of them is not permitted.
    """
    permitted = permissions()
    for text in addresses:
        address = ipaddress.ip_address(text.partition("%")[0])
        kind = _kind(address)
        if permitted is not None:
            listed = [_literal(_host(f"//{host}")) for host in permitted.reward_hosts]
            is_permitted = address in listed or _is_in(address, permitted.reward_networks)
        else:
            is_permitted = kind != "link-local" and not os.environ.get(WORKER_RUN)
        if kind != "public" and not is_permitted:
            raise _refused(
                setting, f"host {_host(url)!r} is at {address}, a {kind} address not in",
                "reward_networks",
            )  # fmt: skip


def resolve(url: str) -> list[str]:
    """Return the addresses of a URL's host, in the order in which to try them.

    Raises:
        OSError: It has none.
    """
    parts = urlsplit(url)
    port = parts.port or (443 if parts.scheme == "https" else 80)
    found = socket.getaddrinfo(_host(url), port, type=socket.SOCK_STREAM)
    return list(dict.fromkeys(str(address[0]) for *_, address in found))


@functools.cache
def _warn(setting: str) -> None:
    """Log once that a worker reads what somebody else may have chosen, with its own rights."""
    log.warning(
        "%s is read with the rights of this worker, which no %s limits (docs/security.md)",
        setting, FILE,
    )  # fmt: skip


def _refused(setting: str, reason: str, key: str) -> ConfigError:
    return ConfigError(
        f"{setting}: {reason} `{key}` of {FILE}; only the operator of this machine can permit it "
        "there"
    )


def _real(setting: str, path: Path) -> Path:
    try:
        return expand_home(path).resolve()
    except (OSError, RuntimeError, ValueError) as error:  # a circle of links, a null in the name
        raise ConfigError(f"{setting}: can't be resolved ({error}); correct the path") from None


def _host(url: str) -> str:
    """Return the host of a URL in small letters, without the last dot."""
    return (urlsplit(url).hostname or "").rstrip(".")


def _literal(host: str) -> Address | None:
    try:
        return ipaddress.ip_address(host.partition("%")[0])
    except ValueError:
        return None


def _is_in(address: Address, networks: Iterable[str]) -> bool:
    return any(address in ipaddress.ip_network(network) for network in networks)


def _kind(address: Address) -> str:
    """Return "public", "link-local" or "private", for an address inside an address the worst."""
    inner: list[Address] = []
    if isinstance(address, ipaddress.IPv6Address):
        teredo = address.teredo or ()
        translated = ipaddress.IPv4Address(int(address) & 0xFFFFFFFF) if address in NAT64 else None
        embedded = (address.ipv4_mapped, address.sixtofour, translated, *teredo)
        inner = [each for each in embedded if each is not None]
    if inner:
        kinds = {_kind(each) for each in inner}
        return next(kind for kind in ("link-local", "private", "public") if kind in kinds)
    if address.is_link_local or address in METADATA:
        return "link-local"
    is_public = address.is_global and not (
        address.is_multicast or address.is_reserved or address.is_unspecified
    )
    return "public" if is_public else "private"
