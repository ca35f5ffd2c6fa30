"""What the operator's file permits: places, services, code; docs/security.md lists its keys."""

from __future__ import annotations

import contextlib
import ipaddress
import json
import os
import re
import socket
import ssl
import subprocess
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rlhf import permissions
from rlhf.config import PipelineConfig, RemoteComponent
from rlhf.config.load import load_preset
from rlhf.custom_code import CustomCode
from rlhf.environments import Reply
from rlhf.environments.remote import RemoteReward, check_service
from rlhf.errors import ConfigError, TrainingError
from rlhf.permissions import WORKER_RUN, Permissions, check_addresses
from rlhf.store import open_store
from tasks.preflight import preflight

ROW = {"prompt": "p", "chosen": "yes", "rejected": "no"}


@pytest.fixture
def permit(tmp_path, monkeypatch):
    """Function that writes the operator's file."""
    file = tmp_path / "operator" / "permissions.toml"
    file.parent.mkdir()
    monkeypatch.setattr(permissions, "FILE", file)

    def write(text="", **keys):
        lines = [f"{key} = {json.dumps(value)}" for key, value in keys.items()]
        file.write_text(text or "\n".join(lines))
        file.chmod(0o644)
        return file

    return write


@pytest.fixture
def site(tmp_path, permit):
    """Folders `in`, which is permitted, and `out`, with the same files; a base configuration."""
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
        (tmp_path / name / "options.yaml").write_text("components: {length: {points: [[0, 0]]}}\n")
        (tmp_path / name / "config.json").write_text('{"model_type": "llama"}')
        (tmp_path / name / "model.safetensors").write_bytes(b"")
    own = str(tmp_path / "own")
    permit(sources=[str(tmp_path / "in")], stores=[own], folders=[own])
    return {
        "store": f"{own}/store", "data": {"source": str(tmp_path / "in" / "rows.jsonl")},
        "runtime": {"work_dir": f"{own}/work", "report_dir": f"{own}/reports"},
        "tracking": {"log_dir": f"{own}/logs"},
    }  # fmt: skip


def refusal(tree, **changes) -> str:
    """The error of the checks before any work, of a configuration with changes, `__` for a dot."""
    tree = json.loads(json.dumps(tree))
    for key, value in changes.items():
        *path, last = key.split("__")
        node = tree
        for part in path:
            node = node.setdefault(part, {})
        node[last] = value
    with pytest.raises(ConfigError) as caught:
        preflight(load_preset(None, tree).config)
    assert "\n" not in str(caught.value)
    return str(caught.value)


COMPARISON = {"ppo__env_type": "preference_comparison", "ppo__env_config__judge": "pair_model"}
#: Every setting that names a place of the worker or of a network: a value outside, where {} is the
#: folder outside, what else it needs, and the key that would permit it.
PLACES = {
    "data.source": ("{}/rows.jsonl", {}, "sources"),
    "data.source[].source": ([{"source": "{}/rows.jsonl"}], {}, "sources"),
    "data.eval_source": ("{}/rows.jsonl", {}, "sources"),
    "data.sft_source": ("{}/rows.jsonl", {}, "sources"),
    "data.sft_source[].source": ([{"source": "{}/rows.jsonl"}], {}, "sources"),
    "data.prompts_source": ("{}/rows.jsonl", {}, "sources"),
    "data.prompts_source[].source": ([{"source": "{}/rows.jsonl"}], {}, "sources"),
    "base.path": ("{}", {}, "sources"),
    "reward_model.base": ("{}", {}, "sources"),
    "judge.base": ("{}", {}, "sources"),
    "ppo.reward_model_path": ("{}", {}, "sources"),
    "ppo.env_config": ("{}/options.yaml", {"ppo__env_type": "multi_objective"}, "sources"),
    "ppo.reward_weights": ("{}/options.yaml", {"ppo__env_type": "multi_objective"}, "sources"),
    "ppo.env_config.pair_model": ("{}", COMPARISON, "sources"),
    "store": ("{}/store", {}, "stores"),
    "runtime.work_dir": ("{}/work", {}, "folders"),
    "runtime.report_dir": ("{}/reports", {}, "folders"),
    "tracking.log_dir": ("{}/logs", {}, "folders"),
    "store_options.endpoint_url": ("http://169.254.169.254", {"data__source": "s3://b/k"}, "s3"),
    "store_options.profile": ("admin", {"data__source": "s3://b/k"}, "s3"),
    "store_options.ca_bundle": ("{}/rows.jsonl", {"data__source": "s3://b/k"}, "s3"),
}
#: Settings of code and services, which have tests of their own below.
OWN = ("function", "url", "token_env")
#: Last parts of the settings that name no place.
NAMES = (
    "currency",
    *("name", "project", "revision", "region", "sse_kms_key_id", "delimiter", "encoding"),
    *("hub_split", "first", "second", "tie", "metric", "min", "max", "pattern", "target_modules"),
    *("keys", "words", "stop_sequences", "metadata_columns", "ignore_columns", "text_columns"),
    *(f"{name}_column" for name in ("chosen", "rejected", "prompt", "reference", "label")),
    *("margin_column", "system_column"),
)


def strings(schema, definitions, path=""):
    """The paths of all fields that may hold any text."""
    if "$ref" in schema:
        schema = definitions[schema["$ref"].rpartition("/")[2]]
    for key in ("anyOf", "oneOf", "allOf"):
        for part in schema.get(key, ()):
            yield from strings(part, definitions, path)
    if schema.get("type") == "string" and not {"enum", "const"} & {*schema}:
        yield path
    for name, part in schema.get("properties", {}).items():
        yield from strings(part, definitions, f"{path}.{name}".lstrip("."))
    for part in (schema.get("items"), *schema.get("prefixItems", ())):
        if isinstance(part, dict):
            yield from strings(part, definitions, f"{path}[]")
    if isinstance(schema.get("additionalProperties"), dict):
        yield from strings(schema["additionalProperties"], definitions, f"{path}.*")


def test_every_text_field_is_a_place_that_is_checked_or_a_name():
    schema = PipelineConfig.model_json_schema()
    unknown = [
        path
        for path in strings(schema, schema["$defs"])
        if path not in PLACES
        and not path.startswith("placement.")
        and path.removesuffix("[]").rpartition(".")[2] not in (*NAMES, *OWN)
    ]
    assert unknown == []


@pytest.mark.parametrize("field", PLACES)
def test_a_place_outside_is_refused_before_any_work(site, tmp_path, permit, field):
    value, more, key = PLACES[field]
    if key == "s3":
        permit(sources=["s3://b"], stores=[str(tmp_path)], folders=[str(tmp_path)])
        key = {"ca_bundle": "sources", "profile": "profiles", "endpoint_url": "endpoints"}[
            field.rpartition(".")[2]
        ]
    setting = field.partition("[]")[0]
    text = json.dumps(value).replace("{}", str(tmp_path / "out"))
    said = refusal(site, **more, **{setting.replace(".", "__"): json.loads(text)})
    assert f"`{key}` of {permissions.FILE}" in said
    assert setting.rpartition(".")[2] in said
    assert not (tmp_path / "out" / "store").exists()


def test_places_inside_are_read(site):
    preflight(load_preset(None, site).config)


@pytest.mark.parametrize(
    "escape",
    [
        "{in}/link.jsonl", "{in}/folder/rows.jsonl", "{in}/../out/rows.jsonl",
        "{in}-more/rows.jsonl", "/nowhere.jsonl",
        "file://{out}/rows.jsonl", "file://{in}/%2e%2e/out/rows.jsonl",
        "/proc/self/root{out}/rows.jsonl", "{in}/through/out/rows.jsonl", "~root/rows.jsonl",
        "{in}/mixed", "{in}/twice", "{in}/gone.jsonl", "../out/rows.jsonl", "/dev/stdin",
    ],
)  # fmt: skip
def test_no_way_leads_out(site, tmp_path, monkeypatch, escape):
    inside, outside = tmp_path / "in", tmp_path / "out"
    (inside / "link.jsonl").symlink_to(outside / "rows.jsonl")
    (inside / "folder").symlink_to(outside)
    (inside / "through").symlink_to(tmp_path)
    (inside / "twice").symlink_to(inside / "folder")
    (inside / "gone.jsonl").symlink_to("/nowhere.jsonl")
    (tmp_path / "in-more").symlink_to(outside)
    (inside / "mixed").mkdir()
    (inside / "mixed" / "a.jsonl").write_text(json.dumps(ROW))
    (inside / "mixed" / "b.jsonl").symlink_to(outside / "rows.jsonl")
    monkeypatch.chdir(inside)
    source = escape.replace("{in}", str(inside)).replace("{out}", str(outside))
    said = refusal(site, data__source=source)
    assert "data.source" in said
    assert "`sources` of" in said


def test_links_inside_and_a_root_that_is_a_link_are_permitted(site, tmp_path, permit):
    (tmp_path / "in" / "alias.jsonl").symlink_to("rows.jsonl")
    (tmp_path / "alias").symlink_to(tmp_path / "in")
    own = str(tmp_path / "own")
    permit(sources=[str(tmp_path / "alias")], stores=[own], folders=[own])
    site["data"]["source"] = str(tmp_path / "in" / "alias.jsonl")
    preflight(load_preset(None, site).config)


@pytest.mark.parametrize("name", ["tokenizer.model", "templates/a.jinja", "templates/deep/a"])
def test_a_models_links_may_not_lead_out(site, tmp_path, name):
    link = tmp_path / "in" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    link.symlink_to("/etc/hostname")
    assert "/etc/hostname" in refusal(site, base__path=str(tmp_path / "in"))


def test_a_models_folders_may_not_be_links_that_lead_out(site, tmp_path):
    (tmp_path / "in" / "additional_chat_templates").symlink_to("/etc")
    assert "'/etc' lies outside" in refusal(site, base__path=str(tmp_path / "in"))


@pytest.mark.parametrize(
    ("uri", "is_permitted"),
    [
        ("s3://team/prefs/a.jsonl", True), ("s3://team/prefs", True), ("s3://team/prefs/", True),
        ("s3://team/prefs-secret/a", False), ("s3://team", False), ("s3://other/prefs", False),
        ("s3://team/prefs/../secret", False), ("s3://team/prefs/./a", False),
        ("s3://TEAM/prefs", False), ("hf://org/name", True), ("hf://org/names", False),
        ("hf://org", False), ("hf://friends/any", True), ("hf://friend/any", False),
    ],
)  # fmt: skip
def test_buckets_and_the_hub(permit, uri, is_permitted):
    permit(sources=["s3://team/prefs", "hf://org/name", "hf://friends"])
    if is_permitted:
        permissions.check_uri("x", uri)
        return
    with pytest.raises(ConfigError, match="`sources` of"):
        permissions.check_uri("x", uri)


@pytest.mark.parametrize("field", ["data__source", "base__path"])
def test_what_the_hub_and_a_bucket_are_not_asked_for(site, field):
    for uri in ("org/name@main", "s3://bucket/key"):
        assert "`sources` of" in refusal(site, **{field: uri})


def test_an_artifact_is_of_a_permitted_store(site, tmp_path):
    said = refusal(site, base__path=f"artifact:file://{tmp_path}/out/manifests/{'a' * 64}.json")
    assert "is no place of a model" in said
    with pytest.raises(ConfigError, match="`stores` of"):
        open_store(f"file://{tmp_path}/own/../out", cache_dir=tmp_path)


def test_the_machines_own_folders_need_no_permission(site, tmp_path, monkeypatch):
    site["runtime"]["work_dir"] = "/elsewhere"
    monkeypatch.setenv("RLHF_WORK_DIR", str(tmp_path / "scratch"))
    preflight(load_preset(None, site).config)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("sources = ", "is no TOML"), ("source = []", "source: Extra inputs"),
        ('sources = ["data"]', "'data' is no absolute folder"), ("sources = 1", "sources: Input"),
        ('sources = ["s3://b/../c"]', "holds . or .."),
        ('reward_networks = ["10.1.0.1/8"]', "host"),
    ],
)  # fmt: skip
def test_a_broken_file_permits_nothing(permit, tmp_path, text, reason):
    permit(text)
    with pytest.raises(ConfigError) as caught:
        open_store(str(tmp_path / "store"), cache_dir=tmp_path)
    assert f"{permissions.FILE}: " in str(caught.value)
    assert reason in str(caught.value)


def test_a_file_that_others_may_write_permits_nothing(permit, tmp_path):
    permit(stores=[str(tmp_path)]).chmod(0o664)
    with pytest.raises(ConfigError, match="chmod go-w"):
        open_store(str(tmp_path / "store"), cache_dir=tmp_path)


def test_no_variable_replaces_the_file(permit, tmp_path, monkeypatch):
    """The environment of a run may be its starter's."""
    (tmp_path / "mine.py").write_text("def reward(batch): return [0.0 for _ in batch]\n")
    monkeypatch.setenv("RLHF_ALLOWED_CODE", str(tmp_path))
    monkeypatch.setenv("RLHF_ALLOWED_TOKENS", "KEY@scores.example")
    monkeypatch.setenv("KEY", "secret")
    function = f"{tmp_path}/mine.py:reward"
    service = RemoteComponent(url="https://scores.example/", token_env="KEY")
    CustomCode(function, "ppo.custom")
    permit(reward_hosts=["scores.example"])
    with pytest.raises(ConfigError, match="list its folder in code in"):
        CustomCode(function, "ppo.custom")
    with pytest.raises(ConfigError, match=r"KEY@scores\.example among tokens in"):
        RemoteReward(service, "x")
    permit(
        reward_hosts=["scores.example"], code=[str(tmp_path)], tokens=["KEY@scores.example"]
    )  # fmt: skip
    CustomCode(function, "ppo.custom")
    assert RemoteReward(service, "x").headers == {"Authorization": "Bearer secret"}


# Reward services.


@given(st.ip_addresses())
def test_only_addresses_that_all_the_world_reaches_are_public(address):
    if permissions._kind(address) == "public":
        assert address.is_global
        assert not address.is_multicast


@given(st.ip_addresses(v=4, network="10.0.0.0/8") | st.ip_addresses(v=4, network="169.254.0.0/16"))
def test_an_address_inside_another_counts(inner):
    number = int(inner)
    for text in (
        f"::ffff:{inner}",
        str(ipaddress.IPv6Address((0x2002 << 112) | (number << 80))),
        str(ipaddress.IPv6Address((0x64FF9B << 96) | number)),
    ):
        assert permissions._kind(ipaddress.ip_address(text)) == permissions._kind(inner)


@pytest.mark.parametrize(
    ("address", "kind"),
    [
        ("169.254.169.254", "link-local"), ("fe80::1%eth0", "link-local"),
        ("fd00:ec2::254", "link-local"), ("168.63.129.16", "link-local"),
        ("::ffff:169.254.169.254", "link-local"), ("64:ff9b::a9fe:a9fe", "link-local"),
        ("127.0.0.1", "private"), ("::1", "private"), ("0.0.0.0", "private"), ("::", "private"),
        ("10.0.0.1", "private"), ("192.168.1.1", "private"), ("172.16.0.1", "private"),
        ("100.64.0.1", "private"), ("fc00::1", "private"), ("224.0.0.1", "private"),
        ("240.0.0.1", "private"), ("255.255.255.255", "private"), ("8.8.8.8", "public"),
        ("2606:4700::1111", "public"),
    ],
)  # fmt: skip
def test_where_a_service_may_be(permit, monkeypatch, address, kind):
    def allowed() -> bool:
        try:
            check_addresses("x", "http://scores.example/", [address])
        except ConfigError:
            return False
        return True

    assert allowed() == (kind != "link-local")  # a user's own run
    monkeypatch.setenv(WORKER_RUN, "an id")
    assert allowed() == (kind == "public")
    permit(reward_hosts=["scores.example"])
    assert allowed() == (kind == "public")
    permit(reward_networks=[str(ipaddress.ip_network(address.partition("%")[0]))])
    assert allowed()


@pytest.mark.parametrize(
    ("url", "is_listed"),
    [
        ("https://scores.example/v1", True), ("https://SCORES.example./v1", True),
        ("https://scores.example.evil.example/", False),
        ("https://evil.example/scores.example", False),
        ("http://127.0.0.1:80/", False), ("http://10.20.0.7/", True), ("http://10.21.0.7/", False),
        ("http://[::1]/", True), ("http://0x7f.1/", False), ("http://2130706433/", False),
    ],
)  # fmt: skip
def test_which_hosts_a_run_may_name(permit, url, is_listed):
    permit(reward_hosts=["scores.example", "[::1]"], reward_networks=["10.20.0.0/16"])
    if is_listed:
        permissions.check_host("x", url)
        return
    with pytest.raises(ConfigError, match="`reward_hosts` of"):
        permissions.check_host("x", url)


@pytest.mark.parametrize("url", ["http://0x7f.1:9/", "http://2130706433:9/", "http://localhost:9/"])
def test_a_name_of_loopback_is_seen_through_before_any_work(monkeypatch, url):
    monkeypatch.setenv(WORKER_RUN, "an id")
    with pytest.raises(ConfigError, match=r"is at .*, a private address not in `reward_networks`"):
        check_service(RemoteComponent(url=url), "x")


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        count = len(json.loads(self.rfile.read(int(self.headers["Content-Length"])))["replies"])
        self.server.hosts.append(self.headers["Host"])
        body = json.dumps({"scores": [1.0] * count}).encode()
        self.send_response(self.server.status)
        self.send_header("Location", "http://169.254.169.254/latest/meta-data/")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_):
        pass


@pytest.fixture
def service():
    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.hosts, server.status = [], 200
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def names(monkeypatch):
    """Addresses of scores.example, one list for each time that it is looked up."""
    answers: list[list[str]] = []
    real = permissions.socket.getaddrinfo

    def lookup(host, *arguments, **named):
        if host != "scores.example":
            return real(host, *arguments, **named)
        return [entry for a in answers.pop(0) for entry in real(a, *arguments, **named)]

    monkeypatch.setattr(permissions.socket, "getaddrinfo", lookup)
    return answers


REPLY = Reply("tea?", "good", 2, True)


def scores(server, scheme="http", **options):
    url = f"{scheme}://scores.example:{server.server_port}/"
    return RemoteReward(RemoteComponent(url=url, retries=0, **options), "helpful")


def test_the_address_that_was_checked_is_the_one_that_is_asked(service, names, permit):
    """A name that points elsewhere at the next look leads nowhere."""
    permit(reward_hosts=["scores.example"], reward_networks=["127.0.0.1/32"])
    reward = scores(service)
    names += [["127.0.0.1"], ["127.0.0.2"], ["127.0.0.1", "169.254.169.254"]]
    assert reward([REPLY]) == [1.0]
    assert service.hosts == [f"scores.example:{service.server_port}"]
    for address in ("127.0.0.2", "169.254.169.254"):
        with pytest.raises(ConfigError, match=f"is at {address}, a"):
            reward([REPLY])
    assert len(service.hosts) == 1


def test_a_host_with_several_addresses(service, names, permit):
    permit(reward_hosts=["scores.example"], reward_networks=["127.0.0.0/8"])
    names.append(["127.0.0.9", "127.0.0.1"])  # nothing listens at the first
    assert scores(service)([REPLY]) == [1.0]


def test_an_address_that_does_not_answer_leaves_time_for_the_next(service, names, permit):
    permit(reward_hosts=["scores.example"], reward_networks=["127.0.0.0/8"])
    names.append(["127.0.0.9", "127.0.0.1"])
    silent = ("127.0.0.9", service.server_port)
    with contextlib.ExitStack() as stack:
        listener = stack.enter_context(socket.socket())
        listener.bind(silent)
        listener.listen(0)
        for _ in range(4):  # its queue is full, so that it drops further connections
            filler = stack.enter_context(socket.socket())
            filler.setblocking(False)
            filler.connect_ex(silent)
        assert scores(service, timeout_seconds=2)([REPLY]) == [1.0]


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_a_redirect_is_not_followed(service, names, permit, status):
    permit(reward_hosts=["scores.example"], reward_networks=["127.0.0.1/32"])
    names.append(["127.0.0.1"])
    service.status = status
    with pytest.raises(TrainingError, match=f"it answered {status}"):
        scores(service)([REPLY])


@pytest.mark.parametrize("certified", ["scores.example", "other.example"])
def test_the_certificate_is_checked_for_the_name(
    service, names, permit, tmp_path, monkeypatch, certified
):
    permit(reward_hosts=["scores.example"], reward_networks=["127.0.0.1/32"])
    key, certificate = tmp_path / "key.pem", tmp_path / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj",
         f"/CN={certified}", "-addext", f"subjectAltName=DNS:{certified}", "-keyout", str(key),
         "-out", str(certificate)],
        check=True, capture_output=True,
    )  # fmt: skip
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    service.socket = context.wrap_socket(service.socket, server_side=True)
    monkeypatch.setenv("SSL_CERT_FILE", str(certificate))
    names.append(["127.0.0.1"])
    reward = scores(service, "https", fallback=0.5)
    assert reward([REPLY]) == [1.0 if certified == "scores.example" else 0.5]


def test_a_workers_run_without_a_file(service, monkeypatch, tmp_path, caplog):
    """Its services must be public; that it reads any file is said, once for each setting."""
    url = f"http://127.0.0.1:{service.server_port}/"
    assert RemoteReward(RemoteComponent(url=url), "x")([REPLY]) == [1.0]
    monkeypatch.setenv(WORKER_RUN, "an id")
    with pytest.raises(ConfigError, match=r"127\.0\.0\.1, a private address not in `reward_netw"):
        RemoteReward(RemoteComponent(url=url), "x")([REPLY])
    for _ in range(2):
        permissions.check_paths("data.source = 'x'", [tmp_path])
    assert caplog.text.count("data.source = 'x' is read with the rights of this worker") == 1


def test_the_document_names_every_key():
    text = (Path(__file__).parents[2] / "docs" / "security.md").read_text()
    block = re.search(r"```toml\n(.*?)```", text, re.DOTALL)
    assert block is not None
    keys = re.findall(r"^(\w+) =", block[1], re.MULTILINE)
    assert keys == list(Permissions.model_fields)
    Permissions.model_validate(permissions.tomllib.loads(block[1]))
    assert str(permissions.FILE) in text
    assert not [key for key in os.environ if "PERMISSIONS" in key]
